"""What the numbers of an inspection advise, by rules that are stated here with their thresholds and sources.

A rule looks at the numbers and gives advice, or nothing. docs/inspect.md has the same table in words. Nothing else
advises.
"""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tailora.study.model_layout import grouped, patterns, span

if TYPE_CHECKING:
    from tailora.evaluation.spectral import ModuleReport
    from tailora.study.inspect import Inspection, Rise


# ---- What a rule is, and what it gives: advice that carries its numbers and a setting or command to copy.


@dataclass(frozen=True)
class Advice:
    """rule: its name.    says: a sentence or two.    evidence: the numbers, and the thresholds that they passed.
    setting: of LoRAConfig or TrainConfig, ready to be used.    command: to be copied, or "".
    """

    rule: str
    says: str
    evidence: dict[str, Any]
    setting: dict[str, Any] = field(default_factory=dict)
    command: str = ""


@dataclass(frozen=True)
class Rule:
    """when, source: as docs/inspect.md has them."""

    name: str
    when: str
    source: str
    look: Callable[[Inspection], Iterable[Advice]]


def command(*words: str) -> str:
    return shlex.join(["tailora", *words])


def above(value: float, low: float | None) -> bool:
    """Whether it is above 0 for certain; where the spread is not known, whether it is at all."""
    return (value if low is None else low) > 0


def few(paths: Sequence[str]) -> str:
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


# ---- Rules about what was learned at all, and about ranks: where there are too few, and where too many.


SATURATED_COST, SATURATED_USE = 0.03, 0.8  # of the improvement; of the rank
SPARE_USE = 0.5  # effective rank / rank, median
DEAD = 1e-3  # of the median root mean square of an update's numbers


# ---- training that did nothing


def dead(found: Inspection) -> Iterator[Advice]:
    if not found.modules:
        return
    middle = statistics.median(module.density for module in found.modules)
    dead = [module.path for module in found.modules if module.density <= DEAD * middle]
    evidence = {"dead": len(dead), "modules": len(found.modules), "limit": DEAD, "median": middle, "paths": dead}
    if len(dead) == len(found.modules):
        yield Advice(
            "dead",
            f"All {len(dead)} updates are zero: training never moved them. Look for a learning "
            "rate of 0, no steps taken, or a loss that does not reach the layers; this adapter changes nothing.",
            evidence,
        )
    elif dead:
        yield Advice(
            "dead",
            f"{len(dead)} of {len(found.modules)} updates are zero or below {DEAD:g} of the median: {few(dead)}. "
            "Nothing reaches them in training, or nothing there helps: leave them out.",
            evidence,
            setting={"exclude_modules": dead},
        )


def no_gain(found: Inspection) -> Iterator[Advice]:
    held = found.held_out
    if held is not None and not above(held.improvement, held.improvement_low):
        yield Advice(
            "no gain",
            f"The adapter does not lower the loss on {held.data}: {held.base_loss:.4f} with the base, "
            f"{held.loss:.4f} with it ({_interval(held.improvement_low, held.improvement_high)} for the gain). "
            "Check that these data are like those it was trained on; if so, train longer or at another rate.",
            {"improvement": held.improvement, "low": held.improvement_low, "examples": held.examples},
        )


# ---- rank


def saturated(found: Inspection) -> Iterator[Advice]:
    held, live = found.held_out, _alive(found)
    if held is None or not live or not above(held.improvement, held.improvement_low):
        return
    if not costly(held.half) or _use(live) <= SATURATED_USE:
        return
    places = grouped([module.path for module in live], found.layers)
    members = {name: [module for module in live if module.path in set(paths)] for name, paths in places.items()}
    full = {
        name: modules
        for name, modules in members.items()
        if name in held.groups and _use(modules) > SATURATED_USE and costly(held.groups[name])
    }
    yield _raise_r(full if 0 < len(full) < len(members) else {"all modules": live}, found)


