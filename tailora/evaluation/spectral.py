"""The spectrum of an adapter's update of one weight matrix: ranks, norms, and directions that the base lacks.

`updates_of` returns what an adapter adds to each matrix, and `module_report` measures it. The measures come first:
ranks, then intruder dimensions.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from tailora.core.adapter import Adapter
from tailora.core.combine import MIXES_GROUPS, dense_update, factors_of, mixes_groups
from tailora.core.extras import TrainedBias
from tailora.core.layer import LoRALayer
from tailora.core.layer_types import layer_of
from tailora.core.low_rank import Factors, Update, leading_triplets, product_spectrum, rank_for_energy
from tailora.core.targets import target_at
from tailora.formats.offline import TRAINED_IN_FULL

# ---- Ranks
#
# An update consists of two factors by group (`core.low_rank.Factors`); the dense matrix is never formed. Groups
# (of a convolution, or experts) are separate blocks: together they have the singular values of all blocks.


def effective_rank(S: Tensor) -> float:
    """Returns exp of the entropy of sigma / sum sigma: 1 for one singular value, r for r equal ones, 0 for zeros.

    S: singular values, any shape. Roy and Vetterli, "The effective rank" (EUSIPCO 2007), def. 1.
    """
    values = S.cpu().double().flatten()
    total = float(values.sum())
    return math.exp(float(torch.special.entr(values / total).sum())) if total else 0.0


def stable_rank(S: Tensor) -> float:
    """Returns ||.||_F^2 / sigma_1^2, or 0 for zeros. Rudelson and Vershynin (arXiv:math/0503442), sec. 1."""
    values = S.cpu().double().flatten()
    largest = float(values.max()) if values.numel() else 0.0
    return float((values / largest).square().sum()) if largest else 0.0


# ---- Intruder dimensions: singular vectors of the tuned weight that are missing from the base's weight
#
# Shuttleworth et al., "LoRA vs Full Fine-tuning: An Illusion of Equivalence" (arXiv:2410.21228), alg. 1: of the k
# leading left singular vectors of W + dW, those whose largest |cosine| with any left singular vector of W is below a
# threshold. In the paper they coincide with forgetting. The count for a random update is the number by chance.


LEADING = 10  # vectors that are compared: k in the paper
THRESHOLD = 0.5  # epsilon in the paper
FULL_SIZE, NEAR = 1024, 64  # a larger W is compared by its NEAR leading vectors first
TINY = 1e-6  # of the largest singular value: left vectors of smaller ones are rounding

Cosines = Callable[[Tensor], Tensor]


def cosines_with(W: Tensor) -> Cosines:
    """Returns a function from orthonormal u (m, k) to their cosines with all left singular vectors of W (m, n).

    The cosines are (min(m, n), k). They come from the smaller of W W^T and W^T W: squaring mixes vectors whose
    singular values are below .03% of the largest (float32), and no leading vector of a tuned weight is close to those.
    """
    if W.shape[0] <= W.shape[1]:
        U = torch.linalg.eigh(W @ W.mT).eigenvectors
        return lambda u: U.mT @ u
    squares, V = torch.linalg.eigh(W.mT @ W)
    S = squares.clamp(min=0).sqrt()
    inverse = torch.where(S[-1] * TINY < S, 1 / S, 0.0)
    return lambda u: inverse[:, None] * (V.mT @ (W.mT @ u))


def intruder_counter(
    W: Tensor, k: int = LEADING, threshold: float = THRESHOLD, *, full_size: int = FULL_SIZE
) -> Callable[[Tensor], int]:
    """Returns a function from the tuned weight (m, n) to the number of intruders among its k leading vectors.

    full_size: a larger W is only decomposed fully for vectors that its NEAR leading ones do not decide. Usually one
    of those is close, or the rest of the vector is too short for any other to be.
    """
    all_cosines = cache(lambda: cosines_with(W))
    near = leading_triplets(W, NEAR).U if min(W.shape) > full_size else W.new_zeros(W.shape[0], 0)

    def count(tuned: Tensor) -> int:
        u = leading_triplets(tuned, min(k, *tuned.shape)).U
        shares = (near.mT @ u).square()  # (NEAR, k)
        similar = (shares >= threshold**2).any(0)
        intruders = ~similar & (1 - shares.sum(0) < threshold**2)
        undecided = ~similar & ~intruders
        if undecided.any():
            intruders[undecided] = all_cosines()(u[:, undecided]).abs().amax(0) < threshold
        return int(intruders.sum())

    return count


def random_update(m: int, n: int, r: int, norm: float, seed: int = 0) -> Factors:
    """Returns a Gaussian product of this shape, rank and Frobenius norm: B (1, m, r), A (1, r, n).

    torch's random state is not used.
    """
    generator = torch.Generator().manual_seed(seed)
    B, A = (torch.randn(1, *size, generator=generator, device="cpu") for size in ((m, r), (r, n)))
    length = float(((B.mT @ B) * (A @ A.mT)).sum().sqrt())  # ||B A||_F
    return Factors(B * (norm / length), A)


# ---- The updates of an adapter


def updates_of(adapter: Adapter, base_model: nn.Module) -> tuple[dict[str, Update], dict[str, str]]:
    """Returns the updates by path, and by name everything else in the adapter, with the reason why it is no update."""
    left_out = dict.fromkeys(adapter.saved, TRAINED_IN_FULL)
    for path, part in adapter.extras.items():
        left_out[path] = "a trained bias" if isinstance(part, TrainedBias) else "trained rows of an embedding"
    updates = {}
    for path, layer in adapter.low_rank.items():
        if mixes_groups(layer):
            left_out[path] = MIXES_GROUPS.partition(";")[0]
        else:
            updates[path] = _update_of_layer(path, layer, adapter, base_model)
    return updates, left_out


def _update_of_layer(path: str, layer: LoRALayer, adapter: Adapter, base_model: nn.Module) -> Update:
    module = layer_of(base_model, path)
    target = target_at(base_model, path, adapter.config)
    has_dora = layer.lora_magnitude_vector is not None

    def weight() -> Tensor:
        stored = target.weight
        matrix = target.matrix(stored)
        return stored if matrix is None else matrix

    return Update(
        path=path,
        layer_type=layer.layer_type.name,
        r=layer.r,
        factors=factors_of(layer, strength=False),
        scaling=layer.scaling.item(),
        configured_scaling=layer.configured_scaling,
        learned_scaling=layer.learns_scaling,
        dora=has_dora,
        stacked=layer.layer_type.is_stacked,
        weight=weight,
        dense=(lambda: dense_update(layer, module)) if has_dora else None,
    )


# ---- The report on an update


ENERGY = 0.99  # share of the squared singular values that `rank_99` keeps


@dataclass(frozen=True, kw_only=True)
class ModuleReport:
    """Measures of one update, by the keys of report.json. Norms are Frobenius norms; None: needs the base model."""

    path: str
    kind: str  # type of the layer
    in_features: int
    out_features: int
    numbers: int  # elements of the weight, of all experts together
    r: int
    rank: int  # how many singular values the update can have: r, or 2r with a frozen start; of experts, each
    effective_rank: float
    stable_rank: float
    rank_99: int  # how many of them hold 99% of the energy
    energy: float  # share of the adapter's squared norm
    norm: float  # of s (B A - B0 A0) alone
    relative_norm: float | None = None  # ||dW|| / ||W||, with DoRA's magnitudes
    intruders: int | None = None  # of the 10 leading vectors; None with a reason in `note`
    intruders_random: int | None = None
    scaling: float
    configured_scaling: float
    learned_scaling: bool
    use_dora: bool
    note: str = ""
    singular_values: list[float]  # largest first; for groups, the root of their mean square

    @property
    def use(self) -> float:
        return self.effective_rank / self.rank

    @property
    def density(self) -> float:
        """Root mean square of the update's elements, which compares matrices of different sizes."""
        return self.norm / math.sqrt(self.numbers)


