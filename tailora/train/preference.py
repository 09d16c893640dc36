"""Preferences: losses on the log-probabilities of whole replies.

    pairs, chosen and rejected   dpo    Rafailov et al. 2023, arXiv:2305.18290, eq. 7
                                        with label smoothing: Mitchell 2023, "A note on DPO with noisy preferences"
                                 ipo    Azar et al. 2023, arXiv:2310.12036, eq. 17
                                 simpo  Meng et al. 2024, arXiv:2405.14734, eq. 6
                                 orpo   Hong et al. 2024, arXiv:2403.07691, eq. 6 and 7
    single replies, wanted or not kto   Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8

A reply's reward is beta times its log-probability relative to that before training, which `Reference` keeps. SimPO and
ORPO have no reference: their rewards are beta times the log-probability per token.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tailora.core.attach import evaluating
from tailora.data.dataset import Example, Examples
from tailora.data.schemas import FEEDBACK
from tailora.errors import ConfigError
from tailora.kernels.loss import FORMS, Batch
from tailora.train.config import PER_EXAMPLE, TrainConfig
from tailora.train.loss import CAUSAL_LM, BatchLayout, Evaluation, Outputs, Reduce, Reference, Sums, Task, TaskScores

# ---- Log-probabilities of replies


def make_sequence_batch(
    examples: Sequence[Example], sequences: Sequence[Sequence[Example]], layout: BatchLayout
) -> Batch:
    """Returns a batch for `log_probabilities`. sequences: of each example, the same number of each."""
    flat = [sequence for of_example in sequences for sequence in of_example]
    batch = CAUSAL_LM.make_batch(flat, layout)
    lengths = np.bincount(batch.owners, minlength=len(flat)).reshape(len(examples), -1)
    extras = {"sequences": torch.from_numpy(batch.owners), "lengths": torch.from_numpy(lengths)}
    return replace(batch, owners=np.arange(len(examples)), extras=extras)


def log_probabilities(model: nn.Module, batch: Batch, layout: BatchLayout) -> Tensor:
    """Returns log p(reply | prompt) in nats, (examples, sequences of each)."""
    losses = FORMS[layout.loss](model, batch)  # (supervised,)
    lengths = batch.extras["lengths"]
    sums = losses.new_zeros(lengths.numel()).index_add(0, batch.extras["sequences"], losses)
    return -sums.reshape(lengths.shape)


# ---- Losses


@dataclass(frozen=True)
class Replies:
    """What a loss of pairs is computed from: (pairs, 2) each, chosen and rejected."""

    log_probabilities: Tensor
    log_ratios: Tensor  # the same minus those before training
    lengths: Tensor  # in tokens

    @property
    def per_token(self) -> Tensor:
        return self.log_probabilities / self.lengths


def _difference(values: Tensor) -> Tensor:
    """(pairs, 2) -> chosen - rejected, (pairs,)."""
    return values[:, 0] - values[:, 1]


def _smoothed(margins: Tensor, smoothing: float) -> Tensor:
    return -(1 - smoothing) * F.logsigmoid(margins) - smoothing * F.logsigmoid(-margins)


def dpo(replies: Replies, task: "Pairs") -> Tensor:
    return _smoothed(task.beta * _difference(replies.log_ratios), task.label_smoothing)


def ipo(replies: Replies, task: "Pairs") -> Tensor:
    """With log-ratios per token, as its authors computed it and TRL does; beta is tau in the paper."""
    return (_difference(replies.log_ratios / replies.lengths) - 1 / (2 * task.beta)) ** 2


def simpo(replies: Replies, task: "Pairs") -> Tensor:
    return _smoothed(task.beta * _difference(replies.per_token) - task.simpo_gamma, task.label_smoothing)


def orpo(replies: Replies, task: "Pairs") -> Tensor:
    """The chosen reply's loss per token, and beta (lambda in the paper) times the loss of the odds ratio."""
    log_p = replies.per_token
    log_p = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)  # where p is 1 the odds are infinite
    log_odds = log_p - torch.log(-torch.expm1(log_p))  # expm1 keeps the digits of p near 1
    return -log_p[:, 0] - task.beta * F.logsigmoid(_difference(log_odds))


LOSSES: dict[str, Callable[[Replies, "Pairs"], Tensor]] = {"dpo": dpo, "ipo": ipo, "simpo": simpo, "orpo": orpo}
WITHOUT_REFERENCE = ("simpo", "orpo")
DEFAULT_BETA = {"dpo": 0.1, "ipo": 0.1, "simpo": 2.0, "orpo": 0.1, "kto": 0.1}


