"""Reinforcement learning from rewards: advantages of sampled completions, and their losses.

    grpo      Shao et al. 2024, arXiv:2402.03300, eq. 3: the mean over the tokens of a completion, then over completions
    dr_grpo   Liu et al. 2025, arXiv:2503.20783, section 3.2: the sum over tokens divided by a constant length
    dapo      Yu et al. 2025, arXiv:2503.14476, eq. 8: the mean over all tokens, with a higher upper bound of the ratio
    rloo      Ahmadian et al. 2024, arXiv:2402.14740, eq. 8: whole completions, against the mean of the others

A group is the completions of one prompt. The probability ratio compares the model with the one that sampled: 1 in the
first iteration. Groups whose rewards are all equal have no advantage and, without a KL penalty, no backward pass.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from tailora.data.dataset import Example
from tailora.kernels.loss import FORMS, Batch
from tailora.train.config import REWARD
from tailora.train.loss import CAUSAL_LM, BatchLayout, Outputs, Task

Rewards = npt.NDArray[np.float64]  # (groups, completions of each); NaN: not scored
ScaleRewards = Literal["group", "batch", "none"]
SMALLEST_STD = 1e-4  # added to standard deviations, as in TRL
# Mean differences in nats per token that are more than rounding. Measured with SmolLM2-135M on a CPU: 9e-6 in float32,
# 5e-2 in bfloat16, 8e-3 in float16. In bfloat16, logits between 16 and 32 are multiples of 1/8.
DRIFT_LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


def advantages_of(rewards: Rewards, loss: str, scale: ScaleRewards = "group") -> Rewards:
    """Returns how much better each completion is than the others of its group, (groups, completions).

    0 if it is not scored, or if the group has equal rewards: their mean may be rounded.

    scale: divide by the standard deviation of the group's rewards, of the rewards of the batch, or not at all.
    """
    known = np.ma.masked_invalid(rewards)
    advantages = known - known.mean(1, keepdims=True)
    if loss == "rloo":  # from the mean of the others
        counts = known.count(1, keepdims=True)
        advantages = advantages * counts / (counts - 1)
    elif scale != "none":
        std = known.std(None if scale == "batch" else 1, ddof=1, keepdims=True)
        advantages = advantages / (std + SMALLEST_STD)
    compared: Rewards = np.where(has_equal_rewards(rewards)[:, None], 0.0, advantages.filled(0.0))
    return compared


def has_equal_rewards(rewards: Rewards) -> npt.NDArray[np.bool_]:
    """Returns whether all known rewards of a group are equal, or none is known, (groups,)."""
    equal: npt.NDArray[np.bool_] = np.ma.masked_invalid(rewards).ptp(1).filled(0.0) == 0
    return equal


def group_means(values: Rewards) -> npt.NDArray[np.float64]:
    """Returns the mean of the known values of each group, (groups,); NaN if there are none."""
    means: npt.NDArray[np.float64] = np.ma.masked_invalid(values).mean(1).filled(np.nan)
    return means


def mean_and_error(name: str, values: Rewards) -> dict[str, float]:
    """Returns the mean over the groups and its standard error, under these names, unless they are not known."""
    means = group_means(values)
    means = means[~np.isnan(means)]
    numbers = {name: float(means.mean())} if means.size else {}
    if means.size > 1:
        numbers[f"{name}_std_error"] = float(means.std(ddof=1) / np.sqrt(means.size))
    return numbers


@dataclass(eq=False)
class Drift:
    """How far log-probabilities differ between training and sampling, in nats per token."""

    differences: list[Tensor] = field(default_factory=list)  # absolute ones of each forward, (tokens,)
    is_measured: bool = True  # False for later iterations, in which the model has changed
    limit: float = math.inf  # of the mean, above which `warn` is called, once
    warn: Callable[[str], None] | None = None

    def read(self) -> dict[str, float]:
        """Returns the mean and the maximum since the last call."""
        if not self.differences:
            return {}
        differences = torch.cat(self.differences)
        self.differences.clear()
        mean, most = float(differences.mean()), float(differences.max())
        if self.warn is not None and mean > self.limit:
            self.limit = math.inf
            size = f"{mean:.1e} nats per token (maximum {most:.1e})"
            self.warn(f"sampling and training differ by {size}: the trained model is not quite the one that is sampled")
        return {"drift_mean": mean, "drift_max": most}


@dataclass(frozen=True, slots=True)
class ScoredCompletion(Example):
    """A prompt with a completion, and what its loss needs: log-probabilities of each of the completion's tokens."""

    sampled: Sequence[float] = ()  # when it was sampled
    advantage: float | None = 0.0  # None: it is not trained
    old: Sequence[float] | None = None  # before the first iteration; None: the current ones
    reference: Sequence[float] | None = None  # of the base model; None without a KL penalty

    @classmethod
    def without_score(cls, example: Example) -> "ScoredCompletion":
        """Returns an example as a completion, to try or measure the model on."""
        if isinstance(example, ScoredCompletion):
            return example
        return cls(example.input_ids, example.labels, sampled=[0.0] * example.supervised)


