"""The verdict of a comparison and of a search: what the numbers show, in plain sentences.

    compare_verdict, search_verdict    the whole text
      one_seed, unclear                  why the runs cannot tell, and what would
      difference_in_words                the numbers behind a statement

A statement is made only where the 95% interval of the difference carries it; otherwise the verdict begins with "Cannot
tell". Losses are nats per token; `margin` is the difference that does not matter.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tailora.evaluation.statistics import Difference
from tailora.study.results import Finalist


@dataclass(frozen=True)
class ArmStanding:
    """One arm beside the reference.

    parameters: how many are trained.    difference: loss of the arm - loss of the reference; None for the reference.
    p_value: adjusted for the number of arms.    bracketed: whether its best learning rate was within those tried.
    """

    name: str
    parameters: int
    difference: Difference | None
    p_value: float | None
    bracketed: bool


# ---- compare


def compare_verdict(
    standings: Sequence[ArmStanding], reference: str, margin: float, failures: Mapping[str, str]
) -> tuple[str, str | None]:
    """Returns the text, and the name of the arm that it is about; None where there is nothing to compare.

    failures: arm -> why it could not be trained.
    """
    by_name = {arm.name: arm for arm in standings}
    compared = [(arm, arm.difference) for arm in standings if arm.difference is not None]
    sentences = [f"{name} {reason}." for name, reason in failures.items()]
    if not compared or reference not in by_name:
        return " ".join([*sentences, "There is nothing to compare."]), None
    safe = [(arm, difference) for arm, difference in compared if difference.high < margin]
    if safe:  # the smallest arm that is shown to lose less than the margin
        arm, difference = min(safe, key=lambda pair: pair[0].parameters)
    else:
        arm, difference = min(compared, key=lambda pair: pair[1].value)
    sentences.append(_compare_finding(arm, difference, by_name[reference], margin))
    edge = [arm.name for arm in standings if not arm.bracketed]
    if edge:
        sentences.append(
            f"The best learning rate of {', '.join(edge)} is at the edge of those that were tried, so an untried one "
            "may be better: try more with --rate-tries."
        )
    return " ".join(sentences), arm.name


def _compare_finding(arm: ArmStanding, difference: Difference, reference: ArmStanding, margin: float) -> str:
    numbers = f"{arm.name} - {reference.name} = {difference_in_words(difference, arm.p_value)}"
    low, high = difference.low, difference.high
    advice = _take(arm, reference, arm_is_better=high < 0)
    if difference.seeds == 1:
        return one_seed(f"{arm.name} or {reference.name}", numbers)
    if high < 0:
        finding, could_change = f"{arm.name} is better than {reference.name}", [reference]
    elif low > margin:
        finding, could_change = f"{reference.name} is better than {arm.name}", [arm]
        advice = f"Take {reference.name} if the lower loss is worth its cost."
    elif high < margin and low > -margin:
        finding = (
            f"{arm.name} and {reference.name} are equally good: they differ by less than {margin:g} nats per token"
        )
        could_change = [arm, reference]
    elif high < margin:
        finding = f"{arm.name} may be better than {reference.name}, and is worse by {high:.3f} nats per token at most"
        could_change = [reference]
    else:
        return unclear(f"{arm.name} or {reference.name}", difference, numbers, margin)
    untuned = [standing.name for standing in could_change if not standing.bracketed]
    if untuned:
        reason = f"{' and '.join(untuned)} may do better at another learning rate"
        return f"Cannot tell yet, since {reason}. So far, {finding} ({numbers})."
    return f"{finding} ({numbers}). {advice}"


def _take(arm: ArmStanding, reference: ArmStanding, *, arm_is_better: bool) -> str:
    """Which to take: the arm, or the reference if it trains fewer parameters and does as well."""
    chosen, other = (arm, reference)
    if reference.parameters < arm.parameters and not arm_is_better:
        chosen, other = other, chosen
    times = other.parameters / chosen.parameters
    return f"Take {chosen.name}" + (f": it trains {times:,.0f}x fewer parameters." if times >= 1.5 else ".")


# ---- search


def search_verdict(
    finalists: Sequence[Finalist], cheapest: Finalist, differences: Mapping[int, Difference], margin: float
) -> str:
    """finalists: the best first.    differences: number of a finalist -> its loss - that of the best."""
    best = finalists[0]
    low, high = best.interval
    take_best = f"Take trial {best.number}: held-out loss {best.eval_loss:.3f} (95% interval {low:.3f} to {high:.3f})."
    if len(finalists) == 1:
        return f"{take_best} No trial with fewer trained parameters came near it, so it is also the cheapest."
    if cheapest is best:
        nearest = min(finalists[1:], key=lambda finalist: finalist.eval_loss)
        numbers = difference_in_words(differences[nearest.number], nearest.p_value)
        return (
            f"{take_best} The smaller ones are worse: the nearest, trial {nearest.number} with "
            f"{_fewer(nearest, best)}, by {numbers}."
        )
    difference = differences[cheapest.number]
    numbers = f"trial {cheapest.number} - trial {best.number} = {difference_in_words(difference, cheapest.p_value)}"
    both = f"trial {cheapest.number} or trial {best.number}"
    than_best = f"{_fewer(cheapest, best)} than trial {best.number}, the best of the search,"
    take = f"Take trial {cheapest.number}: it has {than_best}"
    if difference.seeds == 1:
        return one_seed(both, numbers)
    if difference.high < 0:
        return f"{take} and is better when both are run again ({numbers})."
    if difference.high < margin:
        return f"{take} and is worse by {difference.high:.3f} nats per token at most ({numbers})."
    smaller = f"Trial {cheapest.number} has {_fewer(cheapest, best)}."
    return f"{unclear(both, difference, numbers, margin)} {smaller}"


def _fewer(finalist: Finalist, best: Finalist) -> str:
    times = best.trainable_parameters / max(finalist.trainable_parameters, 1)
    return f"{times:.1f}x fewer trained parameters" if times < 10 else f"{times:,.0f}x fewer trained parameters"


# ---- both


def one_seed(both: str, numbers: str) -> str:
    return (
        f"Cannot tell whether {both} is better ({numbers}): one seed does not show how much results change from "
        "seed to seed; use --seeds 3 or more."
    )


def unclear(both: str, difference: Difference, numbers: str, margin: float) -> str:
    """The interval is too wide to say that either is better, or that they differ by less than the margin."""
    return (
        f"Cannot tell whether {both} is better, to within {margin:g} nats per token ({numbers}). "
        f"{what_would_tell(difference, margin)}"
    )


def what_would_tell(difference: Difference, margin: float) -> str:
    """What would narrow the interval to half the margin on either side, by what most of its width comes from."""
    half_width = (difference.high - difference.low) / 2
    times = (half_width / (margin / 2)) ** 2
    if difference.from_examples > 0.5:
        count = math.ceil(difference.examples * times)
        return f"Most of the uncertainty comes from the examples: about {count:,} that judge would be enough."
    count = max(math.ceil(difference.seeds * times), difference.seeds + 1)
    return f"Most of the uncertainty comes from the seeds: about {count:,} seeds would be enough."


def difference_in_words(difference: Difference, p_value: float | None) -> str:
    p_value = math.nan if p_value is None else p_value
    p = "p below .001" if p_value < 0.001 else f"p = {p_value:.3f}"
    over = f"{difference.seeds} seed{'s' * (difference.seeds > 1)} and {difference.examples} held-out examples"
    interval = f"95% interval {difference.low:+.3f} to {difference.high:+.3f}"
    return f"{difference.value:+.3f} nats per token, {interval}, {p}, {over}"
