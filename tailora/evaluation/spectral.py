"""What one adapter adds to one matrix, and what can be said of it: ranks, size, directions that the base lacks."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from tailora.core.adapter import Adapter
from tailora.core.extras import TrainedBias
from tailora.core.layer import LoRALayer
from tailora.core.layer_types import host_of
from tailora.core.low_rank import Factors, product_spectrum, rank_for_energy
from tailora.core.places import place_at
from tailora.core.updates import MIXED, dense_of, factors_of, is_mixed
from tailora.evaluation import intruders
from tailora.evaluation.spectra import effective_rank, largest_first, stable_rank
from tailora.formats.offline import WHOLE, Alone

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
    left_out = dict.fromkeys(adapter.saved, WHOLE)
    for path, part in adapter.extras.items():
        left_out[path] = "a trained bias" if isinstance(part, TrainedBias) else "trained rows of an embedding"
    found = {}
    for path, layer in adapter.low_rank.items():
        if is_mixed(layer):
            left_out[path] = MIXED.partition(";")[0]
        else:
            found[path] = _of_layer(path, layer, adapter, base_model)
    return found, left_out


def _of_layer(path: str, layer: LoRALayer, adapter: Adapter, base_model: nn.Module) -> Update:
    host = host_of(base_model, path)
    place = place_at(base_model, path, adapter.config)

    def weight() -> Tensor:
        own = place.weight
        matrix = place.matrix(own)
        return own if matrix is None else matrix

    return Update(
        path=path,
        kind=layer.kind.name,
        r=layer.r,
        factors=factors_of(layer, strength=False),
        scaling=layer.scaling.item(),
        configured_scaling=layer.configured_scaling,
        learned=layer.learns_scaling,
        dora=layer.lora_magnitude_vector is not None,
        stacked=layer.kind.stacked,
        weight=weight,
        whole=None if layer.lora_magnitude_vector is None else lambda: dense_of(layer, host),
    )


def updates_alone(alone: Alone) -> dict[str, Update]:
    """What the files hold of each."""
    return {
        path: Update(
            path, each.kind, each.r, each.factors, each.scaling, each.configured_scaling, each.learned, each.dora
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
    by_chance = intruders.random_update(W.shape[1], W.shape[2], update.factors.B.shape[2], float(change.norm()), seed)
    count = intruders.counter(W[0])
    found, random = (count((W + each.to(W))[0]) for each in (change, by_chance.dense))
    return _Beside(relative, found, random, "")
