"""What one adapter adds to one matrix, and what can be said of it: ranks, size, directions that the base lacks."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor, nn

from tailora.core.adapter import Adapter
from tailora.core.combine import MIXES_GROUPS, dense_update, factors_of, mixes_groups
from tailora.core.extras import TrainedBias
from tailora.core.layer import LoRALayer
from tailora.core.layer_types import host_of
from tailora.core.low_rank import Factors, Spectrum, leading, product_spectrum, rank_for_energy
from tailora.core.targets import candidate_at
from tailora.formats.offline import TRAINED_WHOLE, OfflineAdapter

# ---- What the singular values of an update say: how many directions it uses, and how it lies to another one.
#
# An update comes as two factors by group (`core.low_rank.Factors`), so nothing here forms the dense matrix. Groups
# (of a convolution, or experts) are blocks that do not meet: the singular values of all together are those of each.


NEGLIGIBLE = 1e-6  # of the largest singular value: below it, rounding of factors in float32


def effective_rank(S: Tensor) -> float:
    """exp of the entropy of the singular values' shares, sigma / sum sigma: 1 for one, r for r equal ones.

    S: any shape. 0 where all are 0. Roy and Vetterli, "The effective rank" (EUSIPCO 2007), def. 1.
    """
    values = S.double().flatten()
    total = float(values.sum())
    if total == 0:
        return 0.0
    shares = values[values > 0] / total
    return math.exp(-float((shares * shares.log()).sum()))


def stable_rank(S: Tensor) -> float:
    """||.||_F^2 / sigma_1^2; 0 where all are 0. Rudelson and Vershynin (arXiv:math/0503442), sec. 1."""
    values = S.double().flatten()
    largest = float(values.max()) if values.numel() else 0.0
    return float((values / largest).square().sum()) if largest else 0.0


def directions(spectrum: Spectrum) -> tuple[Tensor, Tensor]:
    """What an update writes to and reads from: orthonormal columns (groups, m, k) and (groups, n, k).

    Those of singular values that are no more than rounding are zero.
    """
    S = spectrum.S
    there = ((S.max() * NEGLIGIBLE < S) & (S > 0)).to(S)[:, None]  # (groups, 1, k)
    return spectrum.U * there, spectrum.V.mT * there


def subspace_overlap(first: Tensor, second: Tensor) -> float:
    """||U1^T U2||_F^2 / min(k1, k2): 1 where one subspace lies in the other, 0 where they are orthogonal.

    first (..., m, k1), second (..., m, k2): orthonormal columns; zero ones do not count. 0 where one has none. LoRA
    (arXiv:2106.09685), eq. 4.
    """
    smaller = min(_columns(first).sum(), _columns(second).sum())
    return float((first.mT @ second).square().sum() / smaller) if smaller else 0.0


def chance_overlap(first: Tensor, second: Tensor) -> float:
    """The expected overlap of random subspaces of these sizes: k1 k2 / (m min(k1, k2)) for one group."""
    one, two = _columns(first), _columns(second)
    smaller = min(one.sum(), two.sum())
    return float((one * two).sum() / first.shape[-2] / smaller) if smaller else 0.0


def _columns(basis: Tensor) -> Tensor:
    """How many are not zero, (...)."""
    return basis.square().sum((-2, -1)).round()


def inner(first: Factors, second: Factors) -> float:
    """<dW1, dW2> = tr((B1^T B2) (A2 A1^T)), summed over the groups, in float64."""
    left = first.B.double().mT @ second.B.double()  # (groups, r1, r2)
    right = first.A.double() @ second.A.double().mT
    return float((left * right).sum())


def largest_first(S: Tensor) -> Tensor:
    """Singular values (groups, k) as one falling row (k,): the root of their mean square over the groups."""
    return torch.sqrt(S.double().square().mean(0))


# ---- Intruder dimensions: directions of the tuned weight that the base's weight does not have.
#
# Shuttleworth et al., "LoRA vs Full Fine-tuning: An Illusion of Equivalence" (arXiv:2410.21228), alg. 1: of the k
# leading left singular vectors of W + dW, those whose largest |cosine| with any left singular vector of W is below a
# threshold. They came with forgetting there; the same count for a random update says how many there are by chance.


LEADING = 10  # vectors looked at, the paper's k
THRESHOLD = 0.5  # its epsilon
FULL_SIZE, NEAR = 1024, 64  # sizes up to which all of W's vectors are looked at; of larger ones, those looked at first
TINY = 1e-6  # of the largest singular value: left vectors of smaller ones are rounding

Cosines = Callable[[Tensor], Tensor]
Counter = Callable[[Tensor], int]


def cosines_with(W: Tensor) -> Cosines:
    """A function from orthonormal u (m, k) to u's cosines with all left singular vectors of W (m, n), (min(m, n), k).

    By the smaller of W W^T and W^T W: squaring mixes vectors whose singular values are below .03% of the largest
    (float32), which no leading vector of a tuned weight is near to.
    """
    if W.shape[0] <= W.shape[1]:
        U = torch.linalg.eigh(W @ W.mT).eigenvectors
        return lambda u: U.mT @ u
    squares, V = torch.linalg.eigh(W.mT @ W)
    S = squares.clamp(min=0).sqrt()
    inverse = torch.where(S[-1] * TINY < S, 1 / S, 0.0)
    return lambda u: inverse[:, None] * (V.mT @ (W.mT @ u))


def counter(W: Tensor, k: int = LEADING, threshold: float = THRESHOLD, *, whole: int = FULL_SIZE) -> Counter:
    """A function from the tuned weight (m, n) to the number of intruders among its k leading left singular vectors.

    whole: a W that is larger is decomposed whole only for vectors that its NEAR leading ones leave undecided. Mostly
    one of those is near, or what is left of the vector is too short for any other to be.
    """
    all_of = cache(lambda: cosines_with(W))
    near_by = leading(W, NEAR).U if min(W.shape) > whole else W.new_zeros(W.shape[0], 0)

    def count(changed: Tensor) -> int:
        u = leading(changed, min(k, *changed.shape)).U
        shares = (near_by.mT @ u).square()  # (NEAR, k)
        known = (shares >= threshold**2).any(0)
        hopeless = ~known & (1 - shares.sum(0) < threshold**2)
        open_ = ~known & ~hopeless
        found = int(hopeless.sum())
        if open_.any():
            found += int((all_of()(u[:, open_]).abs().amax(0) < threshold).sum())
        return found

    return count


def random_update(m: int, n: int, r: int, norm: float, seed: int = 0) -> Factors:
    """A Gaussian product of this shape, rank and Frobenius norm: B (1, m, r), A (1, r, n). The random state is left."""
    generator = torch.Generator().manual_seed(seed)
    B, A = torch.randn(1, m, r, generator=generator), torch.randn(1, r, n, generator=generator)
    length = float(((B.mT @ B) * (A @ A.mT)).sum().sqrt())  # ||B A||_F
    return Factors(B * (norm / length), A)


# ----


ENERGY = 0.99  # share of the squared singular values that `rank_99` keeps


@dataclass(frozen=True, eq=False)
class Update:
    """r: as trained.    factors: s (B A - B0 A0) by group, of twice the rank with a frozen start; float32 or wider.
    stacked: whether the groups are experts, of rank r each, and not blocks of one matrix.
    weight: what gives W (groups, m, n), or a stack's as it is stored; None where the base is not at hand.
    whole: what gives dW with DoRA's magnitudes (groups, m, n); None where the factors say it all, or without the base.
    """

    path: str
    kind: str
    r: int
    factors: Factors
    scaling: float
    configured_scaling: float
    learned: bool = False
    dora: bool = False
    stacked: bool = False
    weight: Callable[[], Tensor] | None = None
    whole: Callable[[], Tensor] | None = None


@dataclass(frozen=True)
class ModuleReport:
    """One matrix. Lengths are Frobenius norms; what only the base can tell is None without it.

    numbers: that the weight has, of all experts.
    rank: how many singular values the update may have: r, or 2r with a frozen start; of experts, each.
    rank_99: how many hold 99% of the energy.    energy: share of the adapter's squared norm.
    relative_norm: ||dW|| / ||W||, with DoRA's magnitudes.    norm: of s (B A - B0 A0) alone.
    intruders, intruders_random: of the 10 leading directions (`measure.intruders`); None with a reason in `note`.
    singular_values: falling; of groups the root of their mean square.
    """

    path: str
    kind: str
    in_features: int
    out_features: int
    numbers: int
    r: int
    rank: int
    effective_rank: float
    stable_rank: float
    rank_99: int
    energy: float
    norm: float
    relative_norm: float | None
    intruders: int | None
    intruders_random: int | None
    scaling: float
    configured_scaling: float
    learned_scaling: bool
    use_dora: bool
    note: str
    singular_values: list[float]

    @property
    def use(self) -> float:
        """Effective rank / rank."""
        return self.effective_rank / self.rank

    @property
    def density(self) -> float:
        """Root mean square of the update's numbers, by which matrices of different sizes compare."""
        return self.norm / math.sqrt(self.numbers)