# ---- The tasks


class Preference(Task):
    """What both kinds of preferences have in common."""

    loss_unit = PER_EXAMPLE
    has_one_loss = True

    def hits(self, examples: Examples, evaluation: Evaluation) -> Sums | None:
        """Returns whether the rewards of each example are in the right order; equal ones count as half."""
        del examples
        if evaluation.scores is None:
            return None
        hits: Sums = (np.sign(self.margins(evaluation.scores)) + 1) / 2
        return hits

    @abstractmethod
    def margins(self, scores: TaskScores) -> TaskScores:
        """Returns by how much the rewards of each example are in the right order, (examples,)."""


@dataclass(frozen=True, eq=False)
class Pairs(Preference):
    """Makes chosen replies more likely than rejected ones."""

    loss: str
    beta: float
    label_smoothing: float = 0.0
    simpo_gamma: float = 1.0
    sft_weight: float = 0.0  # of the loss per token of the chosen reply (Pang et al. 2024, arXiv:2404.19733, eq. 1)
    reference: Reference | None = None  # of the examples whose losses are computed; None stands for 0

    score_names = ("chosen", "rejected", "chosen_reward", "rejected_reward")

    @property
    def description(self) -> str:
        further = {"label smoothing": self.label_smoothing, "weight of the chosen reply's loss": self.sft_weight}
        margin = f", gamma {self.simpo_gamma:g}" if self.loss == "simpo" else ""
        more = "".join(f", {name} {value:g}" for name, value in further.items() if value)
        return f"pairs of replies, loss {self.loss}, beta {self.beta:g}{margin}{more}"

    def margins(self, scores: TaskScores) -> TaskScores:
        _, _, chosen_reward, rejected_reward = scores.T
        margins: TaskScores = chosen_reward - rejected_reward
        return margins

    def make_batch(self, examples: Sequence[Example], layout: BatchLayout) -> Batch:
        batch = make_sequence_batch(examples, [example.sequences for example in examples], layout)
        if self.reference is not None:
            batch.extras["reference"] = _float32(self.reference.of(examples))
        return batch

    def outputs(self, model: nn.Module, batch: Batch, layout: BatchLayout) -> Outputs:
        log_p = log_probabilities(model, batch, layout)  # (pairs, 2)
        return self._outputs(Replies(log_p, log_p - _reference(batch, log_p), batch.extras["lengths"]))

    def evaluation_before_training(self, examples: Examples) -> Evaluation | None:
        if self.reference is None:
            return None
        log_p = torch.from_numpy(self.reference.of(examples))
        lengths = torch.tensor([[sequence.supervised for sequence in example.sequences] for example in examples])
        losses, scores = self._outputs(Replies(log_p, torch.zeros_like(log_p), lengths))
        return self.evaluation(examples, losses.numpy(), cast(Tensor, scores).numpy())

    def _outputs(self, replies: Replies) -> Outputs:
        losses = LOSSES[self.loss](replies, self)
        if self.sft_weight:
            losses = losses - self.sft_weight * replies.per_token[:, 0]
        rewards = self.beta * (replies.per_token if self.loss in WITHOUT_REFERENCE else replies.log_ratios)
        return Outputs(losses, torch.cat([replies.log_probabilities, rewards], dim=1).detach())


