"""Rules about what was learned at all, and about ranks: where there are too few, and where too many."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tailora.study.model_layout import grouped, patterns, span
from tailora.study.rule import Advice, above, command, few

if TYPE_CHECKING:
    from tailora.evaluation.spectral import ModuleReport
    from tailora.study.inspect import Inspection
    from tailora.study.tails import Rise

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