def _raise_r(full: Mapping[str, Sequence[ModuleReport]], found: Inspection) -> Advice:
    """full: name of a group -> its modules; "all modules" where no group stands out."""
    held = found.held_out
    assert held is not None
    modules = [module for each in full.values() for module in each]
    wanted = {module.path: min(2 * module.r, module.in_features, module.out_features) for module in modules}
    everywhere = "all modules" in full and len({*wanted.values()}) == 1
    evidence = [_evidence(name, each, held.groups.get(name, held.half)) for name, each in full.items()]
    said = "; ".join(
        f"{each['group']}{_layers(each['layers'])} {each['cost']:.1%} (limit {each['cost_limit']:.1%}) at effective "
        f"rank / r {each['use']:.2f}"
        for each in evidence
    )
    return Advice(
        "saturated",
        f"The lower half of the singular values is worth much of the improvement, and the rank is used up (limit "
        f"{SATURATED_USE:g}): {said}. Raise r there; alpha can stay.",
        {"groups": evidence, "cost": held.half.cost, "cost_limit": SATURATED_COST, "use_limit": SATURATED_USE},
        setting={"r": next(iter(wanted.values()))}
        if everywhere
        else {"rank_pattern": patterns(wanted, [module.path for module in found.modules])},
    )


def _evidence(name: str, modules: Sequence[ModuleReport], rise: Rise) -> dict[str, Any]:
    where = span([module.path for module in modules])
    numbers = {"cost": rise.cost, "cost_limit": limit_of(rise), "rise": rise.rise, "rise_low": rise.low}
    return {"group": name, "layers": where, **numbers, "use": _use(modules)}


def spare(found: Inspection) -> Iterator[Advice]:
    live, held = _alive(found), found.held_out
    if not live or (held is not None and (held.half.cost is None or held.half.cost > SATURATED_COST)):
        return
    use = statistics.median(module.use for module in live)
    kept = statistics.median(module.rank_99 / module.rank for module in live)
    if use >= SPARE_USE or kept > SPARE_USE:
        return
    r = max(module.rank_99 for module in live)
    loss = "" if held is None else f"; on {held.data} the lower half is worth {held.half.cost:.1%} of the improvement"
    yield Advice(
        "spare ranks",
        f"Effective rank / r is {use:.2f} in the middle (limit {SPARE_USE:g}), and 99% of the energy is in "
        f"{kept:.0%} of the singular values{loss}. The adapter can be smaller, and r = {r} would have done.",
        {"use": use, "use_limit": SPARE_USE, "rank_99": r, "kept": kept},
        setting={"r": r},
        command=command(
            "shrink", "--adapter", found.adapter, "--energy", ".99", "--output-dir", f"{found.adapter}-small"
        ),
    )


def _layers(where: str) -> str:
    return f" (layer{'s' if '-' in where else ''} {where})" if where else ""


def _alive(found: Inspection) -> list[ModuleReport]:
    return [module for module in found.modules if module.norm > 0]


def _use(modules: Sequence[ModuleReport]) -> float:
    return statistics.fmean(module.use for module in modules)


def limit_of(rise: Rise) -> float:
    """What these modules may cost of the improvement: their share of the limit, by their singular values."""
    return SATURATED_COST * rise.values


def costly(rise: Rise) -> bool:
    """Whether the lower half costs more than that, and anything at all for certain."""
    return rise.cost is not None and rise.cost > limit_of(rise) and above(rise.rise, rise.low)


def _interval(low: float | None, high: float | None) -> str:
    return "one example" if low is None or high is None else f"95% interval {low:+.4f} to {high:+.4f}"


# ---- Rules about how strongly an adapter changes its base: intruders, learned scales, forgetting, rounding.


INTRUDING = 1.0  # intruders of 10, mean over modules, above those of a random update
MOVED = 2.0  # factor of a learned scale from its start
TOO_STRONG = 1.0  # ||dW|| / ||W||, median
SLOWER = 4  # the learning rate is divided by
FORGETTING = 0.5  # rise of the loss on other text, of the improvement
ROUNDED = 1e-2  # ||dW|| / ||W||, median, in 16 bits


def too_strong(found: Inspection) -> Iterator[Advice]:
    sizes = [module.relative_norm for module in found.modules if module.relative_norm is not None]
    size = statistics.median(sizes) if sizes else 0.0
    if size <= TOO_STRONG:
        return
    rate = found.training.get("learning_rate")
    yield Advice(
        "too strong",
        f"||dW|| is {size:.1f} times ||W|| in the middle (limit {TOO_STRONG:g}): the base is drowned. The "
        f"learning rate was too high; try a {SLOWER}th of it.",
        {"relative_norm": size, "limit": TOO_STRONG},
        setting={"learning_rate": rate / SLOWER} if isinstance(rate, float) else {},
    )