@dataclass(frozen=True, eq=False)
class KTO(Preference):
    """Makes wanted replies more likely and unwanted ones less likely (arXiv:2402.01306, eq. 8).

    The second sequence of an example is its prompt with another prompt's reply. The mean log-ratio of these in the
    whole step, at least 0, is the reference point z0; it gets no gradient.
    """

    beta: float
    reference: Reference | None = None  # as in `Pairs`

    score_names = ("reply", "other", "reward", "other_log_ratio", "desirable")
    batches_by_length = False

    @property
    def description(self) -> str:
        return f"desirable and undesirable replies, loss kto, beta {self.beta:g}"

    def margins(self, scores: TaskScores) -> TaskScores:
        _, _, reward, _, desirable = scores.T
        margins: TaskScores = (2 * desirable - 1) * reward
        return margins

    def trained_sequences(self, example: Example) -> Sequence[Example]:
        return example.sequences[:1]

    def make_batch(self, examples: Sequence[Example], layout: BatchLayout) -> Batch:
        sequences = [example.sequences for example in examples]
        batch = make_sequence_batch(examples, [own[:1] for own in sequences], layout)
        other = make_sequence_batch(examples, [own[1:] for own in sequences], layout)
        batch.extras["desirable"] = _float32(np.stack([cast(Any, example.target) for example in examples]))
        if self.reference is not None:
            values = _float32(self.reference.of(examples))
            batch.extras["reference"], other.extras["reference"] = values[:, :1], values[:, 1:]
        return replace(batch, other=other)

    def complete_step(
        self, model: nn.Module, batches: Sequence[Batch], layout: BatchLayout, reduce: Reduce
    ) -> Sequence[Batch]:
        with torch.no_grad(), evaluating(model):
            sums = [batch.weight * self._other(model, batch, layout)[1].sum() for batch in batches]
        total = torch.stack(sums).sum()
        count = total.new_tensor(sum(batch.weight * len(batch.owners) for batch in batches))
        total, count = reduce(torch.stack([total, count]))
        point = (total / count).clamp(min=0)
        return [replace(batch, extras={**batch.extras, "reference_point": point}) for batch in batches]

    def outputs(self, model: nn.Module, batch: Batch, layout: BatchLayout) -> Outputs:
        """Returns losses for the reference point of `complete_step`; without one, scores and no losses."""
        log_p = log_probabilities(model, batch, layout)  # (examples, 1)
        log_ratios, desirable = log_p - _reference(batch, log_p), batch.extras["desirable"].to(log_p)
        if (point := batch.extras.get("reference_point")) is not None:
            return Outputs(self._losses(log_ratios, desirable, point)[:, 0])
        other, other_log_ratios = self._other(model, batch, layout)
        scores = torch.cat([log_p, other, self.beta * log_ratios, other_log_ratios, desirable], dim=1)
        return Outputs(torch.zeros_like(scores[:, 0]), scores)

    def evaluation(self, examples: Examples, sums: Sums, scores: TaskScores | None) -> Evaluation:
        """Returns losses for the reference point of all examples."""
        del sums
        _, _, reward, other_log_ratio, desirable = torch.from_numpy(cast(TaskScores, scores)).T
        losses = self._losses(reward / self.beta, desirable, other_log_ratio.mean().clamp(min=0))
        return Evaluation(losses.numpy(), self.counts(examples), scores)

    def evaluation_before_training(self, examples: Examples) -> Evaluation | None:
        if self.reference is None:
            return None
        desirable = np.stack([cast(Any, example.target) for example in examples])
        zeros = np.zeros_like(desirable)
        scores = np.concatenate([self.reference.of(examples), zeros, zeros, desirable], axis=1)
        return self.evaluation(examples, zeros[:, 0], scores)

    def _losses(self, log_ratios: Tensor, desirable: Tensor, point: Tensor) -> Tensor:
        signs = 2 * desirable - 1
        return 1 - (self.beta * signs * (log_ratios - point)).sigmoid()

    def _other(self, model: nn.Module, batch: Batch, layout: BatchLayout) -> tuple[Tensor, Tensor]:
        """Returns log-probabilities and log-ratios of the prompts with other replies, (examples, 1) each."""
        other = cast(Batch, batch.other)
        log_p = log_probabilities(model, other, layout)
        return log_p, log_p - _reference(other, log_p)


def _float32(values: npt.NDArray[np.float64]) -> Tensor:
    """Returns a tensor for any device: MPS has no float64. The values were computed in float32."""
    return torch.from_numpy(values).float()


def _reference(batch: Batch, log_p: Tensor) -> Tensor:
    reference = batch.extras.get("reference")
    return torch.zeros_like(log_p) if reference is None else reference.to(log_p)


def preference_task(config: TrainConfig, shape: str, source: str) -> Pairs | KTO:
    """Returns the task for rows of this schema from this source. Raises ConfigError if `config` needs other rows."""
    single = shape == FEEDBACK
    loss = config.loss or ("kto" if single else "dpo")
    if single != (loss == "kto"):
        needed = "rows with prompt, completion and label" if loss == "kto" else "rows with chosen and rejected"
        raise ConfigError(f"--loss {loss} needs {needed}, but data {source} was read as {shape}; remove --loss")
    beta = config.beta or DEFAULT_BETA[loss]
    if loss == "kto":
        if wrong := [name for name in ("label_smoothing", "sft_weight") if getattr(config, name)]:
            raise ConfigError(f"--loss kto does not use pairs of replies; remove {' and '.join(wrong)}")
        return KTO(beta, Reference())
    reference = None if loss in WITHOUT_REFERENCE else Reference()
    return Pairs(loss, beta, config.label_smoothing, config.simpo_gamma, config.sft_weight, reference)
