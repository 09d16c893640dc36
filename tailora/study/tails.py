"""What an adapter's smaller singular values are worth, in held-out loss; and what it costs at a lower strength."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tailora.core.adapter import Adapter
from tailora.core.compress import Spectra, leading_only
from tailora.evaluation.forgetting import forgetting
from tailora.evaluation.intervals import Interval, paired_difference
from tailora.model import LoRAModel
from tailora.study.inspect import Say
from tailora.study.ranks import costly
from tailora.train.evaluate import Evaluation

STRENGTHS = (0.75, 0.5, 0.25)  # of the dial, tried where much is forgotten

Measure = Callable[[], Evaluation]


@dataclass(frozen=True)
class Rise:
    """What held-out loss does without the lower half of some singular values, in nats per token, paired by example.

    cost: of the improvement over the base, what goes; None where there was none.
    values: share of the adapter's singular values that these modules have.
    """

    loss: float
    rise: float
    low: float | None
    high: float | None
    cost: float | None
    values: float


@dataclass(frozen=True)
class HeldOut:
    """Losses in nats per supervised token. `improvement` is base - adapter, with its 95% interval."""

    data: str
    examples: int
    tokens: int
    base_loss: float
    loss: float
    improvement: float
    improvement_low: float | None
    improvement_high: float | None
    half: Rise
    groups: dict[str, Rise]


@dataclass(frozen=True)
class Dial:
    """The adapter at a lower strength: held-out loss (None without data), and what it forgets then."""

    strength: float
    loss: float | None
    kl: float
    base_text_rise: float


def tails(
    model: LoRAModel,
    name: str,
    spectra: Spectra,
    groups: Mapping[str, Sequence[str]],
    data: str,
    measure: Measure,
    say: Say,
) -> HeldOut:
    """The base, the adapter, and the adapter without the lower half of its singular values: of all modules, and where
    that costs more than the limit (`ranks.costly`) of each group.
    """
    adapter = model.adapter(name)
    with model.disable_adapter():
        base = measure()
    say(f"held-out loss of the base {base.loss:.4f}")
    whole = measure()
    say(f"with the adapter {whole.loss:.4f}")
    gained = paired_difference(whole.sums, base.sums, base.counts)

    def without(what: str, paths: Sequence[str]) -> Rise:
        with leading_only(adapter, spectra, {path: upper_half(adapter, spectra, path) for path in paths}):
            found = measure()
        say(f"without the lower half of the singular values in {what} {found.loss:.4f}")
        rise = paired_difference(whole.sums, found.sums, whole.counts)
        return _rise(found.loss, rise, gained.value, _count(spectra, paths) / _count(spectra, list(spectra)))

    half = without("all modules", list(spectra))
    asked = groups if len(groups) > 1 and costly(half) else {}
    by_group = {group: without(group, paths) for group, paths in asked.items()}
    return HeldOut(
        data,
        len(whole.counts),
        int(whole.counts.sum()),
        base.loss,
        whole.loss,
        *_ends(gained),
        half=half,
        groups=by_group,
    )


def _rise(loss: float, rise: Interval, gained: float, values: float) -> Rise:
    return Rise(loss, *_ends(rise), cost=rise.value / gained if gained > 0 else None, values=values)


def _ends(interval: Interval) -> tuple[float, float | None, float | None]:
    low, high = (None if math.isnan(end) else end for end in interval[1:])
    return interval.value, low, high


def upper_half(adapter: Adapter, spectra: Spectra, path: str) -> int:
    """How many values are kept, per group: half, rounded up; with a frozen start half of 2r."""
    return min(-(-spectra[path].S.shape[1] // 2), adapter.low_rank[path].lora_B.shape[1])


def _count(spectra: Spectra, paths: Sequence[str]) -> int:
    return sum(spectra[path].S.numel() for path in paths)


def dialled(model: LoRAModel, name: str, texts: list[list[int]], measure: Measure | None, say: Say) -> list[Dial]:
    """The adapter at lower strengths than it has; afterwards at that."""
    found, before = [], next(layer.strength.item() for layer in model.adapter(name).low_rank.values())
    try:
        for strength in STRENGTHS:
            model.set_scale(name, strength * before)
            lost, loss = forgetting(model, texts), None if measure is None else measure().loss
            found.append(Dial(strength, loss, lost.kl, lost.loss_after - lost.loss_before))
            say(
                f"at strength {strength}: KL from the base {lost.kl:.4f}"
                + ("" if loss is None else f", loss {loss:.4f}")
            )
    finally:
        model.set_scale(name, before)
    return found