@dataclass(frozen=True, eq=False)
class GRPO(Task):
    """Makes completions with a higher reward than others of their group more likely."""

    loss: str = "grpo"  # or dr_grpo, dapo, rloo
    beta: float = 0.0  # weight of the KL penalty; 0: none
    epsilon: float = 0.2  # bounds of the probability ratio: 1 - epsilon and 1 + epsilon_high
    epsilon_high: float = 0.2
    temperature: float = 1.0  # of sampling, and of the log-probabilities
    max_completion_length: int = 256
    drift: Drift = field(default_factory=Drift)
    score_names: tuple[str, ...] = ()

    loss_unit = REWARD
    has_one_loss = True

    @property
    def description(self) -> str:
        penalty = f", beta {self.beta:g}" if self.beta else ""
        return f"rewards of sampled completions, loss {self.loss}{penalty}"

    def divisor(self, example: Example) -> float:
        if self.loss != "dapo":
            return 1.0
        is_masked = ScoredCompletion.without_score(example).advantage is None
        return 0.0 if is_masked else float(example.supervised)

    def has_gradient(self, completion: ScoredCompletion) -> bool:
        return completion.advantage is not None and bool(self.beta or completion.advantage)

    def make_batch(self, examples: Sequence[Example], layout: BatchLayout) -> Batch:
        batch = CAUSAL_LM.make_batch(examples, layout)
        completions = [*map(ScoredCompletion.without_score, examples)]
        lengths = np.bincount(batch.owners, minlength=len(examples))
        advantages = [completion.advantage or 0.0 for completion in completions]
        is_trained = [completion.advantage is not None for completion in completions]
        extras = {
            "sequences": torch.from_numpy(batch.owners),  # (tokens,), as are those below, except lengths
            "lengths": torch.from_numpy(lengths),  # (sequences,)
            "advantages": torch.tensor(advantages, dtype=torch.float32)[batch.owners],
            "is_trained": torch.tensor(is_trained)[batch.owners],
            "sampled": _of_tokens(completion.sampled for completion in completions),
        }
        if all(completion.old is not None for completion in completions):
            extras["old"] = _of_tokens(completion.old or () for completion in completions)
        if self.beta:
            extras["reference"] = _of_tokens(completion.reference or completion.sampled for completion in completions)
        return replace(batch, owners=np.arange(len(examples)), extras=extras, temperature=self.temperature)

    def outputs(self, model: nn.Module, batch: Batch, layout: BatchLayout) -> Outputs:
        log_p = -FORMS[layout.loss](model, batch)  # (tokens,)
        lengths, sequences = batch.extras["lengths"], batch.extras["sequences"]
        advantages, current = batch.extras["advantages"].to(log_p), log_p.detach()
        if torch.is_grad_enabled() and self.drift.is_measured:
            self.drift.differences.append((batch.extras["sampled"].to(log_p) - current).abs())
        log_ratios = log_p - batch.extras.get("old", current).to(log_p)

        def sums(values: Tensor) -> Tensor:
            """(tokens,) -> (sequences,)."""
            return values.new_zeros(len(lengths)).index_add(0, sequences, values)

        if self.loss == "rloo":
            of_sequences = sums(advantages) / lengths
            return Outputs(self._clipped(sums(log_ratios), of_sequences))
        losses = self._clipped(log_ratios, advantages)
        if self.beta:
            to_reference = batch.extras["reference"].to(log_p) - log_p
            penalties = to_reference.exp() - to_reference - 1  # arXiv:2402.03300, eq. 4
            penalties = penalties * batch.extras["is_trained"]
            losses = losses + self.beta * log_ratios.exp() * penalties  # unbiased: arXiv:2512.02556, section 3.1
        divisors = {"grpo": lengths, "dr_grpo": torch.tensor(self.max_completion_length), "dapo": torch.tensor(1)}
        return Outputs(sums(losses) / divisors[self.loss].to(losses.device))

    def _clipped(self, log_ratios: Tensor, advantages: Tensor) -> Tensor:
        ratios = log_ratios.exp()
        clipped = ratios.clamp(1 - self.epsilon, 1 + self.epsilon_high)
        return -torch.min(ratios * advantages, clipped * advantages)

    def start_of(self, example: Example, tokens: int, *, supervised: bool = True) -> Example:
        return ScoredCompletion.without_score(Example.of_text(example.input_ids[:tokens], supervised))


def _of_tokens(values: Iterable[Sequence[float]]) -> Tensor:
    """Returns numbers of the tokens of each completion, one after another, (tokens,)."""
    return torch.tensor([*chain.from_iterable(values)], dtype=torch.float32)
