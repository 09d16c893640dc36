"""The results of `inspect`, and the rules that turn them into advice, with thresholds and sources.

    Inspection -> each of RULES -> Advice, or nothing

`study/inspect.py` fills in the data classes, whose field names are the keys of report.json. A rule is a function whose
docstring states when it gives advice and where its threshold comes from. "Inspecting an adapter" in the docs lists
all rules in a table. All advice comes from here.
"""

import shlex
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tailora.evaluation.spectral import ModuleReport
from tailora.formats.export import ROUNDING_REMEDY
from tailora.study.model_layout import group_of

SATURATED_COST, SATURATED_USE = 0.03, 0.8  # share of the improvement; share of the rank
SPARE_USE = 0.5  # effective rank / rank, median
DEAD = 1e-3  # root mean square of an update's elements, relative to the median's
INTRUDING = 1.0  # intruders out of 10, mean over modules, more than after a random update
MOVED = 2.0  # factor between a learned scale and its start
TOO_STRONG = 1.0  # ||dW|| / ||W||, median
SLOWER = 4  # divides the learning rate
FORGETTING = 0.5  # increase of the loss on other text, relative to the improvement
ROUNDED = 1e-2  # ||dW|| / ||W||, median, in 16 bits


def _is_above_zero(value: float, low: float | None) -> bool:
    """True if the low end of the interval, or without an interval the value, is above 0."""
    return (value if low is None else low) > 0


# ---- On held-out data


@dataclass(frozen=True)
class TruncationCost:
    """The held-out loss without the lower half of the singular values of all modules, in nats per token.

    cost: the rise as a share of the adapter's improvement over the base; None if there is no improvement.
    """

    loss: float
    rise: float  # increase of the loss, paired by example; low, high: its 95% interval, None for a single example
    low: float | None
    high: float | None
    cost: float | None

    @property
    def is_costly(self) -> bool:
        """True if the cost exceeds SATURATED_COST and the interval of the rise is above 0."""
        return self.cost is not None and self.cost > SATURATED_COST and _is_above_zero(self.rise, self.low)


@dataclass(frozen=True)
class HeldOutLosses:
    """Losses in nats per trained token. `improvement` is base - adapter, with its 95% interval."""

    data: str
    examples: int
    tokens: int
    base_loss: float
    loss: float
    improvement: float
    improvement_low: float | None
    improvement_high: float | None
    half: TruncationCost

    @property
    def has_gain(self) -> bool:
        """True if the adapter lowers the held-out loss: the interval of the improvement is above 0."""
        return _is_above_zero(self.improvement, self.improvement_low)


# ---- The inspection


@dataclass(frozen=True)
class Advice:
    """The recommendation of a rule."""

    rule: str  # its name
    says: str  # the recommendation, in a sentence or two
    evidence: dict[str, Any]  # the numbers and the thresholds they exceed
    setting: dict[str, Any] = field(default_factory=dict)  # values of LoRAConfig or TrainConfig, ready to use
    command: str = ""  # a command line to copy, or ""


