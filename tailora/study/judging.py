"""Judges runs on the half of the held-out examples that chose no settings: losses, differences, and their intervals.

    choose_finalists     trials of a search -> those worth running again
    judge_arms           runs of a comparison -> Comparison
    judge_finalists      runs of a search -> finalists, the best, the cheapest that is as good
      _judge               used by both: losses with intervals, differences from a reference, adjusted p values

`study/verdict.py` puts the result into words.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tailora.errors import ConfigError
from tailora.evaluation.statistics import Difference, Interval, difference_over_seeds, holm, interval_over_seeds
from tailora.study.config import FULL, CompareConfig
from tailora.study.lr_search import LearningRateSearch
from tailora.study.results import ArmResult, Candidate, Comparison, Finalist, SearchResult
from tailora.study.trial import DONE, Trial, judging_half
from tailora.study.verdict import compare_verdict, search_verdict

REACH = 2.0  # a cheaper trial within so many margins is run again, since one seed on half of the examples is inexact
LEVEL = 0.05  # p-value below which a difference counts as real


@dataclass(frozen=True)
class _Judgement:
    """Results of several sets of runs, by name. differences, p_values: of all but the reference."""

    losses: dict[Any, Interval]
    differences: dict[Any, Difference]
    p_values: dict[Any, float]
    base_loss: float
    examples: int
    seeds: list[int]
    unit: str
    accuracies: dict[Any, dict[str, Any]]  # name -> fields of ArmResult; {} for tasks without predictions

    def fields(self, name: Any, runs: Sequence[Trial]) -> dict[str, Any]:
        """Returns the fields that ArmResult and Finalist share."""
        loss = self.losses[name]
        return {
            "eval_loss": loss.value,
            "interval": (loss.low, loss.high),
            "difference": self.differences.get(name),
            "seconds": float(np.mean([run.training_seconds for run in runs])),
            "peak_memory_bytes": max(run.numbers["peak_memory_bytes"] for run in runs),
            "runs": [run.numbers["output_dir"] for run in runs],
        }


def _judge(runs: Mapping[Any, Sequence[Trial]], reference: Any) -> _Judgement:
    """runs: of equally many seeds, all done."""
    first = runs[reference][0]
    indices = judging_half(len(first.counts))
    counts = np.array(first.counts)[indices]
    sums = {
        name: np.array([run.sums for run in trials])[:, indices] for name, trials in runs.items()
    }  # (seeds, examples)
    differences = {
        name: difference_over_seeds(sums[reference], sums[name], counts) for name in runs if name != reference
    }
    adjusted = holm([difference.p_value for difference in differences.values()])
    return _Judgement(
        losses={name: interval_over_seeds(values, counts) for name, values in sums.items()},
        differences=differences,
        p_values=dict(zip(differences, adjusted, strict=True)),
        base_loss=float(np.array(first.before)[indices].sum() / counts.sum()),
        examples=len(indices),
        seeds=[run.numbers["seed"] for run in runs[reference]],
        unit=first.loss_unit,
        accuracies=_accuracies(runs, reference, indices, counts) if first.hits else {},
    )


def _accuracies(
    runs: Mapping[Any, Sequence[Trial]], reference: Any, indices: Any, counts: Any
) -> dict[Any, dict[str, Any]]:
    """Returns, by name, the fields of ArmResult about the accuracy on the judging examples."""
    hits = {name: np.array([run.hits for run in trials])[:, indices] for name, trials in runs.items()}
    fields = {}
    for name, values in hits.items():
        accuracy = interval_over_seeds(values, counts)
        difference = None if name == reference else difference_over_seeds(hits[reference], values, counts)
        fields[name] = {
            "accuracy": accuracy.value,
            "accuracy_interval": (accuracy.low, accuracy.high),
            "accuracy_difference": difference,
        }
    return fields


# ---- compare


def judge_arms(
    study: CompareConfig,
    rates: Mapping[str, LearningRateSearch],
    runs: Mapping[str, Sequence[Trial]],
    *,
    notes: list[str],
    settings: dict[str, Any],
    seconds: float,
) -> Comparison:
    """rates, runs: by arm.    Raises ConfigError when no arm could be trained."""
    done = {arm: trials for arm, trials in runs.items() if trials and all(trial.done for trial in trials)}
    failures = {}
    for arm in study.arms:
        if arm in done:
            continue
        failed = next((trial for trial in runs.get(arm, []) if not trial.done), None)
        if failed is not None:
            failures[arm] = f"{failed.outcome} at its best rate with another seed"
        elif not rates[arm].fits:
            failures[arm] = "ran out of memory"
        else:
            failures[arm] = f"failed at every rate tried, {', '.join(f'{rate:.2g}' for rate in rates[arm].tried)}"
    if not done:
        reasons = "; ".join(f"{arm}: {reason}" for arm, reason in failures.items())
        raise ConfigError(f"no arm could be trained, so there is nothing to compare: {reasons}")
    reference = next((arm for arm in done if study.method(arm) == FULL), next(iter(done)))
    judgement = _judge(done, reference)
    arms = []
    for arm, changes in study.arms.items():
        search, trials = rates[arm], done.get(arm)
        if trials is None:
            arms.append(ArmResult(arm, changes, failures[arm], rates=search.losses))
            continue
        arms.append(
            ArmResult(
                name=arm,
                changes=changes,
                outcome=DONE,
                learning_rate=search.best,
                rates=search.losses,
                bracketed=search.bracketed,
                trainable_parameters=trials[0].numbers["trainable_parameters"],
                bytes=trials[0].bytes,
                forgetting=_mean([trial.forgetting for trial in trials if trial.forgetting is not None]),
                seed_losses=[trial.loss(judging_half(len(trial.counts))) for trial in trials],
                train_losses=[trial.losses for trial in trials],
                **judgement.fields(arm, trials),
                **judgement.accuracies.get(arm, {}),
            )
        )
    cut_short = [arm for arm, search in rates.items() if search.next_rate() is not None]
    verdict, compared = compare_verdict(
        arms, judgement.p_values, reference, study.margin, judgement.unit, cut_short=cut_short
    )
    return Comparison(
        arms=arms,
        reference=reference,
        base_loss=judgement.base_loss,
        steps=done[reference][0].numbers["steps"],
        seeds=judgement.seeds,
        judged_examples=judgement.examples,
        verdict=verdict,
        p_value=judgement.p_values.get(compared) if compared else None,
        p_values=judgement.p_values,
        notes=notes,
        settings=settings,
        seconds=seconds,
        loss_unit=judgement.unit,
    )


def _mean(forgetting: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """Returns means over the seeds; None if it was not measured, or is not finite because the model is broken."""
    if not forgetting:
        return None
    means = {key: float(np.mean([values[key] for values in forgetting])) for key in forgetting[0]}
    return means if all(map(math.isfinite, means.values())) else None


# ---- search


def by_loss(candidates: Sequence[Candidate]) -> list[Candidate]:
    return sorted(candidates, key=_loss)


def _loss(candidate: Candidate) -> float:
    return math.inf if candidate.eval_loss is None else candidate.eval_loss


def choose_finalists(candidates: Sequence[Candidate], margin: float, most: int) -> list[Candidate]:
    """Returns the best trial, then those within REACH margins of it that train fewer parameters than every better one.

    The best stand first; `most` at most.
    """
    done = by_loss([candidate for candidate in candidates if candidate.state == DONE])
    if not done:
        return []
    best = done[0]
    front = [best]
    for candidate in done[1:]:  # each is worse than those before it, so only a cheaper one is worth a look
        within_reach = _loss(candidate) <= _loss(best) + REACH * margin
        if within_reach and (candidate.trainable_parameters or 0) < (front[-1].trainable_parameters or 0):
            front.append(candidate)
    return front[:most]


def judge_finalists(
    chosen: Sequence[Candidate],
    runs: Mapping[int, Sequence[Trial]],
    margin: float,
    *,
    trials: list[Candidate],
    steps: int,
    **fields: Any,
) -> SearchResult:
    """chosen: the best first.    runs: number -> runs, one for each seed, all done and equally many.
    trials: all of the search.    steps: of a whole trial.    fields: other fields of SearchResult
    that are known without judging.
    """
    judgement = _judge({candidate.number: runs[candidate.number] for candidate in chosen}, chosen[0].number)
    finalists = [
        Finalist(
            number=candidate.number,
            settings=candidate.settings,
            trainable_parameters=candidate.trainable_parameters or 0,
            choosing_loss=_loss(candidate),
            p_value=judgement.p_values.get(candidate.number),
            **judgement.fields(candidate.number, runs[candidate.number]),
        )
        for candidate in chosen
    ]
    good = [finalists[0]]
    for finalist in finalists[1:]:
        difference = judgement.differences[finalist.number]
        is_worse = difference.value > 0 and judgement.p_values[finalist.number] < LEVEL
        if difference.high < margin or not is_worse:  # worse by less than the margin, or not shown to be worse
            good.append(finalist)
    cheapest = min(good, key=lambda finalist: finalist.trainable_parameters)
    return SearchResult(
        best=finalists[0],
        cheapest=cheapest,
        finalists=finalists,
        trials=trials,
        steps=steps,
        verdict=search_verdict(finalists, cheapest, margin, judgement.unit, trials, steps),
        loss_unit=judgement.unit,
        base_loss=judgement.base_loss,
        seeds=judgement.seeds,
        judged_examples=judgement.examples,
        **fields,
    )