def updates_of(adapter: Adapter, base_model: nn.Module) -> tuple[dict[str, Update], dict[str, str]]:
    """By path; and what else the adapter holds, with the reason why it is no update."""
    left_out = dict.fromkeys(adapter.saved, TRAINED_WHOLE)
    for path, part in adapter.extras.items():
        left_out[path] = "a trained bias" if isinstance(part, TrainedBias) else "trained rows of an embedding"
    found = {}
    for path, layer in adapter.low_rank.items():
        if mixes_groups(layer):
            left_out[path] = MIXES_GROUPS.partition(";")[0]
        else:
            found[path] = _of_layer(path, layer, adapter, base_model)
    return found, left_out


def _of_layer(path: str, layer: LoRALayer, adapter: Adapter, base_model: nn.Module) -> Update:
    host = host_of(base_model, path)
    place = candidate_at(base_model, path, adapter.config)

    def weight() -> Tensor:
        own = place.weight
        matrix = place.matrix(own)
        return own if matrix is None else matrix

    return Update(
        path=path,
        kind=layer.layer_type.name,
        r=layer.r,
        factors=factors_of(layer, strength=False),
        scaling=layer.scaling.item(),
        configured_scaling=layer.configured_scaling,
        learned=layer.learns_scaling,
        dora=layer.lora_magnitude_vector is not None,
        stacked=layer.layer_type.stacked,
        weight=weight,
        whole=None if layer.lora_magnitude_vector is None else lambda: dense_update(layer, host),
    )


