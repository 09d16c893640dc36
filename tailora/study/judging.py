"""Judges runs on the half of the held-out examples that chose nothing: losses, differences, and how sure they are.

    choose_finalists     trials of a search -> those worth running again
    judge_arms           runs of a comparison -> Comparison
    judge_finalists      runs of a search -> finalists, the best, the cheapest that is as good
      _judge               what both have: losses with intervals, differences from a reference, adjusted p values

`study/verdict.py` puts the result into words.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from tailora.errors import ConfigError
from tailora.evaluation.statistics import Difference, Interval, difference_over_seeds, holm, interval_over_seeds
from tailora.study.config import FULL, CompareConfig
from tailora.study.lr_search import LearningRateSearch
from tailora.study.results import ArmResult, Candidate, Comparison, Finalist
from tailora.study.trial import DONE, Trial, judging_half
from tailora.study.verdict import ArmStanding, compare_verdict, search_verdict

REACH = 2.0  # margins within which a cheaper trial is run again: one seed on half of the examples is inexact
LEVEL = 0.05  # of p: below it a difference is taken for real

Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class _Judgement(Generic[Name]):
    """Of several sets of runs, by name. differences, p_values: of all but the reference."""

    losses: dict[Name, Interval]
    differences: dict[Name, Difference]
    p_values: dict[Name, float]
    base_loss: float
    examples: int
    seeds: list[int]


def _judge(runs: Mapping[Name, Sequence[Trial]], reference: Name) -> _Judgement[Name]:
    """runs: of equally many seeds, all done."""
    some = runs[reference][0]
    indices = judging_half(len(some.counts))
    counts = np.array(some.counts)[indices]
    nats = {name: np.array([run.sums for run in own])[:, indices] for name, own in runs.items()}  # (seeds, examples)
    differences = {
        name: difference_over_seeds(nats[reference], nats[name], counts) for name in runs if name != reference
    }
    adjusted = holm([apart.p_value for apart in differences.values()])
    return _Judgement(
        losses={name: interval_over_seeds(values, counts) for name, values in nats.items()},
        differences=differences,
        p_values=dict(zip(differences, adjusted, strict=True)),
        base_loss=float(np.array(some.before)[indices].sum() / counts.sum()),
        examples=len(indices),
        seeds=[run.numbers["seed"] for run in runs[reference]],
    )


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
    failures = {arm: _failure(rates[arm], runs.get(arm, [])) for arm in study.arms if arm not in done}
    if not done:
        reasons = "; ".join(f"{arm}: {reason}" for arm, reason in failures.items())
        raise ConfigError(f"no arm could be trained, so there is nothing to compare: {reasons}")
    reference = next((arm for arm in done if study.method(arm) == FULL), next(iter(done)))
    judgement = _judge(done, reference)
    arms = [
        _arm_result(arm, changes, rates[arm], done[arm], judgement)
        if arm in done
        else ArmResult(arm, changes, failures[arm], rates=rates[arm].losses)
        for arm, changes in study.arms.items()
    ]
    standings = [
        ArmStanding(
            arm.name,
            arm.trainable_parameters or 0,
            judgement.differences.get(arm.name),
            judgement.p_values.get(arm.name),
            arm.bracketed,
        )
        for arm in arms
        if arm.name in done
    ]
    verdict, arm = compare_verdict(standings, reference, study.margin, failures)
    return Comparison(
        arms=arms,
        reference=reference,
        base_loss=judgement.base_loss,
        steps=done[reference][0].numbers["steps"],
        seeds=judgement.seeds,
        judged_examples=judgement.examples,
        verdict=verdict,
        p_value=judgement.p_values.get(arm) if arm else None,
        p_values=judgement.p_values,
        notes=notes,
        settings=settings,
        seconds=seconds,
    )


def _failure(rates: LearningRateSearch, trials: Sequence[Trial]) -> str:
    failed = next((trial for trial in trials if not trial.done), None)
    if failed is not None:
        return f"{failed.outcome} at its best rate with another seed"
    if not rates.fits:
        return "ran out of memory"
    return f"failed at every rate tried, {', '.join(f'{rate:.2g}' for rate in rates.tried)}"


def _arm_result(
    arm: str,
    changes: dict[str, Any],
    rates: LearningRateSearch,
    trials: Sequence[Trial],
    judgement: _Judgement[str],
) -> ArmResult:
    loss = judgement.losses[arm]
    return ArmResult(
        name=arm,
        changes=changes,
        outcome=DONE,
        learning_rate=rates.best,
        rates=rates.losses,
        bracketed=rates.bracketed,
        eval_loss=loss.value,
        interval=(loss.low, loss.high),
        difference=judgement.differences.get(arm),
        seconds=float(np.mean([trial.training_seconds for trial in trials])),
        peak_memory_bytes=max(trial.numbers["peak_memory_bytes"] for trial in trials),
        trainable_parameters=trials[0].numbers["trainable_parameters"],
        bytes=trials[0].bytes,
        forgetting=_mean([trial.forgetting for trial in trials if trial.forgetting is not None]),
        seed_losses=[trial.loss(judging_half(len(trial.counts))) for trial in trials],
        train_losses=[trial.losses for trial in trials],
        runs=[trial.numbers["output_dir"] for trial in trials],
    )


def _mean(forgetting: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """Over the seeds; None where it was not measured, or is not finite since the model is broken."""
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
    """The best trial, then the cheapest within REACH margins of it, then the next cheapest that are better than that
    one; `most` at most.
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
    cheaper = front[:0:-1]
    return [best, *cheaper[: most - 1]]