@dataclass(frozen=True)
class Inspection:
    """training: settings of the run that trained the adapter, {} if unknown.
    forgetting: KL divergence from the base and loss on other text (`evaluation.forgetting`).
    """

    adapter: str
    config: dict[str, Any]
    layers: int  # number of layers of the model, as far as the adapter names them
    modules: list[ModuleReport]
    left_out: dict[str, str]  # path -> why its change has no singular values
    model: str | None = None
    named_base: str | None = None
    base_dtype: str | None = None
    training: dict[str, Any] = field(default_factory=dict)
    held_out: HeldOutLosses | None = None
    forgetting: dict[str, Any] | None = None
    advice: list[Advice] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the `group` and the `use` (effective rank / rank) of every module."""
        content = asdict(self)
        for values, module in zip(content["modules"], self.modules, strict=True):
            values |= {"group": group_of(module.path, self.layers), "use": module.use}
        return content


# ---- Rules: training without effect


def advise(inspection: Inspection) -> list[Advice]:
    """Returns the advice of all rules, in the order of RULES."""
    return [advice for rule in RULES for advice in rule(inspection)]


def dead(inspection: Inspection) -> Iterator[Advice]:
    """Applies if ||s B A|| of a module is 0, or its root mean square is at most DEAD times the median.

    B starts at 0, so an update of 0 was never trained. The threshold is our choice.
    """
    modules = inspection.modules
    if not modules:
        return
    median = statistics.median(module.density for module in modules)
    paths = [module.path for module in modules if module.density <= DEAD * median]
    evidence = {"dead": len(paths), "modules": len(modules), "limit": DEAD, "median": median, "paths": paths}
    if len(paths) == len(modules):
        says = (
            f"All {len(paths)} updates are zero, so the adapter was not trained and has no effect. Check that the "
            "learning rate is not 0, that at least one step ran, and that the loss depends on these layers."
        )
        yield Advice("dead", says, evidence)
    elif paths:
        says = (
            f"{len(paths)} of {len(modules)} updates are zero or below {DEAD:g} of the median: {first_few(paths)}. "
            "Training does not reach these layers, or changing them does not help. Exclude them."
        )
        yield Advice("dead", says, evidence, setting={"exclude_modules": paths})


def no_gain(inspection: Inspection) -> Iterator[Advice]:
    """Applies if the interval of the improvement on held-out data (95%, over examples) includes 0."""
    losses = inspection.held_out
    if losses is None or losses.has_gain:
        return
    low, high = losses.improvement_low, losses.improvement_high
    interval = "one example" if low is None or high is None else f"95% interval {low:+.4f} to {high:+.4f}"
    yield Advice(
        "no gain",
        f"The adapter does not lower the loss on {losses.data}: {losses.loss:.4f} with the adapter, "
        f"{losses.base_loss:.4f} with the base model (improvement: {interval}). "
        "If this data resembles the training data, train longer or with a different learning rate.",
        {"improvement": losses.improvement, "low": low, "examples": losses.examples},
    )


# ---- Rank: too low or too high


def saturated(inspection: Inspection) -> Iterator[Advice]:
    """Applies if removing the lower half of the singular values costs more than SATURATED_COST of the improvement, with
    an interval above 0, and the mean of effective rank / r is above SATURATED_USE.

    Calibrated ("Inspecting an adapter" in the docs): doubling r helped where the rule applies, and hardly elsewhere.
    """
    losses, modules = inspection.held_out, [module for module in inspection.modules if module.norm > 0]
    if losses is None or not modules or not losses.has_gain or not losses.half.is_costly:
        return
    use = statistics.fmean(module.use for module in modules)
    if use <= SATURATED_USE:
        return
    smallest = min(min(module.in_features, module.out_features) for module in modules)
    r = max(module.r for module in modules)
    yield Advice(
        "saturated",
        f"The lower half of the singular values accounts for {losses.half.cost:.1%} of the improvement (limit "
        f"{SATURATED_COST:.0%}), and the rank is fully used: effective rank / r is {use:.2f} (limit "
        f"{SATURATED_USE:g}). Raise r; alpha can stay the same.",
        {"cost": losses.half.cost, "cost_limit": SATURATED_COST, "use": use, "use_limit": SATURATED_USE},
        setting={"r": min(2 * r, smallest)} if r < smallest else {},
    )


def spare(inspection: Inspection) -> Iterator[Advice]:
    """Applies if the median effective rank / r is below SPARE_USE and half of the values contain 99% of the energy.
    With data, removing the lower half must also cost at most SATURATED_COST of the improvement.

    Calibrated like `saturated`. By the theorem of Eckart and Young, a smaller r keeps this energy.
    """
    losses, modules = inspection.held_out, [module for module in inspection.modules if module.norm > 0]
    if not modules or (losses is not None and (losses.half.cost is None or losses.half.cost > SATURATED_COST)):
        return
    use = statistics.median(module.use for module in modules)
    share_99 = statistics.median(module.rank_99 / module.rank for module in modules)
    if use >= SPARE_USE or share_99 > SPARE_USE:
        return
    r = max(module.rank_99 for module in modules)
    on_data = ""
    if losses is not None:
        on_data = f"; on {losses.data} the lower half accounts for {losses.half.cost:.1%} of the improvement"
    small = f"{inspection.adapter}-small"
    yield Advice(
        "spare ranks",
        f"The median effective rank / r is {use:.2f} (limit {SPARE_USE:g}), and 99% of the energy is in "
        f"{share_99:.0%} of the singular values{on_data}. The adapter can be smaller: r = {r} is enough.",
        {"use": use, "use_limit": SPARE_USE, "rank_99": r, "kept": share_99},
        setting={"r": r},
        command=command("shrink", "--adapter", inspection.adapter, "--energy", ".99", "--output-dir", small),
    )


# ---- Strength: how much the adapter changes its base


def too_strong(inspection: Inspection) -> Iterator[Advice]:
    """Applies if the median ||dW|| / ||W|| is above TOO_STRONG.

    Calibrated: below .5 for all adapters with a useful learning rate, above 1.6 for all with a ruinous one.
    """
    sizes = [module.relative_norm for module in inspection.modules if module.relative_norm is not None]
    size = statistics.median(sizes) if sizes else 0.0
    if size <= TOO_STRONG:
        return
    yield Advice(
        "too strong",
        f"The median ||dW|| / ||W|| is {size:.1f} (limit {TOO_STRONG:g}): the update is larger than the base model's "
        f"weights. The learning rate was too high; divide it by {SLOWER}.",
        {"relative_norm": size, "limit": TOO_STRONG},
        setting=_learning_rate(inspection, 1 / SLOWER),
    )


def intruders(inspection: Inspection) -> Iterator[Advice]:
    """Applies if the mean over modules is more than INTRUDING of 10 above a random update of the same shape, rank and
    norm (arXiv:2410.21228, sec. 3 and 5).
    """
    counted = [module for module in inspection.modules if module.intruders is not None]
    if not counted:
        return
    mean = statistics.fmean(module.intruders or 0 for module in counted)
    random = statistics.fmean(module.intruders_random or 0 for module in counted)
    if mean - random <= INTRUDING:
        return
    size = statistics.median(module.relative_norm or 0.0 for module in counted)
    yield Advice(
        "intruders",
        f"On average {mean:.1f} of the 10 leading directions of a tuned weight are new, compared with {random:.1f} "
        f"after random updates of the same size (limit: {INTRUDING:g} more); the median ||dW|| / ||W|| is {size:.2%}. "
        "New directions are associated with forgetting. Halve the learning rate, or train for fewer steps.",
        {"intruders": mean, "random": random, "limit": INTRUDING, "relative_norm": size, "modules": len(counted)},
        setting=_learning_rate(inspection, 1 / 2),
    )


def scales(inspection: Inspection) -> Iterator[Advice]:
    """Applies if a learned scale differs from its initial value by more than a factor of MOVED.

    Across ranks, the best alpha changes by less than a factor of 2. The threshold is our choice.
    """
    learned = [module for module in inspection.modules if module.learned_scaling]
    factors = {module.path: module.scaling / module.configured_scaling for module in learned}
    moved = {path: factor for path, factor in factors.items() if not 1 / MOVED <= factor <= MOVED}
    if not moved:
        return
    median = statistics.median(factors.values())
    alpha = inspection.config["lora_alpha"] * median
    remedy = "Start closer to the final values."
    if median <= 0:
        remedy = "Some scales changed sign, which A and B could have done instead."
    yield Advice(
        "scales moved",
        f"{len(moved)} of {len(factors)} learned scales differ from their initial value by more than a factor of "
        f"{MOVED:g} ({min(moved.values()):.2g} to {max(moved.values()):.2g} times it; the median is {median:.2g}). "
        f"{remedy}",
        {"moved": len(moved), "learned": len(factors), "limit": MOVED, "median": median, "factors": moved},
        setting={"lora_alpha": round(alpha, 3)} if median > 0 and not 1 / MOVED <= median <= MOVED else {},
    )


def forgetting(inspection: Inspection) -> Iterator[Advice]:
    """Applies if the loss on other text rises by more than FORGETTING times the improvement on the data.

    The threshold is our choice.
    """
    losses, forgotten = inspection.held_out, inspection.forgetting
    if losses is None or forgotten is None or not losses.has_gain:
        return
    rise = forgotten["loss_after"] - forgotten["loss_before"]
    if rise <= FORGETTING * losses.improvement:
        return
    yield Advice(
        "forgetting",
        f"On {forgotten['text']} the loss rose by {rise:.3f} nats per token, KL {forgotten['kl']:.3f}; on the data it "
        f"fell by {losses.improvement:.3f} (limit: {FORGETTING:g} of that). Use a lower learning rate, mix in "
        "other data, or lower the adapter's strength (`model.set_scale`).",
        {"rise": rise, "kl": forgotten["kl"], "improvement": losses.improvement, "limit": FORGETTING},
    )


def rounding(inspection: Inspection) -> Iterator[Advice]:
    """Applies if the median ||dW|| / ||W|| is below ROUNDED and the base is in 16 bits.

    Measured: bfloat16 loses 17% of the update at 1e-2, 79% at 1e-3.
    """
    sizes = [module.relative_norm for module in inspection.modules if module.relative_norm]
    if not sizes or inspection.base_dtype not in ("bfloat16", "float16"):
        return
    size = statistics.median(sizes)
    if size >= ROUNDED:
        return
    model = ["--model", inspection.model] if inspection.model else []
    merged = ["--to", "merged", "--dtype", "float32", "--output", f"{inspection.adapter}-merged"]
    yield Advice(
        "rounding",
        f"The median ||dW|| / ||W|| is {size:.2%} (limit {ROUNDED:.0%}): merging into {inspection.base_dtype} "
        f"weights changes the update by a sixth of its size or more. Instead, {ROUNDING_REMEDY}.",
        {"relative_norm": size, "limit": ROUNDED, "dtype": inspection.base_dtype},
        command=command("export", inspection.adapter, *model, *merged),
    )


# ---- Helpers


def command(*words: str) -> str:
    return shlex.join(["tailora", *words])


def first_few(paths: Sequence[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def _learning_rate(inspection: Inspection, factor: float) -> dict[str, Any]:
    """Returns the run's learning rate times `factor`, as a setting; {} if the rate is not known."""
    rate = inspection.training.get("learning_rate")
    return {"learning_rate": rate * factor} if isinstance(rate, float) else {}


RULES = (dead, no_gain, saturated, spare, too_strong, intruders, scales, forgetting, rounding)