def intruders(found: Inspection) -> Iterator[Advice]:
    counted = [module for module in found.modules if module.intruders is not None]
    if not counted:
        return
    mean = statistics.fmean(module.intruders or 0 for module in counted)
    random = statistics.fmean(module.intruders_random or 0 for module in counted)
    if mean - random <= INTRUDING:
        return
    size = statistics.median(module.relative_norm or 0.0 for module in counted)
    rate = found.training.get("learning_rate")
    yield Advice(
        "intruders",
        f"{mean:.1f} of the 10 leading directions of a tuned weight are new, {random:.1f} with random updates as large "
        f"(limit: {INTRUDING:g} more); ||dW|| is {size:.2%} of ||W|| in the middle. Such directions came with "
        "forgetting: halve the learning rate, or train fewer steps.",
        {"intruders": mean, "random": random, "limit": INTRUDING, "relative_norm": size, "modules": len(counted)},
        setting={"learning_rate": rate / 2} if isinstance(rate, float) else {},
    )


def scales(found: Inspection) -> Iterator[Advice]:
    learned = [module for module in found.modules if module.learned_scaling]
    moved = {
        module.path: module.scaling / module.configured_scaling
        for module in learned
        if not 1 / MOVED <= module.scaling / module.configured_scaling <= MOVED
    }
    if not moved:
        return
    middle = statistics.median(module.scaling / module.configured_scaling for module in learned)
    alpha = found.config["lora_alpha"] * middle
    yield Advice(
        "scales moved",
        f"{len(moved)} of {len(learned)} learned scales are more than a factor of {MOVED:g} from their start "
        f"({min(moved.values()):.2g} to {max(moved.values()):.2g} times it; {middle:.2g} in the middle). "
        + ("Start nearer to where they go." if middle > 0 else "Some changed their sign: A and B could do that."),
        {"moved": len(moved), "learned": len(learned), "limit": MOVED, "median": middle, "factors": moved},
        setting={"lora_alpha": round(alpha, 3)} if middle > 0 and not 1 / MOVED <= middle <= MOVED else {},
    )


def forgets_much(found: Inspection) -> bool:
    """Whether the loss on other text rose by more than FORGETTING of what the adapter gained on the data."""
    held, lost = found.held_out, found.forgetting
    if held is None or lost is None or not above(held.improvement, held.improvement_low):
        return False
    return float(lost["loss_after"] - lost["loss_before"]) > FORGETTING * held.improvement


def forgetting(found: Inspection) -> Iterator[Advice]:
    if not forgets_much(found) or found.held_out is None or found.forgetting is None:
        return
    rise = found.forgetting["loss_after"] - found.forgetting["loss_before"]
    gain = found.held_out.improvement
    better = next(
        (dial for dial in found.dial if _worth(dial.base_text_rise, found.held_out.base_loss, dial.loss)), None
    )
    tried = ", ".join(f"{dial.strength:g}: loss {dial.loss:.3f}, KL {dial.kl:.3f}" for dial in found.dial if dial.loss)
    cure = (
        f"At strength {better.strength:g} it keeps {_kept(found.held_out.base_loss, better.loss, gain):.0%} of the "
        "gain and forgets less than the limit."
        if better
        else "No lower strength that was tried is within the limit: train at a lower rate, or on data that are mixed."
    )
    yield Advice(
        "forgetting",
        f"On {found.forgetting['text']} the loss rose by {rise:.3f} nats per token, KL {found.forgetting['kl']:.3f}; "
        f"on the data it fell by {gain:.3f} (limit: {FORGETTING:g} of that). {cure} ({tried})",
        {"rise": rise, "kl": found.forgetting["kl"], "improvement": gain, "limit": FORGETTING},
        setting={"set_scale": better.strength} if better else {},
        command=_dialled_command(found, better.strength) if better else "",
    )


def _worth(rise: float, base_loss: float, loss: float | None) -> bool:
    return loss is not None and rise <= FORGETTING * (base_loss - loss)


def _kept(base_loss: float, loss: float | None, gain: float) -> float:
    return 0.0 if loss is None or gain <= 0 else (base_loss - loss) / gain