@dataclass(frozen=True)
class JudgedFinalists:
    """finalists: the best first.    base_loss: on the judging half."""

    finalists: list[Finalist]
    cheapest: Finalist
    base_loss: float
    judged_examples: int
    seeds: list[int]
    verdict: str

    @property
    def best(self) -> Finalist:
        return self.finalists[0]


def judge_finalists(chosen: Sequence[Candidate], runs: Mapping[int, Sequence[Trial]], margin: float) -> JudgedFinalists:
    """chosen: the best first.    runs: number -> runs, one for each seed, all done and equally many."""
    judgement = _judge({candidate.number: runs[candidate.number] for candidate in chosen}, chosen[0].number)
    finalists = [_finalist(candidate, runs[candidate.number], judgement) for candidate in chosen]
    good = [
        finalist
        for finalist in finalists
        if finalist is finalists[0] or _as_good(judgement.differences[finalist.number], finalist, margin)
    ]
    cheapest = min(good, key=lambda finalist: finalist.trainable_parameters)
    return JudgedFinalists(
        finalists=finalists,
        cheapest=cheapest,
        base_loss=judgement.base_loss,
        judged_examples=judgement.examples,
        seeds=judgement.seeds,
        verdict=search_verdict(finalists, cheapest, judgement.differences, margin),
    )


def _finalist(candidate: Candidate, runs: Sequence[Trial], judgement: _Judgement[int]) -> Finalist:
    loss = judgement.losses[candidate.number]
    return Finalist(
        number=candidate.number,
        settings=candidate.settings,
        trainable_parameters=candidate.trainable_parameters or 0,
        choosing_loss=_loss(candidate),
        eval_loss=loss.value,
        interval=(loss.low, loss.high),
        difference=judgement.differences.get(candidate.number),
        p_value=judgement.p_values.get(candidate.number),
        seconds=float(np.mean([run.training_seconds for run in runs])),
        peak_memory_bytes=max(run.numbers["peak_memory_bytes"] for run in runs),
        runs=[run.numbers["output_dir"] for run in runs],
    )


def _as_good(apart: Difference, finalist: Finalist, margin: float) -> bool:
    """True if it is shown to be worse by less than the margin, or is not shown to be worse than the best."""
    is_worse = apart.value > 0 and finalist.p_value is not None and finalist.p_value < LEVEL
    return apart.high < margin or not is_worse