def updates_alone(alone: OfflineAdapter) -> dict[str, Update]:
    """What the files hold of each."""
    return {
        path: Update(
            path, each.layer_type, each.r, each.factors, each.scaling, each.configured_scaling, each.learned, each.dora
        )
        for path, each in alone.updates.items()
    }


@torch.no_grad()
def examine(update: Update, *, seed: int = 0, look_for_intruders: bool = True) -> ModuleReport:
    """All about one update but its share of the energy, which takes the others (`with_shares`)."""
    spectrum = product_spectrum(update.factors)
    S = spectrum.S  # (groups, k)
    rank = S.shape[1] if update.stacked else S.numel()
    groups, m, n = len(S), update.factors.B.shape[1], update.factors.A.shape[2]
    found = (
        _Beside(None, None, None, "")
        if update.weight is None
        else _beside(update, float(S.norm()), seed, look_for_intruders)
    )
    return ModuleReport(
        path=update.path,
        kind=update.kind,
        in_features=n if update.stacked else n * groups,
        out_features=m if update.stacked else m * groups,
        numbers=groups * m * n,
        r=update.r,
        rank=rank,
        effective_rank=effective_rank(S) * rank / S.numel(),
        stable_rank=stable_rank(S) * rank / S.numel(),
        rank_99=rank_for_energy(S, ENERGY) * rank // S.shape[1] if float(S.norm()) else 0,
        energy=0.0,
        norm=float(S.norm()),
        relative_norm=found.relative_norm,
        intruders=found.intruders,
        intruders_random=found.by_chance,
        scaling=update.scaling,
        configured_scaling=update.configured_scaling,
        learned_scaling=update.learned,
        use_dora=update.dora,
        note=found.note,
        singular_values=largest_first(S).tolist(),
    )


def with_shares(reports: Iterable[ModuleReport]) -> list[ModuleReport]:
    """With each module's share of the adapter's energy."""
    found = list(reports)
    total = sum(each.norm**2 for each in found)
    return [replace(each, energy=each.norm**2 / total if total else 0.0) for each in found]


@dataclass(frozen=True)
class _Beside:
    """What shows beside the base's weight."""

    relative_norm: float | None
    intruders: int | None
    by_chance: int | None
    note: str


def _beside(update: Update, norm: float, seed: int, look_for_intruders: bool) -> _Beside:
    assert update.weight is not None
    W = update.weight().float()
    size, whole = float(W.norm()), None if update.whole is None else update.whole().float()
    relative = (norm if whole is None else float(whole.norm())) / size if size else None
    if not look_for_intruders or not size:
        return _Beside(relative, None, None, "" if size else "the base's weight is zero")
    if W.ndim != 3 or len(W) > 1:
        matrices = len(update.factors.B)
        return _Beside(relative, None, None, f"{matrices} matrices, not one: intruders are not counted")
    change = update.factors.dense.to(W) if whole is None else whole
    by_chance = random_update(W.shape[1], W.shape[2], update.factors.B.shape[2], float(change.norm()), seed)
    count = counter(W[0])
    found, random = (count((W + each.to(W))[0]) for each in (change, by_chance.dense))
    return _Beside(relative, found, random, "")
