"""Which of the trials is the best, which the cheapest that is as good, and how sure that is.

    loss on the choosing half -> best, and cheaper ones within reach -> several seeds each, judging half -> cheapest

The cheapest trains the fewest parameters of those that cannot be told from the best, or are shown to lose less than
the margin.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from tailora.evaluation.statistics import Difference, difference, holm, loss_interval
from tailora.study.halves import halves
from tailora.study.trial import Trial
from tailora.study.verdict import needed

REACH = 2.0  # margins: one seed on half of the examples is no exact judge
LEVEL = 0.05  # of p: below it a difference is taken for one


@dataclass(frozen=True)
class Candidate:
    """One trial of a search."""

    number: int
    state: str  # done, pruned, diverged, out of memory
    settings: dict[str, Any]  # those that were searched
    eval_loss: float | None = None  # nats per token on the choosing half; of a pruned one at its last evaluation
    trainable_parameters: int | None = None
    seconds: float | None = None
    curve: list[tuple[int, float]] = field(default_factory=list)  # step, loss on the choosing half
    message: str = ""  # why it ended early


@dataclass(frozen=True)
class Finalist:
    """A trial that was run again over several seeds, judged on the other half of the held-out examples."""

    number: int
    settings: dict[str, Any]
    trainable_parameters: int
    choosing_loss: float  # of the trial
    eval_loss: float
    interval: tuple[float, float]
    difference: dict[str, Any] | None  # from the best (`evaluation.statistics.Difference`)
    p_value: float | None  # of no difference, adjusted for the number of finalists (Holm)
    seconds: float  # of training, mean over seeds
    peak_memory_bytes: int
    runs: list[str]  # folders


@dataclass(frozen=True)
class Judged:
    finalists: list[Finalist]  # the best first
    cheapest: Finalist
    base_loss: float  # on the judging half
    judged_examples: int
    seeds: list[int]
    verdict: str

    @property
    def best(self) -> Finalist:
        return self.finalists[0]


def finalists(candidates: Sequence[Candidate], margin: float, most: int) -> list[Candidate]:
    """The best, then the cheapest within reach, then the next cheapest that are better than it; at most so many."""
    done = by_loss([each for each in candidates if each.state == "done"])
    if not done:
        return []
    best = done[0]
    front: list[Candidate] = [best]
    for each in done[1:]:  # ever worse, so only those that are cheaper still are worth a look
        if _loss(each) <= _loss(best) + REACH * margin and _cost(each)[0] < _cost(front[-1])[0]:
            front.append(each)
    cheaper = front[:0:-1]
    return [best, *cheaper[: most - 1]]


def by_loss(candidates: Sequence[Candidate]) -> list[Candidate]:
    return sorted(candidates, key=_loss)


def _loss(each: Candidate) -> float:
    return math.inf if each.eval_loss is None else each.eval_loss


def _cost(each: Candidate) -> tuple[int, float]:
    return each.trainable_parameters or 0, each.seconds or 0.0


def judge(chosen: Sequence[Candidate], runs: Mapping[int, Sequence[Trial]], margin: float) -> Judged:
    """chosen: finalists, the best first.    runs: number -> runs, one for each seed, all done and equally many."""
    some = runs[chosen[0].number][0]
    judges = halves(len(some.counts))[1]
    counts = np.array(some.counts)[judges]
    nats = {each.number: np.array([run.sums for run in runs[each.number]])[:, judges] for each in chosen}
    best, *others = chosen
    against = {each.number: difference(nats[best.number], nats[each.number], counts) for each in others}
    adjusted = dict(zip(against, holm([each.p_value for each in against.values()]), strict=True))
    judged = [
        Finalist(
            number=each.number,
            settings=each.settings,
            trainable_parameters=each.trainable_parameters or 0,
            choosing_loss=_loss(each),
            eval_loss=(found := loss_interval(nats[each.number], counts)).value,
            interval=(found.low, found.high),
            difference=asdict(against[each.number]) if each.number in against else None,
            p_value=adjusted.get(each.number),
            seconds=float(np.mean([_training(run) for run in runs[each.number]])),
            peak_memory_bytes=max(run.numbers["peak_memory_bytes"] for run in runs[each.number]),
            runs=[run.numbers["output_dir"] for run in runs[each.number]],
        )
        for each in chosen
    ]
    cheapest = _cheapest(judged, against, margin)
    return Judged(
        finalists=judged,
        cheapest=cheapest,
        base_loss=float(np.array(some.before)[judges].sum() / counts.sum()),
        judged_examples=len(judges),
        seeds=[run.numbers["seed"] for run in runs[best.number]],
        verdict=_verdict(judged, cheapest, against, margin),
    )


def _training(run: Trial) -> float:
    return float(run.numbers["train_tokens"] / run.numbers["tokens_per_second"])


def _cheapest(judged: Sequence[Finalist], against: Mapping[int, Difference], margin: float) -> Finalist:
    good = [each for each in judged if each.number not in against or as_good(against[each.number], each, margin)]
    return min(good, key=lambda each: each.trainable_parameters)


def as_good(found: Difference, each: Finalist, margin: float) -> bool:
    """Shown to be worse by less than the margin, or not to be told from the best."""
    worse = found.value > 0 and each.p_value is not None and each.p_value < LEVEL
    return found.high < margin or not worse


def _verdict(judged: Sequence[Finalist], cheapest: Finalist, against: Mapping[int, Difference], margin: float) -> str:
    best = judged[0]
    low, high = best.interval
    alone = f"Take {_named(best)}: held-out loss {best.eval_loss:.3f} (95% interval {low:.3f} to {high:.3f})."
    if len(judged) == 1:
        return f"{alone} No trial with fewer trained parameters came near it, so it is the cheapest, too."
    if cheapest is best:
        nearest = min(judged[1:], key=lambda each: each.eval_loss)
        apart = _facts(against[nearest.number], nearest)
        return f"{alone} It is worth its size: {_named(nearest)}, {_times(nearest, best)}, is worse: {apart}."
    found = against[cheapest.number]
    facts, named = _facts(found, cheapest), _named(cheapest)
    take = f"Take {named}: {_times(cheapest, best)} than {_named(best)}, the best of the search, and"
    if found.seeds == 1:
        unknown = "how much a seed changes is unknown with one, --seeds 3 or more would tell"
        return f"Cannot tell {named} from {_named(best)}, the best of the search: {facts}; {unknown}."
    if found.high < 0:
        return f"{take} better: {facts}."
    if found.high < margin:
        return f"{take} at most {found.high:.3f} worse: {facts}."
    return (
        f"Cannot tell {named}, {_times(cheapest, best)}, from {_named(best)}, the best of the search, to "
        f"{margin:g}: {facts}. {needed(found, margin)}"
    )


def _named(each: Finalist) -> str:
    return f"trial {each.number}"


def _times(each: Finalist, best: Finalist) -> str:
    times = best.trainable_parameters / max(each.trainable_parameters, 1)
    return f"{times:.1f}x fewer trained parameters" if times < 10 else f"{times:,.0f}x fewer trained parameters"


def _facts(found: Difference, each: Finalist) -> str:
    p_value = each.p_value if each.p_value is not None else math.nan
    p = "p below .001" if p_value < 0.001 else f"p = {p_value:.3f}"
    over = f"{found.seeds} seed{'s' * (found.seeds > 1)} and {found.examples} held-out examples"
    return f"{found.value:+.3f} nats per token, 95% interval {found.low:+.3f} to {found.high:+.3f}, {p}, {over}"
