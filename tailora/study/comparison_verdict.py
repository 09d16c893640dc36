"""The verdict of a comparison or a search: what the runs show, in numbers and in plain sentences.

    choose_finalists     trials of a search -> those worth repeating
    evaluate_arms        runs of a comparison -> Comparison
    evaluate_finalists   runs of a search -> finalists, the best, the cheapest that is as good
    compare_verdict, search_verdict    the sentences

Everything is measured on the evaluation half of the held-out examples, which had no influence on the settings. A
verdict makes a statement only if the 95% interval of the difference supports it, and otherwise begins with "Cannot
tell". Differences below `margin` do not matter. `measure` is what runs are compared by: a loss, or with --metric the
score of the answers, which both are lower for better runs here (`Measure`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tailora.data.dataset import evaluation_half
from tailora.errors import ConfigError
from tailora.evaluation.statistics import Difference, difference_over_seeds, interval_over_seeds, seeds_needed
from tailora.study.answer_scores import GroupedScores, as_array
from tailora.study.config import FULL, CompareConfig
from tailora.study.learning_rate_search import LearningRateSearch
from tailora.study.results import (
    ArmResult,
    Candidate,
    Comparison,
    Finalist,
    FurtherResult,
    Measure,
    SearchResult,
)
from tailora.study.trial import DONE, Trial
from tailora.train.significance import Floats, Interval

REACH = 2.0  # margins; cheaper trials this close to the best are repeated: one seed on half of the examples is inexact
MOST_SEEDS, MOST_EXAMPLES = 50, 50_000  # the most that a verdict recommends; more is not practical


Compared = tuple[Interval, Difference | None]  # a mean, and its difference from the reference


@dataclass(frozen=True)
class RunStatistics:
    """Results of several sets of runs, by name."""

    objectives: dict[Any, Compared]  # lower is better
    further: dict[str, dict[Any, Compared]]  # accuracies, and with metrics the losses and the scores of the others
    base_objective: float
    examples: int  # with --metric, groups of prompts that are alike
    seeds: list[int]
    measure: Measure
    problem: str = ""  # why nothing can be told, or ""

    def fields(self, name: Any, runs: Sequence[Trial]) -> dict[str, Any]:
        """Returns the fields that ArmResult and Finalist share."""
        objective, difference = self.objectives[name]
        further = {key: of_key[name] for key, of_key in self.further.items()}
        return {
            "eval_loss": objective.value,
            "interval": (objective.low, objective.high),
            "difference": difference,
            "further": {key: FurtherResult(i.value, (i.low, i.high), change) for key, (i, change) in further.items()},
            "seconds": float(np.mean([run.training_seconds for run in runs])),
            "peak_memory_bytes": max(run.numbers["peak_memory_bytes"] for run in runs),
            "runs": [run.numbers["output_dir"] for run in runs],
        }


def run_statistics(
    runs: Mapping[Any, Sequence[Trial]], reference: Any, comparisons: int | None = None
) -> RunStatistics:
    """runs: all done, the same number of seeds for each name.

    comparisons: that intervals are adjusted for; default: all differences from the reference.
    """
    first = runs[reference][0]
    indices = evaluation_half(len(first.counts))
    counts = np.array(first.counts)[indices]
    comparisons = len(runs) - 1 if comparisons is None else comparisons

    def compared(values: Mapping[Any, Floats], counts: Floats) -> dict[Any, Compared]:
        """values: sums by name, (seeds, examples). counts: (examples,)."""
        results: dict[Any, Compared] = {}
        for name, own in values.items():
            difference = None
            if name != reference:
                difference = difference_over_seeds(values[reference], own, counts, comparisons=comparisons)
            results[name] = interval_over_seeds(own, counts), difference
        return results

    def of_examples(attribute: str) -> dict[Any, Compared]:
        """attribute: of a trial, one number per example."""
        sums = {name: np.array([getattr(run, attribute) for run in of])[:, indices] for name, of in runs.items()}
        return compared(sums, counts)

    losses, further = of_examples("sums"), {"accuracy": of_examples("hits")} if first.hits else {}
    statistics = RunStatistics(
        objectives=losses,
        further=further,
        base_objective=float(np.array(first.before)[indices].sum() / counts.sum()),
        examples=len(indices),
        seeds=[run.numbers["seed"] for run in runs[reference]],
        measure=first.measure,
    )
    if first.answers is None:
        return statistics
    answers = {name: [run.answers for run in of if run.answers is not None] for name, of in runs.items()}
    measure, scores = first.measure, {metric: GroupedScores.of(answers, metric) for metric in first.answers.tuned}
    deciding = scores.pop(measure.name)
    negated = {name: measure.sign * sums for name, sums in deciding.sums.items()}
    for metric, grouped in scores.items():
        further[metric] = compared(grouped.sums, grouped.counts)
    return replace(
        statistics,
        objectives=compared(negated, deciding.counts),
        further={"loss": losses, **further},
        base_objective=measure.sign * float(np.nanmean(as_array(first.answers.base[measure.name]))),
        examples=len(deciding.counts),
        problem=deciding.problem(measure.name),
    )


# ---- Comparisons


def evaluate_arms(
    study: CompareConfig,
    rates: Mapping[str, LearningRateSearch],
    runs: Mapping[str, Sequence[Trial]],
    *,
    notes: list[str],
    settings: dict[str, Any],
    seconds: float,
) -> Comparison:
    """rates, runs: by arm.    Raises ConfigError if no arm could be trained."""
    done = {arm: trials for arm, trials in runs.items() if trials and all(trial.done for trial in trials)}
    failures = {arm: _failure(rates[arm], runs.get(arm, [])) for arm in study.arms if arm not in done}
    if not done:
        reasons = "; ".join(f"{arm}: {reason}" for arm, reason in failures.items())
        raise ConfigError(f"nothing to compare, because no variant could be trained: {reasons}")
    reference = next((arm for arm in done if study.method(arm) == FULL), next(iter(done)))
    statistics = run_statistics(done, reference)
    arms = [
        _arm_result(arm, changes, rates[arm], done[arm], statistics)
        if arm in done
        else ArmResult(arm, changes, failures[arm], rates=rates[arm].losses)
        for arm, changes in study.arms.items()
    ]
    verdict, compared = compare_verdict(arms, reference, study.margin, statistics.measure)
    if statistics.problem:
        verdict, compared = statistics.problem, None
    p_values = {arm.name: arm.difference.p_value for arm in arms if arm.difference is not None}
    return Comparison(
        arms=arms,
        reference=reference,
        base_loss=statistics.base_objective,
        steps=done[reference][0].numbers["steps"],
        seeds=statistics.seeds,
        judged_examples=statistics.examples,
        verdict=verdict,
        p_value=p_values.get(compared) if compared else None,
        p_values=p_values,
        notes=notes,
        settings=settings,
        seconds=seconds,
        **_measure_fields(done[reference][0]),
    )


def _measure_fields(trial: Trial) -> dict[str, Any]:
    """Returns the fields that Comparison and SearchResult share."""
    fields: dict[str, Any] = {"loss_unit": trial.loss_unit}
    if trial.answers is None:
        return fields
    metric = trial.answers.metric
    return {**fields, "metric": metric, "higher_is_better": trial.answers.higher_is_better[metric]}


def _arm_result(
    arm: str,
    changes: dict[str, Any],
    search: LearningRateSearch,
    trials: Sequence[Trial],
    statistics: RunStatistics,
) -> ArmResult:
    return ArmResult(
        name=arm,
        changes=changes,
        outcome=DONE,
        learning_rate=search.best,
        rates=search.losses,
        bracketed=search.bracketed,
        trainable_parameters=trials[0].numbers["trainable_parameters"],
        bytes=trials[0].bytes,
        forgetting=_mean([trial.forgetting for trial in trials if trial.forgetting is not None]),
        seed_losses=[trial.objective(evaluation_half(len(trial.counts))) for trial in trials],
        train_losses=[trial.losses for trial in trials],
        **statistics.fields(arm, trials),
    )


def _failure(rates: LearningRateSearch, runs: Sequence[Trial]) -> str:
    """Returns why an arm could not be trained."""
    if failed := [trial.outcome for trial in runs if not trial.done]:
        return f"{failed[0]} at its best learning rate with a different seed"
    if not rates.fits:
        return "ran out of memory"
    return f"failed at every learning rate tried: {', '.join(f'{rate:.2g}' for rate in rates.tried)}"


def _mean(forgetting: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """Returns means over the seeds; None if not measured, or if a broken model made them infinite."""
    if not forgetting:
        return None
    means = {key: float(np.mean([values[key] for values in forgetting])) for key in forgetting[0]}
    return means if all(map(math.isfinite, means.values())) else None


# ---- Searches


def loss_of(candidate: Candidate) -> float:
    return math.inf if candidate.eval_loss is None else candidate.eval_loss


def choose_finalists(candidates: Sequence[Candidate], margin: float, most: int) -> list[Candidate]:
    """Returns at most `most` trials, best first: the best one, and those within REACH margins of it that train fewer
    parameters than every better trial.
    """
    done = sorted((candidate for candidate in candidates if candidate.state == DONE), key=loss_of)
    if not done:
        return []
    best = done[0]
    front = [best]
    for candidate in done[1:]:  # sorted by loss, so only cheaper trials are of interest
        within_reach = loss_of(candidate) <= loss_of(best) + REACH * margin
        if within_reach and (candidate.trainable_parameters or 0) < (front[-1].trainable_parameters or 0):
            front.append(candidate)
    return front[:most]


def evaluate_finalists(
    chosen: Sequence[Candidate],
    runs: Mapping[int, Sequence[Trial]],
    margin: float,
    *,
    trials: list[Candidate],
    **fields: Any,
) -> SearchResult:
    """chosen: the best first.

    runs: number -> its runs, one per seed, all done.
    fields: the other fields of SearchResult.
    """
    statistics = run_statistics({candidate.number: runs[candidate.number] for candidate in chosen}, chosen[0].number)
    finalists = []
    for candidate in chosen:
        fields_of_runs = statistics.fields(candidate.number, runs[candidate.number])
        difference = fields_of_runs["difference"]
        finalists.append(
            Finalist(
                number=candidate.number,
                settings=candidate.settings,
                trainable_parameters=candidate.trainable_parameters or 0,
                choosing_loss=loss_of(candidate),
                p_value=None if difference is None else difference.p_value,
                **fields_of_runs,
            )
        )
    good = [  # the best, and those that are shown to be worse by less than the margin, or better
        finalist for finalist in finalists if finalist.difference is None or finalist.difference.high < margin
    ]
    cheapest = min(good, key=lambda finalist: finalist.trainable_parameters)
    verdict = search_verdict(finalists, cheapest, margin, statistics.measure, trials)
    if statistics.problem:
        verdict, cheapest = statistics.problem, finalists[0]
    return SearchResult(
        best=finalists[0],
        cheapest=cheapest,
        finalists=finalists,
        trials=trials,
        verdict=verdict,
        base_loss=statistics.base_objective,
        seeds=statistics.seeds,
        judged_examples=statistics.examples,
        **_measure_fields(runs[chosen[0].number][0]),
        **fields,
    )


# ---- The sentences of a comparison


def compare_verdict(
    arms: Sequence[ArmResult], reference: str, margin: float, measure: Measure
) -> tuple[str, str | None]:
    """Returns the text, and the name of the arm it describes; None if there is nothing to compare."""
    done = {arm.name: arm for arm in arms if arm.outcome == DONE}
    sentences = [f"{arm.name} {arm.outcome}." for arm in arms if arm.name not in done]
    compared = [(arm, arm.difference) for arm in done.values() if arm.difference is not None]
    if not compared:
        return " ".join([*sentences, "There is nothing to compare."]), None
    safe = [(arm, difference) for arm, difference in compared if difference.high < margin]
    if safe:  # the smallest arm that is worse by less than the margin, or better
        arm, difference = min(safe, key=lambda pair: _parameters(pair[0]))
    else:
        arm, difference = min(compared, key=lambda pair: pair[1].value)
    sentences.append(_difference_verdict(arm, difference, done[reference], margin, measure))
    sentences += [_edge_warning(arm) for arm in done.values() if not arm.bracketed]
    return " ".join(sentences), arm.name


def _edge_warning(arm: ArmResult) -> str:
    """Returns the sentence about an arm whose best learning rate is the lowest or the highest one tried."""
    tried = ", ".join(f"{rate:.2g}" for rate in sorted(arm.rates))
    return (
        f"The best learning rate of {arm.name}, {arm.learning_rate:.2g}, is at the edge of those tried ({tried}); "
        "use a higher --rate-tries."
    )


def _parameters(arm: ArmResult) -> int:
    return arm.trainable_parameters or 0


def _difference_verdict(
    arm: ArmResult, difference: Difference, reference: ArmResult, margin: float, measure: Measure
) -> str:
    numbers = f"{arm.name} - {reference.name} = {format_difference(difference, measure)}"
    both, low, high = f"{arm.name} or {reference.name}", difference.low, difference.high
    if difference.seeds == 1:
        return one_seed(both, numbers)
    smaller, larger = arm, reference
    if _parameters(reference) < _parameters(arm) and high >= 0:
        smaller, larger = reference, arm
    times = _parameters(larger) / _parameters(smaller)
    advice = f"Use {smaller.name}" + (f": it trains {times:,.0f}x fewer parameters." if times >= 1.5 else ".")
    if high < 0:
        finding, could_change = f"{arm.name} is better than {reference.name}", [reference]
    elif low > margin:
        finding, could_change = f"{reference.name} is better than {arm.name}", [arm]
        advice = f"Use {reference.name} if the {measure.better} is worth its cost."
    elif high < margin and low > -margin:
        finding = (
            f"{arm.name} and {reference.name} are equally good: they differ by less than {margin:g} {measure.unit}"
        )
        could_change = [arm, reference]
    elif high < margin:
        finding = f"{arm.name} is at most {high:.3f} {measure.unit} worse than {reference.name}, and may even be better"
        could_change = [reference]
    else:
        return unclear(both, difference, numbers, margin, measure)
    untuned = [arm.name for arm in could_change if not arm.bracketed]
    if untuned:
        names = " and ".join(untuned)
        return (
            f"Cannot tell yet: {names} may do better at a learning rate that was not tried. At the rates tried so "
            f"far, {finding} ({numbers})."
        )
    return f"{finding} ({numbers}). {advice}"


# ---- The sentences of a search


def search_verdict(
    finalists: Sequence[Finalist], cheapest: Finalist, margin: float, measure: Measure, trials: Sequence[Candidate]
) -> str:
    """Returns the text. finalists: the best first."""
    best = finalists[0]
    low, high = sorted(measure.sign * end for end in best.interval)
    value = f"held-out {measure.name} {measure.sign * best.eval_loss:.3f}"
    use_best = f"Use trial {best.number}: {value} (95% interval {low:.3f} to {high:.3f})."
    if len(finalists) == 1:
        return f"{use_best} {_no_smaller_finalist(best, trials, margin)}"
    others = [(finalist, finalist.difference) for finalist in finalists if finalist.difference is not None]
    if cheapest is best:  # the smaller trials are worse, or their intervals are too wide
        others = [pair for pair in others if pair[1].low <= 0] or others
    else:
        others = [pair for pair in others if pair[0] is cheapest]
    compared, difference = min(others, key=lambda pair: pair[0].eval_loss)
    words = format_difference(difference, measure)
    times = best.trainable_parameters / max(compared.trainable_parameters, 1)
    fewer = f"{times:.1f}x fewer trained parameters" if times < 10 else f"{times:,.0f}x fewer trained parameters"
    numbers = f"trial {compared.number} - trial {best.number} = {words}"
    both = f"trial {compared.number} or trial {best.number}"
    if cheapest is best and difference.seeds == 1:
        return f"{use_best} {one_seed(both, numbers)}"
    if cheapest is best and difference.low <= 0:
        return f"{use_best} {unclear(both, difference, numbers, margin, measure)} Trial {compared.number} has {fewer}."
    if cheapest is best:
        return (
            f"{use_best} The smaller trials are worse: the closest, trial {compared.number} with {fewer}, differs by "
            f"{words}."
        )
    use = f"Use trial {cheapest.number}: it has {fewer} than trial {best.number}, the best of the search,"
    if difference.seeds == 1:
        return one_seed(both, numbers)
    if difference.high < 0:
        return f"{use} and did better when both were repeated ({numbers})."
    return f"{use} and is at most {difference.high:.3f} {measure.unit} worse ({numbers})."


def _no_smaller_finalist(best: Finalist, trials: Sequence[Candidate], margin: float) -> str:
    """Returns why the best is the only finalist. Trials that ended early were not compared at full length."""
    smaller = [trial for trial in trials if 0 < (trial.trainable_parameters or 0) < best.trainable_parameters]
    early = [trial for trial in smaller if trial.state != DONE]
    within_reach = best.choosing_loss + REACH * margin
    if near := [trial for trial in smaller if trial.state == DONE and loss_of(trial) <= within_reach]:
        close = f"trial {near[0].number} came close with fewer trained parameters, but has no final runs"
        return f"It may not be the cheapest: {close} (see the notes and --finalists)."
    if smaller and len(early) == len(smaller):
        ends = "; ".join(f"trial {trial.number} {trial.state}" for trial in early)
        return f"All trials with fewer trained parameters ended early, so none was compared at full length ({ends})."
    some = f" ({len(early)} of {len(smaller)} ended early)" if early else ""
    return f"No trial with fewer trained parameters came close{some}, so it is also the cheapest."


# ---- Sentences shared by both


def one_seed(both: str, numbers: str) -> str:
    return (
        f"Cannot tell whether {both} is better ({numbers}): one seed does not show how much results vary from seed "
        "to seed. Use --seeds 3 or more."
    )


def unclear(both: str, difference: Difference, numbers: str, margin: float, measure: Measure) -> str:
    """Returns the text for an interval that neither shows which is better nor lies within the margin."""
    return (
        f"Cannot tell whether {both} is better: the 95% interval is too wide for a margin of {margin:g} {measure.unit} "
        f"({numbers}). {sample_size_advice(difference, margin)}"
    )


def sample_size_advice(difference: Difference, margin: float) -> str:
    """Returns how many examples or seeds would narrow the interval to half the margin on either side."""
    count: int | None
    if difference.from_examples > 0.5:
        times = ((difference.high - difference.low) / margin) ** 2
        source, unit, count = "examples", "evaluation examples", math.ceil(difference.examples * times)
        count, remedy = count if count <= MOST_EXAMPLES else None, "try longer runs or a larger --margin"
    else:
        source, unit, count = "seeds", "seeds", seeds_needed(difference, margin / 2, MOST_SEEDS)
        remedy = "use longer runs or more held-out examples (--eval-data or --validation-split)"
    begin = f"Most of the uncertainty comes from the {source}"
    if count is None:
        return f"{begin}, and no practical number of {unit} would be enough; {remedy}."
    return f"{begin}: about {count:,} {unit} would be enough."


def format_difference(difference: Difference, measure: Measure) -> str:
    difference = measure.difference(difference)
    p = "p below .001" if difference.p_value < 0.001 else f"p = {difference.p_value:.3f}"
    if difference.comparisons > 1:
        p += f", both adjusted for {difference.comparisons} comparisons"
    over = f"{difference.seeds} seed{'s' * (difference.seeds > 1)} and {difference.examples} held-out examples"
    interval = f"95% interval {difference.low:+.3f} to {difference.high:+.3f}"
    return f"{difference.value:+.3f} {measure.unit}, {interval}, {p}, {over}"
