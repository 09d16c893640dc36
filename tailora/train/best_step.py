"""Which step of a run is kept, and when the run is evaluated.

With `--eval-steps`, each evaluation may be the best so far: by the held-out loss, or by a metric of greedy answers
(`--metric-for-best-model`), where the loss decides between equal scores. With enough held-out examples, one half of
them chooses the step, and the other half evaluates the run.
"""

import math
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from tailora.data.dataset import ENOUGH_TO_HALVE, Int64, selection_half
from tailora.errors import DataError, DivergedError
from tailora.train import events
from tailora.train.answers import MOST_SCORED, Answerer, Progress, best_metric, completion_of, held_out_questions
from tailora.train.config import GRPO, TrainConfig
from tailora.train.loss import Evaluation
from tailora.train.parallel import is_sharded
from tailora.train.rewards import RewardProcess
from tailora.train.sampler import Answer
from tailora.train.setup import Run
from tailora.train.state import Best

CURVE_POINTS = 4  # at least, of the held-out loss, including those before and after training


def choosing_steps(config: TrainConfig, max_steps: int) -> frozenset[int]:
    every = config.eval_steps
    return frozenset({*range(every, max_steps, every), max_steps}) if every else frozenset()


def curve_steps(config: TrainConfig, max_steps: int) -> frozenset[int]:
    """Returns the steps that are evaluated only for the curve, in runs with few other evaluations."""
    points = {0, max_steps, *choosing_steps(config, max_steps)}
    if config.eval_steps == 0 or config.task == GRPO or len(points) >= CURVE_POINTS:  # sampling takes long
        return frozenset()
    return frozenset(round(max_steps * i / (CURVE_POINTS - 1)) for i in range(CURVE_POINTS)) - points


class ChoosingMetric:
    """A metric of greedy answers of the model in training. Its process runs until `stack` is left."""

    def __init__(self, run: Run, examples: Int64, stack: ExitStack) -> None:
        """examples: indices of the held-out examples that choose the step. Raises ConfigError."""
        config, data = run.config, run.data.prepared
        assert data is not None  # `check_metrics` requires held-out rows
        metric = best_metric(config)
        self.name, self.is_together = metric.name, is_sharded(run.model)  # whether ranks answer the same prompts
        number = MOST_SCORED if config.metric_examples is None else config.metric_examples
        self.questions = held_out_questions(run.model, run.tokenizer, data, number, examples)
        prompts = [question.prompt for question in self.questions]
        self._most_tokens = config.max_completion_length
        self._answerer = Answerer(run.model, run.tokenizer, prompts, config.max_completion_length, stack)
        self._process: RewardProcess | None = None  # in the main process
        if run.is_main:
            columns = [*dict.fromkeys(name for question in self.questions for name in question.columns)]
            self._process = stack.enter_context(RewardProcess([metric], config.reward_seconds, columns, run.note))
        directions: list[Any] = [self._process and self._process.higher_is_better[0]]
        self.higher_is_better = bool(broadcast_object_list(directions)[0])
        run.note(f"{metric.source} chooses the step, by {len(self.questions):,} answers at each evaluation")

    def evaluate(self, progress: Progress) -> float:
        """Returns the mean score. All ranks must call it. Raises DataError, RewardError, and DivergedError."""
        state = PartialState()
        first, every = (0, 1) if self.is_together else (state.process_index, state.num_processes)
        own = range(first, len(self.questions), every)
        prompts = [self.questions[number].prompt for number in own]
        answers: list[tuple[int, Answer]] | None = None
        try:
            of_rank = self._answerer.answer(
                prompts, self._most_tokens, progress=lambda done: progress(done, len(prompts))
            )
            answers = list(zip(own, of_rank, strict=True))
        except DivergedError:  # which all ranks must raise
            pass
        gathered = gather_object([answers])
        if any(part is None for part in gathered):
            raise DivergedError("the logits of an answer are not finite")
        scores: list[float] = []
        if self._process is not None:
            texts = [pair for part in (gathered[:1] if self.is_together else gathered) for pair in part]
            completions = [completion_of(self.questions[number], answer.text) for number, answer in texts]
            values = self._process.score(completions)[:, 0]  # (answers,)
            scores = [float(value) for value in values if not np.isnan(value)]
            if not scores:
                raise DataError(f"{self.name} is None for all answers that choose the step; check the function")
        return float(broadcast_object_list([float(np.mean(scores)) if scores else 0.0])[0])


@dataclass(frozen=True, eq=False)
class StepChoice:
    """What chooses the step of a run. examples: indices of the held-out examples that do; None: all of them."""

    examples: Int64 | None
    metric: ChoosingMetric | None
    steps: frozenset[int]  # that may be chosen
    curve: frozenset[int]  # that are only evaluated

    @classmethod
    def of(cls, run: Run, stack: ExitStack, *, is_halved: bool) -> "StepChoice":
        """is_halved: the held-out examples of the run are already one half of all."""
        config, held_out = run.config, run.data.held_out
        steps = [of_run(config, run.data.max_steps) for of_run in (choosing_steps, curve_steps)]
        if is_halved or not config.eval_steps or held_out is None or len(held_out) < ENOUGH_TO_HALVE:
            return cls(None, None, *steps)
        examples = selection_half(len(held_out))
        return cls(examples, ChoosingMetric(run, examples, stack) if config.metric_for_best_model else None, *steps)

    def with_metric(self, evaluation: Evaluation, report: events.Listener) -> Evaluation:
        """Returns the evaluation with the metric that chooses. All ranks must call it."""
        if self.metric is None or not math.isfinite(evaluation.loss):
            return evaluation
        score = self.metric.evaluate(lambda done, total: report(events.EvaluationProgress(done, total, "answers")))
        return replace(evaluation, metric=score)

    def metric_of(self, evaluation: Evaluation) -> dict[str, float]:
        return {} if self.metric is None or evaluation.metric is None else {self.metric.name: evaluation.metric}

    def is_best(self, evaluation: Evaluation, best: Best | None) -> bool:
        """best: the best step so far."""
        return best is None or self._cost(evaluation) < self._cost(best.evaluation)

    def _cost(self, evaluation: Evaluation) -> tuple[float, float]:
        """Returns what is lowest at the best step."""
        sign = -1 if self.metric is not None and self.metric.higher_is_better else 1
        return sign * (evaluation.metric or 0.0), evaluation.loss_of(self.examples)
