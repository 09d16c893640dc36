"""Samples completions from the model in training, scores them, and turns them into optimizer steps.

    prompts of a step -> completions: the engine of `tailora serve` runs the model with its adapter, unmerged
                      -> rewards, in a separate process
                      -> advantages -> examples of `train.grpo`

What is sampled depends only on the weights, the seed and the number of the step, so a run can be resumed.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import count, groupby, islice
from pathlib import Path
from threading import Semaphore
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import PretrainedConfig, PreTrainedModel

from tailora.core.adapter_set import AdapterSet
from tailora.core.attach import evaluating
from tailora.data.dataset import Example, Examples
from tailora.data.processor import text_tokenizer
from tailora.data.prompts import Prompt
from tailora.data.tokenize import stop_ids
from tailora.engine.continuous_batching import make_engine
from tailora.engine.interface import EventHandler, Finish, Request, SamplingParams, Token
from tailora.errors import DataError, DivergedError
from tailora.kernels.attention import use_attention
from tailora.kernels.loss import FORMS
from tailora.model import LoRAModel
from tailora.train import run_log
from tailora.train.config import TrainConfig
from tailora.train.grpo import DRIFT_LIMITS, GRPO, Rewards, advantages_of, group_means, mean_and_error, with_target
from tailora.train.loss import BatchLayout, Evaluation, make_batch
from tailora.train.memory import return_freed_memory
from tailora.train.rewards import Completion, Reward, RewardProcess
from tailora.train.step import Step, StepShape, split_by_tokens
from tailora.train.trainable import FullModel, Trainable

MOST_REQUESTS = 64  # completions that are sampled at once
BYTES_OF_NUMBER = 2  # of a key or value, in 16 bits
# What the run log shows: the same held-out prompts at each evaluation, and the largest group of each part of the run
SHOWN_PROMPTS, SHOWN_CHARACTERS, PARTS = 4, 400, 8


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion. ids: with its end token, unless it is truncated.    log_probabilities: of each token."""

    prompt: Prompt
    ids: list[int]
    log_probabilities: list[float]
    is_truncated: bool
    text: str

    def for_rewards(self) -> Completion:
        text = [{"role": "assistant", "content": self.text}] if self.prompt.is_chat else self.text
        return Completion(self.prompt.value, text, self.ids, self.prompt.columns)

    @property
    def shown(self) -> dict[str, str]:
        """The beginnings of the prompt's last message and of the completion."""
        texts = {"prompt": str(self.prompt.messages[-1]["content"]), "completion": self.text}
        return {name: text[:SHOWN_CHARACTERS] for name, text in texts.items()}

    def example(self, number: int) -> Example:
        """Returns prompt and completion, which alone is trained. number: index of the prompt."""
        ids = np.array([*self.prompt.ids, *self.ids], dtype=np.int32)
        is_trained = np.arange(len(ids)) >= len(self.prompt.ids)
        return replace(Example.of_text(ids, is_trained), source_index=number)


