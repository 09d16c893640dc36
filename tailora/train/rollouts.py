"""Samples completions from the model in training, scores them, and turns them into optimizer steps.

    prompts of a step -> completions: the engine of `tailora serve` runs the model with its adapter, unmerged
                      -> rewards, in a separate process
                      -> advantages -> examples of `train.grpo`

What is sampled depends only on the weights, the seed and the number of the step, so a run can be resumed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, count, islice
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
from tailora.train.grpo import GRPO, Rewards, group_means, mean_and_error
from tailora.train.loss import BatchLayout, Evaluation, make_batch
from tailora.train.rewards import Completion, Reward, RewardProcess
from tailora.train.sampler import Sample, Sampler
from tailora.train.step import Step, StepShape, split_by_tokens
from tailora.train.trainable import FullModel, Trainable

MOST_REQUESTS = 64  # completions that are sampled at once
SHOWN_PROMPTS = 4  # held-out prompts, the same at each evaluation, whose completions are logged
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Prompts:
    """The prompts of a run, what scores their completions, and the largest sizes of these."""

    config: TrainConfig
    shape: StepShape
    data: PreparedData
    rewards: list[Reward]  # whose weighted sum is the reward
    metrics: list[Reward]  # of held-out completions only

    @property
    def names(self) -> dict[str, list[str]]:
        lists = {"trained": self.rewards, "judges": self.metrics}  # these names are in the reports of earlier runs
        return {part: [reward.name for reward in rewards] for part, rewards in lists.items()}

    @cached_property
    def task(self) -> GRPO:
        config = self.config
        return GRPO(
            config.loss or "grpo",
            config.beta or 0.0,
            config.epsilon,
            config.epsilon_high or config.epsilon,
            config.temperature,
            config.max_completion_length,
            score_names=("reward", *chain(*self.names.values()), "completion_tokens", "truncated", "over_limit", "kl"),
        )

    def scorer(self, note: Callable[[str], None] = lambda _: None) -> RewardProcess:
        """Returns what runs the reward functions, on the columns of all rows."""
        prompts = [*self.data.prompts, *self.data.eval_samples]
        columns = [*dict.fromkeys(name for prompt in prompts for name in prompt.columns)]
        return RewardProcess(self.rewards + self.metrics, self.config.reward_seconds, columns, note)

    def of_step(self, number: int) -> list[int]:
        """Returns the indices of the prompts that are sampled the `number`th time, of all ranks."""
        train, size, seed = self.data.train, self.shape.examples_per_step, self.config.seed
        epochs, positions = np.divmod(np.arange(size) + number * size, train.epoch_size)
        orders = {i: np.random.default_rng([seed, i]).permutation(train.epoch(i, seed)) for i in {*epochs}}
        return [int(orders[epoch][position]) for epoch, position in zip(epochs, positions, strict=True)]

    @property
    def longest(self) -> int:
        """The tokens of the longest prompt with the longest completion."""
        prompts = [*self.data.prompts, *self.data.eval_samples]
        return max(len(prompt.ids) for prompt in prompts) + self.config.max_completion_length

    @property
    def tokens_of_group(self) -> int:
        """The most tokens of a group, and of one forward on an accelerator."""
        return self.longest * self.config.num_generations

    @property
    def sampled_at_once(self) -> int:
        """The completions of a rank that are sampled at the same time, in a step or an evaluation."""
        held_out = math.ceil(len(self.data.eval_samples) / self.shape.world)
        prompts = max(self.shape.batch_size * self.shape.accumulation, held_out)
        return min(MOST_REQUESTS, prompts * self.config.num_generations)

    def cache_bytes(self, model_config: PretrainedConfig, dtype: torch.dtype) -> int:
        """Returns the bytes of the engine's keys and values."""
        return cache_bytes(model_config, dtype, self.longest, self.sampled_at_once)


