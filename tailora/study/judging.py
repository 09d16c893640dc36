"""Which of the trials is the best, which the cheapest that is as good, and how sure that is.

    loss on the choosing half -> best, and cheaper ones within reach -> several seeds each, judging half -> cheapest

The cheapest trains the fewest parameters of those that cannot be told from the best, or are shown to lose less than
the margin.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tailora.errors import ConfigError
from tailora.evaluation.statistics import Difference, Interval, difference_over_seeds, holm, interval_over_seeds
from tailora.study.config import FULL, CompareConfig
from tailora.study.lr_search import Rates
from tailora.study.results import ArmResult, Candidate, Comparison, Finalist
from tailora.study.trial import Places, Trial, halves

# ---- What the numbers of a comparison say, in a sentence; or that they cannot tell, and what would.


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


# ----


REACH = 2.0  # margins: one seed on half of the examples is no exact judge
LEVEL = 0.05  # of p: below it a difference is taken for one


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
    against = {each.number: difference_over_seeds(nats[best.number], nats[each.number], counts) for each in others}
    adjusted = dict(zip(against, holm([each.p_value for each in against.values()]), strict=True))
    judged = [
        Finalist(
            number=each.number,
            settings=each.settings,
            trainable_parameters=each.trainable_parameters or 0,
            choosing_loss=_loss(each),
            eval_loss=(found := interval_over_seeds(nats[each.number], counts)).value,
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


# ---- What the runs of a comparison say: numbers of each arm, differences from the reference, a verdict.


def judged(
    study: CompareConfig,
    rates: Mapping[str, Rates],
    finals: Mapping[str, Sequence[Trial]],
    *,
    notes: list[str],
    settings: dict[str, Any],
    seconds: float,
) -> Comparison:
    """rates, finals: by arm.  Raises ConfigError when no arm could be trained."""
    done = {arm: trials for arm, trials in finals.items() if trials and all(trial.done for trial in trials)}
    why = {arm: _why(rates[arm], finals.get(arm, [])) for arm in study.arms if arm not in done}
    if not done:
        reasons = "; ".join(f"{arm}: {reason}" for arm, reason in why.items())
        raise ConfigError(f"no arm could be trained, so there is nothing to compare: {reasons}")
    reference = next((arm for arm in done if study.method(arm) == FULL), next(iter(done)))
    some = done[reference][0]
    judges = halves(len(some.counts))[1]
    counts = np.array(some.counts)[judges]
    nats = {arm: np.array([trial.sums for trial in trials])[:, judges] for arm, trials in done.items()}
    against = {arm: difference_over_seeds(nats[reference], nats[arm], counts) for arm in done if arm != reference}
    adjusted = dict(zip(against, holm([each.p_value for each in against.values()]), strict=True))
    arms = [
        _result(
            arm,
            study.arms[arm],
            rates[arm],
            done[arm],
            judges,
            interval_over_seeds(nats[arm], counts),
            against.get(arm),
        )
        if arm in done
        else ArmResult(arm, study.arms[arm], why[arm], rates=rates[arm].tried)
        for arm in study.arms
    ]
    standings = [
        Standing(arm.name, arm.trainable_parameters or 0, against.get(arm.name), adjusted.get(arm.name), arm.bracketed)
        for arm in arms
        if arm.name in done
    ]
    said, about = verdict(standings, reference, study.margin, why)
    return Comparison(
        arms=arms,
        reference=reference,
        base_loss=float(np.array(some.before)[judges].sum() / counts.sum()),
        steps=some.numbers["steps"],
        seeds=[trial.numbers["seed"] for trial in done[reference]],
        judged_examples=len(judges),
        verdict=said,
        p_value=adjusted.get(about) if about else None,
        p_values=adjusted,
        notes=notes,
        settings=settings,
        seconds=seconds,
    )


def _why(rates: Rates, trials: Sequence[Trial]) -> str:
    failed = next((trial for trial in trials if not trial.done), None)
    if failed is not None:
        return f"{failed.outcome} at its best rate with another seed"
    if not rates.fits:
        return "ran out of memory"
    return f"failed at every rate tried, {', '.join(f'{rate:.2g}' for rate in rates.tried)}"


def _result(
    arm: str,
    changes: dict[str, Any],
    rates: Rates,
    trials: Sequence[Trial],
    judges: Places,
    loss: Interval,
    against: Difference | None,
) -> ArmResult:
    forgotten = [trial.forgetting for trial in trials if trial.forgetting is not None]
    return ArmResult(
        name=arm,
        changes=changes,
        outcome="done",
        learning_rate=rates.best,
        rates=rates.tried,
        bracketed=rates.bracketed,
        eval_loss=loss.value,
        interval=(loss.low, loss.high),
        difference=None if against is None else asdict(against),
        seconds=float(np.mean([each.numbers["train_tokens"] / each.numbers["tokens_per_second"] for each in trials])),
        peak_memory_bytes=max(trial.numbers["peak_memory_bytes"] for trial in trials),
        trainable_parameters=trials[0].numbers["trainable_parameters"],
        bytes=trials[0].bytes,
        forgetting=_mean(forgotten),
        seed_losses=[trial.loss(judges) for trial in trials],
        train_losses=[trial.losses for trial in trials],
        runs=[trial.numbers["output_dir"] for trial in trials],
    )


def _mean(forgotten: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """Over the seeds; None where it was not measured, or a model is so broken that it is no number."""
    if not forgotten:
        return None
    means = {key: float(np.mean([each[key] for each in forgotten])) for key in forgotten[0]}
    return means if all(map(math.isfinite, means.values())) else None