def _dialled_command(found: Inspection, strength: float) -> str:
    out = f"{found.adapter}-{strength:g}"
    return command("combine", "--adapter", f"a={found.adapter}", "--weight", f"a={strength:g}", "--output-dir", out)


def interference(found: Inspection) -> Iterator[Advice]:
    both = None if found.pair is None else found.pair.losses
    if found.pair is None or both is None or not above(both.worse, both.worse_low):
        return
    yield Advice(
        "interference",
        f"Added up, the two have a loss of {both.both:.4f}, {both.worse:.4f} above the better one alone: they disturb "
        f"each other (cosine of the updates {found.pair.cosine:+.2f}). Keep them apart and switch, or choose by row.",
        {"worse": both.worse, "low": both.worse_low, "one": both.one, "other": both.other, "cosine": found.pair.cosine},
        command=command(
            "chat",
            "--model",
            found.model or "BASE",
            "--adapter",
            f"one={found.adapter}",
            "--adapter",
            f"two={found.pair.other}",
        ),
    )


def rounded(found: Inspection) -> Iterator[Advice]:
    sizes = [module.relative_norm for module in found.modules if module.relative_norm]
    if not sizes or found.base_dtype not in ("bfloat16", "float16"):
        return
    size = statistics.median(sizes)
    if size >= ROUNDED:
        return
    out = f"{found.adapter}-merged"
    model = ["--model", found.model] if found.model else []
    yield Advice(
        "rounding",
        f"||dW|| is {size:.2%} of ||W|| in the middle (limit {ROUNDED:.0%}): merged into {found.base_dtype} weights "
        "the update would carry an error of a sixth of itself or more. Keep it beside the base, or merge in float32.",
        {"relative_norm": size, "limit": ROUNDED, "dtype": found.base_dtype},
        command=command("export", found.adapter, *model, "--to", "merged", "--dtype", "float32", "--output", out),
    )


# ----


RULES = [
    Rule(
        "dead",
        f"||s B A|| of a module is 0, or its root mean square at most {DEAD:g} of the median's",
        "B starts at 0, so an update of 0 has never been moved; the threshold is ours",
        dead,
    ),
    Rule(
        "no gain",
        "the interval of the improvement on held-out data reaches 0",
        "95%, bootstrap over examples",
        no_gain,
    ),
    Rule(
        "saturated",
        f"the lower half of the singular values is worth more than {SATURATED_COST:.0%} of the improvement, "
        f"for certain, and effective rank / r is above {SATURATED_USE:g}; then the same in groups",
        "calibrated, docs/inspect.md: doubling r gained where it fires, and next to nothing where not",
        saturated,
    ),
    Rule(
        "spare ranks",
        f"median effective rank / r is below {SPARE_USE:g} and half of the values hold 99% of the energy; "
        f"with data, the lower half is worth at most {SATURATED_COST:.0%} of the improvement, too",
        "the same calibration; Eckart and Young for the energy",
        spare,
    ),
    Rule(
        "too strong",
        f"median ||dW|| / ||W|| is above {TOO_STRONG:g}",
        "calibrated: all adapters of a useful rate are below .5 there, all above 1.6 are of a ruinous one",
        too_strong,
    ),
    Rule(
        "intruders",
        f"more than {INTRUDING:g} of 10, in the mean over modules, above a random update of the same shape, "
        "rank and norm",
        "arXiv:2410.21228, sec. 3 and 5",
        intruders,
    ),
    Rule(
        "scales moved",
        f"a learned scale is more than a factor of {MOVED:g} from its start",
        "the best rate of an alpha is within an octave over ranks; the threshold is ours",
        scales,
    ),
    Rule(
        "forgetting",
        f"the loss on other text rises by more than {FORGETTING:g} of what the loss on the data falls",
        "the threshold is ours; the strengths are measured",
        forgetting,
    ),
    Rule(
        "interference",
        "both adapters together lose more on the data than the better one alone, for certain",
        "95%, bootstrap over examples",
        interference,
    ),
    Rule(
        "rounding",
        f"||dW|| / ||W|| is below {ROUNDED:g} in the middle, and the base is in 16 bits",
        "measured: 17% of the update in bfloat16 at 1e-2, 79% at 1e-3",
        rounded,
    ),
]


def advise(found: Inspection) -> list[Advice]:
    """All that the rules say, in their order."""
    return [advice for rule in RULES for advice in rule.look(found)]