class Rollouts:
    """Samples and scores completions. Its engine and the process of its rewards run until `stack` is left."""

    def __init__(
        self,
        prompts: Prompts,
        model: Trainable,
        tokenizer: Any,
        layout: BatchLayout,
        note: Callable[[str], None],
        stack: ExitStack,
    ) -> None:
        self.prompts, self.config, self.shape, self.task = prompts, prompts.config, prompts.shape, prompts.task
        self.model, self.layout, self.note = model, layout, note
        if isinstance(model, FullModel):
            note("without an adapter, KL from the base is not measured on held-out completions: it needs both models")
        self.sampler = Sampler(model, tokenizer, prompts.longest, prompts.sampled_at_once, note)
        stack.callback(self.sampler.stop)
        self.task.drift.limit, self.task.drift.warn = grpo.DRIFT_LIMITS.get(self.sampler.base.dtype, math.inf), note
        self._scorer = stack.enter_context(prompts.scorer(note))

    def _scores(self, samples: Sequence[Sample]) -> dict[str, Floats]:
        """Returns `GRPO.score_names` without kl -> (groups, completions). NaN: None. Raises RewardError."""
        completions = []
        for sample in samples:
            is_text = isinstance(sample.prompt.value, str)
            text = sample.text if is_text else [{"role": "assistant", "content": sample.text}]
            completions.append(Completion(sample.prompt.value, text, sample.ids, sample.prompt.columns))
        scores = self._scorer.score(completions).T
        known = np.ma.masked_invalid(scores[: len(self.prompts.rewards)])
        total = (known * [[reward.weight] for reward in self.prompts.rewards]).sum(0).filled(np.nan)
        lengths, truncated = [len(sample.ids) for sample in samples], [sample.is_truncated for sample in samples]
        columns = np.array([total, *scores, lengths, truncated, self._scorer.over_limit])
        columns = columns.reshape(len(columns), -1, self.config.num_generations)
        return dict(zip(self.task.score_names, columns, strict=False))

    def _log(self, **values: Any) -> None:
        """Logs some completions."""
        if PartialState().is_main_process:
            run_log.add_metrics(Path(self.config.output_dir), run_log.COMPLETIONS, **values)

    # ---- Training

    def steps(self, start: int = 0) -> Iterator[Step]:
        """Yields the steps from number `start` on, where completions are sampled. Each is made when it is asked for."""
        for number in count(start // self.config.num_iterations):
            step = self._sampled_step(number)
            for iteration in range(self.config.num_iterations):
                self.task.drift.is_measured = iteration == 0
                yield step
                step = replace(step, metrics={**step.metrics, "over_limit": 0.0})  # counted once

    def _sampled_step(self, number: int) -> Step:
        """Returns the step of this rank's completions of the prompts that are sampled the `number`th time."""
        config, shape = self.config, self.shape
        own, indices = range(shape.rank, shape.examples_per_step, shape.world), self.prompts.of_step(number)
        prompts = [self.prompts.data.prompts[indices[position]] for position in own]
        samples = self.sampler.sample(prompts, [[config.seed, number, position] for position in own], config)
        scores = _of_all_ranks(self._scores(samples))
        advantages = grpo.advantages_of(scores["reward"], config.loss or "grpo", config.scale_rewards)
        if config.mask_truncated_completions:
            advantages = np.where(scores["truncated"], np.nan, advantages)
        metrics = mean_and_error("reward", scores["reward"])
        for name in chain(*self.prompts.names.values()):
            metrics |= mean_and_error(f"reward/{name}", scores[name])
        metrics["equal_groups"] = float(grpo.has_equal_rewards(scores["reward"]).mean())
        metrics |= {name: float(scores[name].mean()) for name in ("completion_tokens", "truncated")}
        metrics["over_limit"] = float(scores["over_limit"].sum())
        rewards, advantages = (np.split(values, shape.world)[shape.rank] for values in (scores["reward"], advantages))
        self._log_largest(number, samples, rewards, advantages)
        completions = [sample.completion() for sample in samples]
        old: Sequence[list[float] | None] = [None] * len(completions)
        reference = old
        if config.num_iterations > 1:
            old = self._log_probabilities(completions)
        if self.task.beta:
            with self.model.disable_adapter():
                reference = self._log_probabilities(completions)
        known = [None if math.isnan(advantage) else float(advantage) for advantage in advantages.flat]
        scored = [
            replace(completion, advantage=advantage, old=before, reference=of_base)
            for completion, advantage, before, of_base in zip(completions, known, old, reference, strict=True)
        ]
        # those without an advantage are counted, but not computed
        trained = [completion for completion in scored if self.task.has_gradient(completion)] or scored[:1]
        lengths = [len(completion.input_ids) for completion in trained]
        parts = split_by_tokens(lengths, shape.token_limit or self.prompts.tokens_of_group)
        step = Step.of([[trained[i] for i in part] for part in parts], scored, self.task)
        totals = np.array(gather_object([(step.tokens, step.supervised, step.divisor)])).sum(0)  # of all ranks
        tokens, supervised, divisor = totals.tolist()
        return replace(step, tokens=int(tokens), supervised=int(supervised), divisor=divisor, metrics=metrics)

    def _log_largest(self, number: int, samples: Sequence[Sample], rewards: Rewards, advantages: Rewards) -> None:
        """Logs the group with the largest advantage."""
        sizes = np.abs(np.nan_to_num(advantages)).max(1)  # (groups,)
        group = int(sizes.argmax())
        if not sizes[group]:
            return
        of_group = samples[group * self.config.num_generations :]
        best, worst = (of_group[int(pick(advantages[group]))].shown for pick in (np.nanargmax, np.nanargmin))
        texts = {"prompt": best["prompt"], "best": best["completion"], "worst": worst["completion"]}
        known = [reward for reward in rewards[group].tolist() if reward == reward]
        self._log(step=number * self.config.num_iterations + 1, **texts, advantage=float(sizes[group]), rewards=known)

    def _log_probabilities(self, examples: Sequence[Example]) -> list[list[float]]:
        """Returns the log-probabilities of each example's completion as training computes them, without gradients."""
        device, results = next(self.model.parameters()).device, list[list[float]]()
        lengths = [len(example.input_ids) for example in examples]
        with torch.no_grad(), evaluating(self.model):
            for part in split_by_tokens(lengths, self.prompts.tokens_of_group):
                batch = make_batch([examples[i] for i in part], self.layout, device, self.task)
                left = iter((-FORMS[self.layout.loss](self.model, batch)).tolist())  # of the tokens of all completions
                results += [[*islice(left, examples[i].supervised)] for i in part]
        return results

    # ---- Held-out prompts

    def evaluate(self, examples: Examples, step: int, progress: Callable[[int, int], None]) -> Evaluation:
        """Returns minus the mean reward of each held-out prompt, so that lower is better, as for losses.

        It has the scores of every completion: (prompts, names, completions), NaN if not known.
        A prompt without any reward counts as the mean of the others, which it does not change.
        step: the number of those that were trained.
        """
        generations, state = self.config.num_generations, PartialState()
        own = np.array_split(examples.source_indices, state.num_processes)[state.process_index].tolist()
        seeds = [[self.config.seed, 2**31, number] for number in own]
        prompts = [self.prompts.data.eval_samples[number] for number in own]
        samples = self.sampler.sample(prompts, seeds, self.config, lambda done: progress(done, len(own)))
        scores, log_ratios = self._scores(samples), self._log_ratios(samples).reshape(-1, generations)
        scores["kl"] = log_ratios / scores["completion_tokens"].mean(1, keepdims=True)  # per token
        shown = [*zip(samples[::generations], scores["reward"][:, 0].tolist(), strict=True)][:SHOWN_PROMPTS]
        of_prompts = [{**sample.shown, "reward": reward if reward == reward else None} for sample, reward in shown]
        self._log(step=step, held_out=of_prompts)
        scores = _of_all_ranks(scores)
        means = group_means(scores["reward"])
        missing = np.isnan(means)
        if missing.all():
            problem = "the rewards are None for all completions of all held-out prompts"
            raise DataError(f"{problem}; check the reward functions, or hold out other prompts with --eval-data")
        if missing.any() and not step:
            number = f"{missing.sum():,} of {len(means):,} held-out prompts"
            self.note(f"{number} are left out of the mean reward: all of their completions got None")
        means[missing] = means[~missing].mean()
        return Evaluation(-means, np.ones(len(examples), dtype=np.int64), np.stack([*scores.values()], 1))

    def metrics_of(self, evaluation: Evaluation) -> dict[str, float]:
        """Returns what to log with an evaluation besides its loss."""
        scores = dict(zip(self.task.score_names, cast(Floats, evaluation.scores).swapaxes(0, 1), strict=True))
        return mean_and_error("eval_reward", scores["reward"]) | mean_and_error("eval_kl", scores["kl"])

    def _log_ratios(self, samples: Sequence[Sample]) -> Floats:
        """Returns log p(model) - log p(base) of each completion; NaN if the base is not in memory."""
        if isinstance(self.model, FullModel) or not samples:
            return np.full(len(samples), np.nan)
        with self.model.disable_adapter():
            of_base = self._log_probabilities([sample.completion() for sample in samples])
        pairs = zip(samples, of_base, strict=True)
        return np.array([sum(sample.log_probabilities) - sum(base) for sample, base in pairs])


def _of_all_ranks(scores: dict[str, Floats]) -> dict[str, Floats]:
    gathered = gather_object([scores])
    return {name: np.concatenate([of_rank[name] for of_rank in gathered]) for name in scores}
