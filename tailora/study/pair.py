"""Two adapters of one base: do they change the same directions, and what do they lose when they are added up?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tailora.core.low_rank import product_spectrum
from tailora.errors import ConfigError, listing
from tailora.evaluation.intervals import paired_difference
from tailora.evaluation.spectra import chance_overlap, directions, inner, subspace_overlap
from tailora.evaluation.spectral import Update
from tailora.study.model_layout import in_order

if TYPE_CHECKING:
    from tailora.model import LoRAModel
    from tailora.train.evaluate import Evaluation


@dataclass(frozen=True)
class Overlap:
    """One matrix that both adapt. Norms are those of the updates, s (B A - B0 A0).

    writes, reads: overlap of the spaces of their outputs and of their inputs (`evaluation.spectra.subspace_overlap`),
        each beside that of random spaces of these sizes.
    cosine: <dW1, dW2> / (||dW1|| ||dW2||): 1 where they say the same, 0 where they do not meet, -1 where they cancel.
    sum_norm: ||dW1 + dW2||.
    """

    path: str
    norm: float
    other_norm: float
    sum_norm: float
    cosine: float
    writes: float
    writes_by_chance: float
    reads: float
    reads_by_chance: float


@dataclass(frozen=True)
class Together:
    """Held-out losses, nats per supervised token. worse: of both - of the better one, with its 95% interval."""

    base: float
    one: float
    other: float
    both: float
    worse: float
    worse_low: float | None
    worse_high: float | None


@dataclass(frozen=True)
class Pair:
    """modules: of both.    cosine: of the updates of all of them together."""

    other: str
    modules: list[Overlap]
    only_here: list[str]
    only_there: list[str]
    cosine: float
    losses: Together | None = None


def overlaps(other: str, here: Mapping[str, Update], there: Mapping[str, Update]) -> Pair:
    """Raises ConfigError where the same path has different shapes, as adapters of different models have."""
    shared = in_order(here.keys() & there.keys())
    _check_shapes(other, {path: (_shape(here[path]), _shape(there[path])) for path in shared})
    found = [_overlap(here[path], there[path]) for path in shared]
    products = sum(each.cosine * each.norm * each.other_norm for each in found)
    lengths = [math.sqrt(sum(length**2 for length in lengths)) for lengths in _lengths(found)]
    cosine = products / math.prod(lengths) if all(lengths) else 0.0
    return Pair(other, found, in_order(here.keys() - there.keys()), in_order(there.keys() - here.keys()), cosine)


def _lengths(found: list[Overlap]) -> tuple[list[float], list[float]]:
    return [each.norm for each in found], [each.other_norm for each in found]


def _shape(update: Update) -> tuple[int, int, int]:
    """(groups, m, n)."""
    return len(update.factors.B), update.factors.B.shape[1], update.factors.A.shape[2]


def _check_shapes(other: str, shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    wrong = [f"{path}: {one} here, {two} there" for path, (one, two) in shapes.items() if one != two]
    if wrong:
        shown = [*wrong[:5], *([f"and {len(wrong) - 5} more"] if len(wrong) > 5 else [])]
        raise ConfigError(f"{other} was made for another model; shapes (groups, out, in) differ: {listing(shown)}")


def _overlap(one: Update, two: Update) -> Overlap:
    first, second = product_spectrum(one.factors), product_spectrum(two.factors)
    norms, product = (float(first.S.norm()), float(second.S.norm())), inner(one.factors, two.factors)
    (writes, reads), (other_writes, other_reads) = directions(first), directions(second)
    return Overlap(
        path=one.path,
        norm=norms[0],
        other_norm=norms[1],
        sum_norm=math.sqrt(max(norms[0] ** 2 + norms[1] ** 2 + 2 * product, 0.0)),
        cosine=product / math.prod(norms) if all(norms) else 0.0,
        writes=subspace_overlap(writes, other_writes),
        writes_by_chance=chance_overlap(writes, other_writes),
        reads=subspace_overlap(reads, other_reads),
        reads_by_chance=chance_overlap(reads, other_reads),
    )


def together(model: LoRAModel, names: tuple[str, str], measure: Callable[[], Evaluation]) -> Together:
    """Losses with either adapter and with both; afterwards what was active is active again."""
    active = model.active_adapters
    found: list[Evaluation] = []
    try:
        for chosen in (None, names[0], names[1], names):
            model.set_adapter(chosen)
            found.append(measure())
    finally:
        model.set_adapter(active)
    base, one, other, both = found
    better = min(one, other, key=lambda each: each.loss)
    worse = paired_difference(better.sums, both.sums, both.counts)
    low, high = (None if math.isnan(end) else end for end in worse[1:])
    return Together(base.loss, one.loss, other.loss, both.loss, worse.value, low, high)