class Rollouts:
    """The prompts of a run, the engine that answers them, and the rewards of the answers.

    rewards: whose weighted sum is the reward.    judges: that only judge held-out completions.
    """

    def __init__(
        self,
        config: TrainConfig,
        prompts: Sequence[Prompt],
        held_out: Sequence[Prompt],
        rewards: Sequence[Reward],
        judges: Sequence[Reward],
    ) -> None:
        self.config, self.prompts, self.held_out = config, prompts, held_out
        self.rewards, self.judges = list(rewards), list(judges)
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
        self._request_numbers = count()
        self._step: list[Example] = []  # of this rank, which later iterations use again
        self._metrics: dict[str, float] = {}
        self._started = 0.0
        self.max_steps = 1
        self._largest = dict.fromkeys(range(PARTS), 0.0)  # part of the run -> largest advantage

    def connect(
        self, model: Trainable, tokenizer: Any, layout: BatchLayout, note: Callable[[str], None], stack: ExitStack
    ) -> None:
        """Starts the engine and the process of the rewards, until `stack` is left."""
        self.model, self.tokenizer, self.layout = model, text_tokenizer(tokenizer), layout
        if isinstance(model, LoRAModel):
            adapters = model._adapter_set
        else:
            note("without an adapter, KL from the base is not measured on held-out completions: it needs both models")
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            adapters = AdapterSet(model.base_model, {})  # freezes it
            for parameter in trained:
                parameter.requires_grad_(True)
        self.task.drift.limit, self.task.drift.warn = DRIFT_LIMITS.get(self._base.dtype, math.inf), note
        self.ends = stop_ids(model, tokenizer)
        with evaluating(model), use_attention(self._base, self._base.config._attn_implementation):
            self._engine = make_engine(
                adapters, self.ends, max_positions=self.longest, max_requests=MOST_REQUESTS, note=note
            )
            self._engine.start()
            self._attention = self._base.config._attn_implementation  # that the engine has chosen
        stack.callback(self._stop_engine)
        self._pause = stack.enter_context(ExitStack())
        self._pause_engine()
        self._scorer = stack.enter_context(RewardProcess(self.rewards + self.judges, self.config.reward_seconds))

    def _pause_engine(self) -> None:
        """Lets the model train until `_resumed`, with the memory of the cache."""
        self._pause.enter_context(self._engine.paused())
        self._engine.free_cache()
        if isinstance(self.model, LoRAModel):
            self.model.set_adapter("default")

    def _stop_engine(self) -> None:
        self._engine.stop()
        if isinstance(self.model, LoRAModel):
            self.model.set_adapter("default")

    @contextmanager
    def _resumed(self, requests: Callable[[], None]) -> Iterator[None]:
        """Within the block the engine runs the model.

        requests: submits all requests while the engine waits, so that its batches do not depend on the time.
        """
        return_freed_memory()
        with evaluating(self.model), use_attention(self._base, self._attention):
            requests()
            self._engine.parameters_changed()
            self._pause.close()
            try:
                yield
            finally:
                self._pause_engine()

    @property
    def _base(self) -> PreTrainedModel:
        return cast(PreTrainedModel, self.model.base_model)

    # ---- Sampling

    def sample(
        self, prompts: Sequence[Prompt], seeds: Sequence[Sequence[int]], progress: Callable[[int], None]
    ) -> list[Sample]:
        """Returns a completion of each prompt. seeds: numbers that determine its tokens. Raises DivergedError."""
        config = self.config
        tokens: list[list[Token]] = [[] for _ in prompts]
        finishes: list[Finish | None] = [None] * len(prompts)
        ended = Semaphore(0)

        def request(number: int) -> tuple[Request, EventHandler]:
            def handle(event: Token | Finish) -> None:
                if isinstance(event, Token):
                    tokens[number].append(event)
                else:
                    finishes[number] = event
                    ended.release()

            seed = int(np.random.SeedSequence(seeds[number]).generate_state(1)[0])
            params = SamplingParams(
                config.max_completion_length,
                temperature=config.temperature,
                seed=seed,
                logprobs=0,
                at_temperature=True,
            )
            adapter = "default" if isinstance(self.model, LoRAModel) else None
            ids = tuple(prompts[number].ids)
            return Request(f"{next(self._request_numbers)}", ids, adapter, params), handle

        def submit_all() -> None:
            for _, group in groupby(range(len(prompts)), lambda number: prompts[number].ids):
                self._engine.submit_group([request(number) for number in group])

        with self._resumed(submit_all):
            for done in range(len(prompts)):
                ended.acquire()
                progress(done + 1)
        samples = []
        for prompt, of_prompt, finish in zip(prompts, tokens, finishes, strict=True):
            assert finish is not None
            if finish.reason in ("error", "cancelled"):
                raise DivergedError(f"sampling failed: {finish.message or finish.reason}")
            ids = [token.id for token in of_prompt]
            words = ids if finish.reason == "length" else ids[:-1]
            text = str(self.tokenizer.decode(words, skip_special_tokens=True))
            logprobs = [token.logprob for token in of_prompt]
            samples.append(Sample(prompt, ids, logprobs, finish.reason == "length", text))
        return samples

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

    def steps(self, shape: StepShape, start: int = 0) -> Iterator[Step]:
        """Yields the steps from number `start` on. Each is sampled when it is asked for."""
        for number in count(start):
            if number % self.config.num_iterations == 0 or not self._step:
                self._step, self._metrics = self._sampled_step(number // self.config.num_iterations, shape)
            self.task.drift.is_measured = number % self.config.num_iterations == 0
            yield self._as_step(self._step, shape)

    def prompts_of(self, number: int, shape: StepShape) -> list[int]:
        """Returns the indices of the prompts of a generation, of all ranks."""
        size, total = shape.examples_per_step, len(self.prompts)
        indices: list[int] = []
        first = number * size
        while len(indices) < size:
            epoch, position = divmod(first + len(indices), total)
            order = np.random.default_rng([self.config.seed, epoch]).permutation(total)
            indices += order[position : position + size - len(indices)].tolist()
        return indices

    def _sampled_step(self, number: int, shape: StepShape) -> tuple[list[Example], dict[str, float]]:
        config, generations = self.config, self.config.num_generations
        self._started = time.perf_counter()
        positions = np.repeat(range(shape.rank, shape.examples_per_step, shape.world), generations)
        repeated = np.array(self.prompts_of(number, shape))[positions].tolist()
        seeds = [[config.seed, number, int(position), i % generations] for i, position in enumerate(positions)]
        samples = self.sample([self.prompts[index] for index in repeated], seeds, lambda _done: None)
        lengths, truncated = [len(sample.ids) for sample in samples], [sample.is_truncated for sample in samples]
        of_ranks = gather_object([np.column_stack([self.score(samples), lengths, truncated])])
        table = np.concatenate(of_ranks)  # (completions of all ranks, rewards and judges, length, truncated)
        groups = self.total(table).reshape(-1, generations)
        advantages = advantages_of(groups, config.loss or "grpo", config.scale_rewards)
        if config.mask_truncated_completions:
            advantages = np.where(table[:, -1].reshape(groups.shape), np.nan, advantages)
        metrics = self._metrics_of(table, groups)
        groups, advantages = (np.split(values, shape.world)[shape.rank] for values in (groups, advantages))
        examples = [sample.example(index) for sample, index in zip(samples, repeated, strict=True)]
        old = self._log_probabilities(examples) if config.num_iterations > 1 else None
        reference = None
        if self.task.beta:
            with self.model.disable_adapter():
                reference = self._log_probabilities(examples)
        examples = [
            with_target(
                example,
                float(advantage),
                sample.log_probabilities,
                old[i] if old else None,
                reference[i] if reference else None,
            )
            for i, (example, sample, advantage) in enumerate(zip(examples, samples, advantages.flat, strict=True))
        ]
        self._log_largest(number, samples, groups, advantages)
        return examples, metrics

    def _metrics_of(self, table: npt.NDArray[np.float64], groups: Rewards) -> dict[str, float]:
        """Returns what to log with a step. table: (completions, rewards and judges, length, truncated)."""
        highest, lowest = (sign * np.nan_to_num(sign * groups, nan=-np.inf).max(1) for sign in (1, -1))
        equal = int((highest <= lowest).sum())  # also if none is scored
        known, metrics = groups[~np.isnan(groups)], mean_and_error("reward", groups)
        for reward, column in zip(self.rewards + self.judges, table.T, strict=False):
            metrics |= mean_and_error(f"reward/{reward.name}", column.reshape(groups.shape))
        return {
            **metrics,
            "reward_std": float(known.std()) if known.size else 0.0,
            "equal_groups": equal / len(groups),
            "completion_tokens": float(table[:, -2].mean()),
            "truncated": float(table[:, -1].mean()),
        }

    def _log_largest(self, number: int, samples: Sequence[Sample], rewards: Rewards, advantages: Rewards) -> None:
        """Logs the group with the largest advantage, unless one of the same part of the run was as large."""
        sizes, step = np.abs(np.nan_to_num(advantages)).max(1), number * self.config.num_iterations  # sizes: (groups,)
        part, group = min(step * PARTS // self.max_steps, PARTS - 1), int(sizes.argmax())
        if sizes[group] <= self._largest[part] or not PartialState().is_main_process:
            return
        self._largest[part], first = float(sizes[group]), group * self.config.num_generations
        best, worst = (samples[first + int(pick(advantages[group]))].shown for pick in (np.nanargmax, np.nanargmin))
        texts = {"prompt": best["prompt"], "best": best["completion"], "worst": worst["completion"]}
        numbers = {"advantage": self._largest[part], "rewards": [x for x in rewards[group].tolist() if x == x]}
        run_log.add_metrics(
            Path(self.config.output_dir), run_log.COMPLETIONS, step=step + 1, part=part, **texts, **numbers
        )

    def _as_step(self, examples: list[Example], shape: StepShape) -> Step:
        """Returns a step of this rank's completions. Those without an advantage are counted, but not computed."""
        trained = [example for example in examples if self.task.is_trained(example)] or examples[:1]
        parts = split_by_tokens([len(example.input_ids) for example in trained], shape.token_limit)
        micro_batches = [[trained[i] for i in part] for part in parts]
        step = Step.of(micro_batches, examples, self.task)
        totals = np.array(gather_object([(step.tokens, step.supervised, step.divisor)])).sum(0).tolist()  # of all ranks
        tokens, supervised, divisor = int(totals[0]), int(totals[1]), totals[2]
        started, self._started = self._started, math.inf  # later iterations sample nothing
        return replace(
            step, tokens=tokens, supervised=supervised, divisor=divisor, metrics=self._metrics, started=started
        )

    def _log_probabilities(self, examples: Sequence[Example]) -> list[list[float]]:
        """Returns the log-probabilities of each example's completion as training computes them, without gradients."""
        device, results = next(self.model.parameters()).device, list[list[float]]()
        lengths = [len(example.input_ids) for example in examples]
        with torch.no_grad(), evaluating(self.model):
            for part in split_by_tokens(lengths, self.longest * self.config.num_generations):
                prepared = [with_target(examples[i], 0.0, [0.0] * examples[i].supervised) for i in part]
                batch = make_batch(prepared, self.layout, device, self.task)
                left = iter((-FORMS[self.layout.loss](self.model, batch)).tolist())  # of the tokens of all completions
                results += [[*islice(left, example.supervised)] for example in prepared]
        return results

    # ---- Held-out prompts

    def most_tokens(self, shape: StepShape) -> int:
        """Returns the tokens of a step whose prompts and completions are the longest possible."""
        return shape.examples_per_step * self.config.num_generations * self.longest

    @property
    def longest(self) -> int:
        """The tokens of the longest prompt with the longest completion."""
        return max(len(prompt.ids) for prompt in [*self.prompts, *self.held_out]) + self.config.max_completion_length

    def cache_bytes(self, model_config: PretrainedConfig, shape: StepShape) -> int:
        """Returns the bytes of the keys and values of the completions that are sampled at once."""
        text = model_config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        requests = min(MOST_REQUESTS, shape.batch_size * shape.accumulation * self.config.num_generations)
        numbers: int = 2 * text.num_hidden_layers * heads * width
        return numbers * BYTES_OF_NUMBER * self.longest * requests

    @property
    def names(self) -> dict[str, list[str]]:
        """The names of the rewards, and of those that only judge, for run.json."""
        return {
            "trained": [reward.name for reward in self.rewards],
            "judges": [reward.name for reward in self.judges],
        }

    @property
    def score_names(self) -> tuple[str, ...]:
        """The names of `Evaluation.scores`. kl: log p(model) - log p(base), summed over the completion's tokens."""
        names = [reward.name for reward in self.rewards + self.judges]
        return ("reward", *names, "completion_tokens", "truncated", "kl")

    def evaluate(self, examples: Examples, step: int, progress: Callable[[int, int], None]) -> Evaluation:
        """Returns minus the mean reward of each held-out prompt, so that lower is better, as for losses.

        It has the scores of every completion: (prompts, names, completions), NaN if not known.
        step: for the log of some completions.
        """
        generations, state = self.config.num_generations, PartialState()
        own = examples.source_indices[state.process_index :: state.num_processes]
        numbers = np.repeat(own, generations).tolist()
        seeds = [[self.config.seed, 2**31, number, i % generations] for i, number in enumerate(numbers)]
        prompts = [self.held_out[number] for number in numbers]
        samples = self.sample(prompts, seeds, lambda done: progress(done // generations, len(own)))
        scores = self.score(samples)
        lengths, truncated = np.array([(len(sample.ids), sample.is_truncated) for sample in samples]).T
        columns = [self.total(scores), *scores.T, lengths, truncated, self._log_ratios(samples)]
        if state.is_main_process:
            first = [*zip(samples, columns[0].tolist(), strict=True)][: SHOWN_PROMPTS * generations : generations]
            shown = [{**sample.shown, "reward": reward if reward == reward else None} for sample, reward in first]
            run_log.add_metrics(Path(self.config.output_dir), run_log.COMPLETIONS, step=step, held_out=shown)
        of_ranks = np.empty((len(examples), len(columns), generations))
        for rank, part in enumerate(gather_object([np.stack(columns).reshape(len(columns), -1, generations)])):
            of_ranks[rank :: state.num_processes] = part.swapaxes(0, 1)
        if np.isnan(of_ranks[:, 0]).all(1).any():
            raise DataError("the rewards are None for all completions of a held-out prompt, which cannot be evaluated")
        return Evaluation(-group_means(of_ranks[:, 0]), np.ones(len(examples), dtype=np.int64), of_ranks)

    def metrics_of(self, evaluation: Evaluation) -> dict[str, float]:
        """Returns what to log with an evaluation besides its loss."""
        scores = dict(zip(self.score_names, cast(Any, evaluation.scores).swapaxes(0, 1), strict=True))
        per_token = scores["kl"] / scores["completion_tokens"].mean(1, keepdims=True)
        return {**mean_and_error("eval_reward", scores["reward"]), **mean_and_error("eval_kl", per_token)}

    def _log_ratios(self, samples: Sequence[Sample]) -> npt.NDArray[np.float64]:
        """Returns log p(model) - log p(base) of each completion; NaN if the base is not in memory."""
        if isinstance(self.model, FullModel):
            return np.full(len(samples), np.nan)
        with self.model.disable_adapter():
            of_base = self._log_probabilities([sample.example(0) for sample in samples])
        pairs = zip(samples, of_base, strict=True)
        return np.array([sum(sample.log_probabilities) - sum(base) for sample, base in pairs])