@torch.no_grad()
def module_report(update: Update, *, seed: int = 0, count_intruders: bool = True) -> ModuleReport:
    """Returns all measures of one update except its share of the energy, for which `with_energy` needs all updates."""
    S = product_spectrum(update.factors).S  # (groups, k)
    rank = S.shape[1] if update.stacked else S.numel()
    groups, m, n = len(S), update.factors.B.shape[1], update.factors.A.shape[2]
    norm = float(S.norm())
    return ModuleReport(
        path=update.path,
        kind=update.layer_type,
        in_features=n if update.stacked else n * groups,
        out_features=m if update.stacked else m * groups,
        numbers=groups * m * n,
        r=update.r,
        rank=rank,
        effective_rank=effective_rank(S) * rank / S.numel(),
        stable_rank=stable_rank(S) * rank / S.numel(),
        rank_99=rank_for_energy(S, ENERGY) * rank // S.shape[1] if norm else 0,
        energy=0.0,
        norm=norm,
        scaling=update.scaling,
        configured_scaling=update.configured_scaling,
        learned_scaling=update.learned_scaling,
        use_dora=update.dora,
        singular_values=S.cpu().double().square().mean(0).sqrt().tolist(),
        **_compare_with_base(update, norm, seed, count_intruders),
    )


def with_energy(reports: Iterable[ModuleReport]) -> list[ModuleReport]:
    modules = list(reports)
    total = sum(module.norm**2 for module in modules)
    return [replace(module, energy=module.norm**2 / total if total else 0.0) for module in modules]


def _compare_with_base(update: Update, norm: float, seed: int, count_intruders: bool) -> dict[str, Any]:
    """Returns the fields of a report that need the base's weight, if they can be computed."""
    if update.weight is None:
        return {}
    W = update.weight().float()
    W = W.cpu() if W.device.type == "mps" else W  # torch 2.13 has no eigenvalues there
    dense = None if update.dense is None else update.dense().float()
    base_norm = float(W.norm())
    if not base_norm:
        return {"note": "the base's weight is zero"}
    relative_norm = (norm if dense is None else float(dense.norm())) / base_norm
    if not count_intruders:
        return {"relative_norm": relative_norm}
    if W.ndim != 3 or len(W) > 1:
        note = f"intruder dimensions are only counted for single matrices, not for stacks of {len(update.factors.B)}"
        return {"relative_norm": relative_norm, "note": note}
    change = (update.factors.dense if dense is None else dense).to(W)
    random = random_update(W.shape[1], W.shape[2], update.factors.B.shape[2], float(change.norm()), seed).dense
    count = intruder_counter(W[0])
    counts = {"intruders": count((W + change)[0]), "intruders_random": count((W + random.to(W))[0])}
    return {"relative_norm": relative_norm, **counts}
