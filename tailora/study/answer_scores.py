"""The scores of a trial's answers, by which `compare` and `search` choose settings and evaluate runs, with --metric.

half of the held-out prompts -> greedy answers (train/answers.py) -> AnswerScores, of one run
AnswerScores of several runs -> GroupedScores, which comparison_verdict.py compares
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tailora.data.dataset import Int64
from tailora.errors import ConfigError, DataError
from tailora.train.config import TrainConfig
from tailora.train.significance import MOST_MISSING, Floats

if TYPE_CHECKING:  # it loads torch
    from tailora.train.events import TrainResult

Scores = list[float | None]  # of each answer; None: the metric gave it none


@dataclass(frozen=True)
class AnswerScores:
    """tuned, base: by metric, the deciding one first. clusters: the same number for prompts that are alike."""

    tuned: dict[str, Scores]
    higher_is_better: dict[str, bool]  # by metric
    clusters: list[int]
    base: dict[str, Scores] = field(default_factory=dict)  # {} if the base did not answer

    @property
    def metric(self) -> str:
        """The metric that decides."""
        return next(iter(self.tuned))

    @property
    def mean(self) -> float:
        """By the metric that decides, of the answers that have a score."""
        return float(np.nanmean(as_array(self.tuned[self.metric])))


def as_array(scores: Sequence[float | None]) -> Floats:
    """Returns (answers,), NaN where there is no score."""
    return np.array(scores, dtype=np.float64)


@dataclass(frozen=True, eq=False)
class GroupedScores:
    """Scores of the answers to the same prompts, summed over groups of prompts that are alike."""

    sums: dict[Any, Floats]  # by name of the runs, (seeds, groups)
    counts: Floats  # answers of a run, (groups,)
    missing: float  # share of the prompts left out, because an answer of any run has no score
    is_constant: bool

    @classmethod
    def of(cls, runs: Mapping[Any, Sequence[AnswerScores]], metric: str) -> "GroupedScores":
        """Raises ConfigError if fewer than two groups have scores in all runs."""
        scores = {name: np.array([as_array(own.tuned[metric]) for own in of]) for name, of in runs.items()}
        values = np.concatenate([*scores.values()])  # (runs, prompts)
        known = ~np.isnan(values).any(0)
        clusters = np.array(next(iter(runs.values()))[0].clusters)[known]
        groups, owners = np.unique(clusters, return_inverse=True)
        if len(groups) < 2:
            raise ConfigError(
                f"only {len(groups)} of the held-out prompts that are not alike have a score by {metric} in all runs; "
                "use more held-out rows, or check the function"
            )
        sums = {
            name: np.array([np.bincount(owners, weights=row[known]) for row in rows]) for name, rows in scores.items()
        }
        is_constant = bool(np.ptp(values[:, known]) == 0)
        return cls(sums, np.bincount(owners).astype(np.float64), 1 - float(known.mean()), is_constant)

    def problem(self, metric: str) -> str:
        """Returns why the scores cannot compare the runs, or ""."""
        if self.missing > MOST_MISSING:
            return f"Cannot tell: {self.missing:.0%} of the prompts have an answer without a score by {metric}."
        if self.is_constant:
            value = next(iter(self.sums.values()))[0].sum() / self.counts.sum()
            every = f"every answer of every run got {value:g} from {metric}"
            return f"Cannot tell: {every}; does the metric read the column `answer`?"
        return ""


def scores_of_answers(result: "TrainResult", config: TrainConfig, examples: Int64, *, base: bool) -> AnswerScores:
    """Answers a fixed sample of the held-out prompts with these indices, and for `base` by the base model as well.

    With a sharded model, all ranks must call it.
    Raises RewardError; ConfigError without a prompt to answer; DataError if no answer has a score.
    """
    from tailora.train.answers import MOST_SCORED, compare_answers, held_out_questions, score_answers  # load torch
    from tailora.train.rewards import parse_rewards

    assert result.data is not None  # see `check_metrics` in train/answers.py
    number = MOST_SCORED if config.metric_examples is None else config.metric_examples
    questions = held_out_questions(result.model, result.tokenizer, result.data, number, examples)
    if not questions:
        flags = f"--metric {', '.join(config.metric)}"
        raise ConfigError(f"{flags}: every held-out prompt fills the model's context; use shorter prompts")
    limit = config.max_completion_length
    answers = compare_answers(result.model, result.tokenizer, questions, max_new_tokens=limit, base=base)
    metrics = parse_rewards([], config.metric)[1]
    answers, higher_is_better = score_answers(answers, questions, metrics, config.reward_seconds)
    sides = [[a.after for a in answers], [a.before for a in answers]]
    tuned, of_base = (
        {name: [None if facts is None else facts.scores.get(name) for facts in side] for name in higher_is_better}
        for side in sides
    )
    if all(score is None for score in tuned[metrics[0].name]):
        raise DataError(f"{metrics[0].name} is None for all answers; check the function")
    return AnswerScores(tuned, higher_is_better, [a.cluster for a in answers], of_base if base else {})
