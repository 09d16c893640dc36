"""What the numbers of a comparison say, in a sentence; or that they cannot tell, and what would."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tailora.evaluation.statistics import Difference


@dataclass(frozen=True)
class Standing:
    """One arm against the reference (full fine-tuning where it takes part)."""

    name: str
    parameters: int  # trained
    against: Difference | None  # loss of the arm - loss of the reference; None for the reference itself
    p_value: float | None  # adjusted for the number of arms
    bracketed: bool  # its best learning rate was within those tried


def verdict(
    standings: Sequence[Standing], reference: str, margin: float, outcomes: Mapping[str, str]
) -> tuple[str, str | None]:
    """The words, and the name of the arm that they are about; None where there is nothing to compare.

    outcomes: why an arm has no standing (diverged, out of memory).    margin: nats per token.
    """
    others = [each for each in standings if each.against is not None]
    sentences = [f"{name} {why}." for name, why in outcomes.items()]
    if not others or not any(each.name == reference for each in standings):
        return " ".join([*sentences, "There is nothing to compare."]), None
    chosen = _chosen(others, margin)
    sentences += [_said(chosen, reference, margin, standings)]
    edge = [each.name for each in standings if not each.bracketed]
    if edge:
        sentences.append(
            f"The best learning rate of {', '.join(edge)} lies at the edge of those tried, so it may do better yet: "
            "more --rate-tries would tell."
        )
    return " ".join(sentences), chosen.name


def _chosen(others: Sequence[Standing], margin: float) -> Standing:
    """The cheapest arm that is shown to lose less than the margin; if none is, the one with the lowest loss."""
    safe = [each for each in others if each.against is not None and each.against.high < margin]
    if safe:
        return min(safe, key=lambda each: each.parameters)
    return min(others, key=lambda each: each.against.value if each.against else math.inf)


def _said(arm: Standing, reference: str, margin: float, standings: Sequence[Standing]) -> str:
    found = arm.against
    assert found is not None
    over = f"{found.seeds} seed{'s' * (found.seeds > 1)} and {found.examples} held-out examples"
    interval = f"95% interval {found.low:+.3f} to {found.high:+.3f}"
    facts = f"{found.value:+.3f} nats per token, {interval}, p = {_p(arm)}, {over}"
    take = _taken(arm, next(each for each in standings if each.name == reference), better=found.high < 0)
    if found.seeds == 1:
        unknown = "but how much a seed changes is unknown with one: --seeds 3 or more"
        return f"Cannot tell: {arm.name} - {reference} = {facts}, {unknown}."
    if not (found.high < margin or found.low > margin):
        return f"Cannot tell {arm.name} from {reference} to {margin:g}: {facts}. {needed(found, margin)}"
    said, advice, hopeful = _finding(arm, reference, margin, facts, take)
    edge = [each.name for each in standings if each.name in hopeful and not each.bracketed]
    if edge:  # who was not tuned has not lost
        return f"Cannot tell yet, since {' and '.join(edge)} may do better at another learning rate. So far {said}."
    return f"{said.replace('no difference', 'No difference', 1)}. {advice}"


def _finding(arm: Standing, reference: str, margin: float, facts: str, take: str) -> tuple[str, str, set[str]]:
    """What is seen, what to do, and the arms that would change it by doing better."""
    found = arm.against
    assert found is not None
    if found.high < 0:
        return f"{arm.name} is better than {reference}: {facts}", take, {reference}
    if found.low > margin:
        worth = f"Take {reference} if that is worth its cost."
        return f"{reference} is better than {arm.name}: {facts}", worth, {arm.name}
    if found.low > -margin:
        same = f"no difference that matters between {arm.name} and {reference}"
        return f"{same}: {facts}, all within {margin:g}", take, {arm.name, reference}
    worse = f"{arm.name} is at most {found.high:.3f} worse than {reference}, or better"
    return f"{worse}: {facts}", take, {reference}


def needed(found: Difference, margin: float) -> str:
    """What would bring the interval's half width down to half the margin, by where the spread comes from."""
    half = (found.high - found.low) / 2
    times = (half / (margin / 2)) ** 2
    if found.from_examples > 0.5:
        count = math.ceil(found.examples * times)
        return f"Most of the uncertainty is of the examples: about {count:,} to judge by would do."
    count = max(math.ceil(found.seeds * times), found.seeds + 1)
    return f"Most of the uncertainty is of the seeds: about {count:,} would do."


def _taken(arm: Standing, reference: Standing, *, better: bool) -> str:
    """The arm; but of two that do as well the one that trains less."""
    chosen, other = (reference, arm) if reference.parameters < arm.parameters and not better else (arm, reference)
    times = other.parameters / chosen.parameters
    return f"Take {chosen.name}" + (f": it trains {times:,.0f}x fewer parameters." if times >= 1.5 else ".")


def _p(arm: Standing) -> str:
    value = arm.p_value if arm.p_value is not None else math.nan
    return "below .001" if value < 0.001 else f"{value:.3f}"
