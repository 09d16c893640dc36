"""Samples completions from the model in training, scores them, and turns them into optimizer steps.

    prompts of a step -> completions: the engine of `tailora serve` runs the model with its adapter, unmerged
                      -> rewards, in a separate process
                      -> advantages -> examples of `train.grpo`

What is sampled depends only on the weights, the seed and the number of the step, so a run can be resumed.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import PretrainedConfig

from tailora.core.attach import evaluating
from tailora.data.dataset import Example, Examples
from tailora.data.prepare import PreparedData
from tailora.engine.continuous_batching import cache_bytes
from tailora.errors import DataError
from tailora.kernels.loss import FORMS
from tailora.train import grpo, run_log
from tailora.train.config import TrainConfig
from tailora.train.grpo import GRPO, Rewards, group_means, mean_and_error, with_target
from tailora.train.loss import BatchLayout, Evaluation, make_batch
from tailora.train.rewards import Reward, RewardProcess
from tailora.train.sampler import Sample, Sampler
from tailora.train.step import Step, StepShape, split_by_tokens
from tailora.train.trainable import FullModel, Trainable

MOST_REQUESTS = 64  # completions that are sampled at once
# What the run log shows: the same held-out prompts at each evaluation, and the largest group of at most SHOWN_STEPS
# steps. Of these, the page shows the largest in each part of the run.
SHOWN_PROMPTS, SHOWN_STEPS, PARTS = 4, 200, 8


@dataclass(frozen=True)
class Scored:
    """The completions of a step, of all ranks.

    scores: (completions, rewards and judges), NaN: None.    lengths, truncated: (completions,).
    """

    scores: npt.NDArray[np.float64]
    lengths: npt.NDArray[np.int64]
    truncated: npt.NDArray[np.bool_]

    @classmethod
    def gathered(cls, samples: Sequence[Sample], scores: npt.NDArray[np.float64]) -> "Scored":
        lengths, truncated = [len(sample.ids) for sample in samples], [sample.is_truncated for sample in samples]
        of_ranks = gather_object([(scores, np.array(lengths), np.array(truncated))])
        return cls(*map(np.concatenate, zip(*of_ranks, strict=True)))


class Rollouts:
    """The prompts of a run, the completions of its steps, and their rewards.

    rewards: whose weighted sum is the reward.    judges: that only judge held-out completions.
    """

    sampler: Sampler  # this and the rest: from `connect` on
    model: Trainable
    layout: BatchLayout
    note: Callable[[str], None]
    _scorer: RewardProcess

    def __init__(
        self,
        config: TrainConfig,
        data: PreparedData,
        rewards: Sequence[Reward],
        judges: Sequence[Reward],
        shape: StepShape,
        max_steps: int,
    ) -> None:
        self.config, self.prompts, self.held_out = config, data.prompts, data.eval_samples
        self.train = data.train
        self.rewards, self.judges = list(rewards), list(judges)
        self.shape, self.max_steps = shape, max_steps
        self.weights = np.array([reward.weight for reward in rewards])
        self.task = GRPO(
            config.loss or "grpo",
            config.beta or 0.0,
            config.epsilon,
            config.epsilon_high or config.epsilon,
            config.temperature,
            config.max_completion_length,
            score_names=self.score_names,
        )
        self._step: list[Example] = []  # of this rank, which later iterations use again
        self._metrics: dict[str, float] = {}
        self._started = 0.0
        self._has_noted_unscored = False

    def connect(
        self, model: Trainable, tokenizer: Any, layout: BatchLayout, note: Callable[[str], None], stack: ExitStack
    ) -> None:
        """Starts the engine and the process of the rewards, until `stack` is left."""
        self.model, self.layout, self.note = model, layout, note
        if isinstance(model, FullModel):
            note("without an adapter, KL from the base is not measured on held-out completions: it needs both models")
        self.sampler = Sampler(self.config, model, tokenizer, self.longest, self.sampled_at_once, note)
        stack.callback(self.sampler.stop)
        self.task.drift.limit, self.task.drift.warn = grpo.DRIFT_LIMITS.get(self.sampler.base.dtype, math.inf), note
        self._scorer = stack.enter_context(RewardProcess(self.rewards + self.judges, self.config.reward_seconds))

    def score(self, samples: Sequence[Sample]) -> npt.NDArray[np.float64]:
        """Returns (samples, rewards and judges). Raises RewardError."""
        return self._scorer.score([sample.for_rewards() for sample in samples])

    def total(self, scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Returns the weighted sum of the rewards, (samples,); NaN if no reward is known."""
        own = scores[:, : len(self.rewards)]
        total = np.nansum(own * self.weights, axis=1)
        totals: npt.NDArray[np.float64] = np.where(np.isnan(own).all(1), np.nan, total)
        return totals

    # ---- Training

    def steps(self, start: int = 0) -> Iterator[Step]:
        """Yields the steps from number `start` on. Each is sampled when it is asked for."""
        for number in count(start):
            if number % self.config.num_iterations == 0 or not self._step:
                self._step, self._metrics = self._sampled_step(number // self.config.num_iterations)
            self.task.drift.is_measured = number % self.config.num_iterations == 0
            yield self._as_step(self._step)

    def prompts_of(self, number: int) -> list[int]:
        """Returns the indices of the prompts of a generation, of all ranks."""
        size, total, seed = self.shape.examples_per_step, self.train.epoch_size, self.config.seed
        indices: list[int] = []
        first = number * size
        while len(indices) < size:
            epoch, position = divmod(first + len(indices), total)
            order = np.random.default_rng([seed, epoch]).permutation(self.train.epoch(epoch, seed))
            indices += order[position : position + size - len(indices)].tolist()
        return indices

    def _sampled_step(self, number: int) -> tuple[list[Example], dict[str, float]]:
        config, generations, shape = self.config, self.config.num_generations, self.shape
        self._started = time.perf_counter()
        positions = np.repeat(range(shape.rank, shape.examples_per_step, shape.world), generations)
        prompts = [self.prompts[index] for index in np.array(self.prompts_of(number))[positions]]
        seeds = [[config.seed, number, int(position), i % generations] for i, position in enumerate(positions)]
        samples = self.sampler.sample(prompts, seeds, lambda _done: None)
        scored = Scored.gathered(samples, self.score(samples))
        groups = self.total(scored.scores).reshape(-1, generations)
        advantages = grpo.advantages_of(groups, config.loss or "grpo", config.scale_rewards)
        if config.mask_truncated_completions:
            advantages = np.where(scored.truncated.reshape(groups.shape), np.nan, advantages)
        metrics = self._metrics_of(scored, groups)
        groups, advantages = (np.split(values, shape.world)[shape.rank] for values in (groups, advantages))
        examples = [sample.example() for sample in samples]
        old: Sequence[list[float] | None] = [None] * len(examples)
        reference = old
        if config.num_iterations > 1:
            old = self._log_probabilities(examples)
        if self.task.beta:
            with self.model.disable_adapter():
                reference = self._log_probabilities(examples)
        columns = zip(examples, advantages.flat, samples, old, reference, strict=True)
        examples = [with_target(e, float(a), s.log_probabilities, o, r) for e, a, s, o, r in columns]
        self._log_largest(number, samples, groups, advantages)
        return examples, metrics

    def _metrics_of(self, scored: Scored, groups: Rewards) -> dict[str, float]:
        """Returns what to log with a step."""
        known, metrics = groups[~np.isnan(groups)], mean_and_error("reward", groups)
        for reward, column in zip(self.rewards + self.judges, scored.scores.T, strict=True):
            metrics |= mean_and_error(f"reward/{reward.name}", column.reshape(groups.shape))
        return {
            **metrics,
            "reward_std": float(known.std()) if known.size else 0.0,
            "equal_groups": float(grpo.has_equal_rewards(groups).mean()),
            "completion_tokens": float(scored.lengths.mean()),
            "truncated": float(scored.truncated.mean()),
        }

    def _log_largest(self, number: int, samples: Sequence[Sample], rewards: Rewards, advantages: Rewards) -> None:
        """Logs the group with the largest advantage, if this is one of the steps to show."""
        iterations, sizes = self.config.num_iterations, np.abs(np.nan_to_num(advantages)).max(1)  # sizes: (groups,)
        is_shown = number % math.ceil(self.max_steps / (SHOWN_STEPS * iterations)) == 0
        if not (is_shown and sizes.any() and PartialState().is_main_process):
            return
        step, group = number * iterations, int(sizes.argmax())
        part, first = min(step * PARTS // self.max_steps, PARTS - 1), group * self.config.num_generations
        best, worst = (samples[first + int(pick(advantages[group]))].shown for pick in (np.nanargmax, np.nanargmin))
        texts = {"prompt": best["prompt"], "best": best["completion"], "worst": worst["completion"]}
        numbers = {"advantage": float(sizes[group]), "rewards": [x for x in rewards[group].tolist() if x == x]}
        run_log.add_metrics(
            Path(self.config.output_dir), run_log.COMPLETIONS, step=step + 1, part=part, **texts, **numbers
        )

    def _as_step(self, examples: list[Example]) -> Step:
        """Returns a step of this rank's completions. Those without an advantage are counted, but not computed."""
        trained = [example for example in examples if self.task.is_trained(example)] or examples[:1]
        lengths = [len(example.input_ids) for example in trained]
        parts = split_by_tokens(lengths, self.shape.token_limit or self.tokens_of_group)
        micro_batches = [[trained[i] for i in part] for part in parts]
        step = Step.of(micro_batches, examples, self.task)
        totals = np.array(gather_object([(step.tokens, step.supervised, step.divisor)])).sum(0)  # of all ranks
        tokens, supervised, divisor = totals.tolist()  # the divisor of dapo is 0 if all completions are masked
        step = replace(step, tokens=int(tokens), supervised=int(supervised), divisor=max(divisor, 1.0))
        started, self._started = self._started, math.inf  # later iterations sample nothing
        return replace(step, metrics=self._metrics, started=started)

    def _log_probabilities(self, examples: Sequence[Example]) -> list[list[float]]:
        """Returns the log-probabilities of each example's completion as training computes them, without gradients."""
        device, results = next(self.model.parameters()).device, list[list[float]]()
        lengths = [len(example.input_ids) for example in examples]
        with torch.no_grad(), evaluating(self.model):
            for part in split_by_tokens(lengths, self.tokens_of_group):
                prepared = [with_target(examples[i], 0.0, [0.0] * examples[i].supervised) for i in part]
                batch = make_batch(prepared, self.layout, device, self.task)
                left = iter((-FORMS[self.layout.loss](self.model, batch)).tolist())  # of the tokens of all completions
                results += [[*islice(left, example.supervised)] for example in prepared]
        return results

    # ---- Sizes

    @property
    def longest(self) -> int:
        """The tokens of the longest prompt with the longest completion."""
        return max(len(prompt.ids) for prompt in [*self.prompts, *self.held_out]) + self.config.max_completion_length

    @property
    def tokens_of_group(self) -> int:
        """The most tokens of a group, and of one forward on an accelerator."""
        return self.longest * self.config.num_generations

    @property
    def sampled_at_once(self) -> int:
        """The completions of a rank that are sampled at the same time, in a step or an evaluation."""
        held_out = math.ceil(len(self.held_out) / self.shape.world)
        prompts = max(self.shape.batch_size * self.shape.accumulation, held_out)
        return min(MOST_REQUESTS, prompts * self.config.num_generations)

    def cache_bytes(self, model_config: PretrainedConfig, dtype: torch.dtype) -> int:
        """Returns the bytes of the engine's keys and values."""
        return cache_bytes(model_config, dtype, self.longest, self.sampled_at_once)

    # ---- Held-out prompts

    @property
    def names(self) -> dict[str, list[str]]:
        """The names of the rewards, and of those that only judge, for run.json."""
        sides = {"trained": self.rewards, "judges": self.judges}
        return {side: [reward.name for reward in rewards] for side, rewards in sides.items()}

    @property
    def score_names(self) -> tuple[str, ...]:
        """The names of `Evaluation.scores`. kl: log p(model) - log p(base), summed over the completion's tokens."""
        names = [reward.name for reward in self.rewards + self.judges]
        return ("reward", *names, "completion_tokens", "truncated", "kl")

    def evaluate(self, examples: Examples, step: int, progress: Callable[[int, int], None]) -> Evaluation:
        """Returns minus the mean reward of each held-out prompt, so that lower is better, as for losses.

        It has the scores of every completion: (prompts, names, completions), NaN if not known.
        A prompt without any reward counts as the mean of the others, which it does not change.
        step: for the log of some completions.
        """
        generations, state = self.config.num_generations, PartialState()
        own = examples.source_indices[state.process_index :: state.num_processes]
        numbers = np.repeat(own, generations).tolist()
        seeds = [[self.config.seed, 2**31, number, i % generations] for i, number in enumerate(numbers)]
        prompts = [self.held_out[number] for number in numbers]
        samples = self.sampler.sample(prompts, seeds, lambda done: progress(done // generations, len(own)))
        scores = self.score(samples)
        lengths, truncated = [len(sample.ids) for sample in samples], [sample.is_truncated for sample in samples]
        columns = np.array([self.total(scores), *scores.T, lengths, truncated, self._log_ratios(samples)])
        if state.is_main_process:
            first = [*zip(samples, columns[0].tolist(), strict=True)][: SHOWN_PROMPTS * generations : generations]
            shown = [{**sample.shown, "reward": reward if reward == reward else None} for sample, reward in first]
            run_log.add_metrics(Path(self.config.output_dir), run_log.COMPLETIONS, step=step, held_out=shown)
        of_ranks = np.empty((len(examples), len(columns), generations))
        for rank, part in enumerate(gather_object([columns.reshape(len(columns), -1, generations)])):
            of_ranks[rank :: state.num_processes] = part.swapaxes(0, 1)
        means = self._known_means(of_ranks[:, 0])
        return Evaluation(-means, np.ones(len(examples), dtype=np.int64), of_ranks)

    def _known_means(self, rewards: Rewards) -> npt.NDArray[np.float64]:
        """Returns the mean reward of each held-out prompt; for those without any, the mean of the others."""
        means = group_means(rewards)
        missing = np.isnan(means)
        if missing.all():
            problem = "the rewards are None for all completions of all held-out prompts"
            raise DataError(f"{problem}; check the reward functions, or hold out other prompts with --eval-data")
        if missing.any() and not self._has_noted_unscored:
            self._has_noted_unscored = True
            count = f"{missing.sum():,} of {len(means):,} held-out prompts"
            self.note(f"{count} are left out of the mean reward: all of their completions got None")
        return np.where(missing, means[~missing].mean(), means)

    def metrics_of(self, evaluation: Evaluation) -> dict[str, float]:
        """Returns what to log with an evaluation besides its loss."""
        scores = dict(zip(self.score_names, cast(Any, evaluation.scores).swapaxes(0, 1), strict=True))
        per_token = scores["kl"] / scores["completion_tokens"].mean(1, keepdims=True)
        return {**mean_and_error("eval_reward", scores["reward"]), **mean_and_error("eval_kl", per_token)}

    def _log_ratios(self, samples: Sequence[Sample]) -> npt.NDArray[np.float64]:
        """Returns log p(model) - log p(base) of each completion; NaN if the base is not in memory."""
        if isinstance(self.model, FullModel) or not samples:
            return np.full(len(samples), np.nan)
        with self.model.disable_adapter():
            of_base = self._log_probabilities([sample.example() for sample in samples])
        pairs = zip(samples, of_base, strict=True)
        return np.array([sum(sample.log_probabilities) - sum(base) for sample, base in pairs])
