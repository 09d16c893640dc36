"""Losses in nats at the supervised positions of examples, for training and for held-out evaluation.

    examples -> `make_batch`: one packed row (1, total), or padded rows (batch, longest)
             -> `ModelWithLoss`: one loss per supervised token, for the backward
             -> `evaluate`: the loss of every held-out example

Position i predicts token i + 1. The first label of each document is -100, so no prediction crosses a boundary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tailora.core.attach import evaluating
from tailora.core.inference import constant_adapters
from tailora.data.collate import collate_packed, collate_padded
from tailora.data.dataset import IGNORED, Example, Examples
from tailora.kernels.attention import packed_rows, padded_rows
from tailora.kernels.loss import FORMS, Batch
from tailora.train.trainable import Trainable

READ_EVERY = 32  # batches of an evaluation: the host waits for the device only then


@dataclass(frozen=True)
class BatchLayout:
    """How examples become the model's input, and how losses are computed from its output."""

    packed: bool
    loss: str  # a key of kernels.loss.FORMS
    pad_id: int
    attention: str | None = None  # what computes it for packed rows: see `kernels.attention.packed_rows`

    def used_by(self, base: PreTrainedModel) -> AbstractContextManager[None]:
        """Within the block the model's attention reads batches of this layout; afterwards it is restored."""
        return packed_rows(base, self.attention) if self.packed else padded_rows(base)


class ModelWithLoss(nn.Module):
    """Calls a model with a batch and returns losses, so that a wrapper of modules (DDP) sees one forward."""

    def __init__(self, model: nn.Module, layout: BatchLayout) -> None:
        super().__init__()
        self.model, self.layout = model, layout

    def forward(self, batch: Batch) -> Tensor:
        return FORMS[self.layout.loss](self.model, batch)


def token_losses(
    model: nn.Module, examples: Sequence[Example], layout: BatchLayout
) -> tuple[Tensor, npt.NDArray[np.int64]]:
    """Returns the loss of every supervised token, (supervised,), at least float32, and the index of its example."""
    batch = make_batch(examples, layout, next(model.parameters()).device)
    return FORMS[layout.loss](model, batch), batch.owners


def make_batch(examples: Sequence[Example], layout: BatchLayout, device: torch.device) -> Batch:
    """Returns the model's input and the tokens to predict. All that depends on them is computed on the host."""
    if layout.packed:
        inputs: dict[str, Any] = collate_packed(examples)
        owners = np.repeat(np.arange(len(examples)), inputs["cu_seq_lens_q"].diff().numpy())[None]  # (1, total)
    else:
        inputs = dict(collate_padded(examples, layout.pad_id))
        owners = np.broadcast_to(np.arange(len(examples))[:, None], inputs["labels"].shape)
    labels = inputs.pop("labels").numpy()
    next_tokens = np.full_like(labels, IGNORED)
    next_tokens[:, :-1] = labels[:, 1:]
    return Batch.of(inputs, next_tokens, owners).to(device)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Summed loss in nats and number of supervised tokens of every example."""

    sums: npt.NDArray[np.float64]
    counts: npt.NDArray[np.int64]

    @property
    def loss(self) -> float:
        """Nats per supervised token over all examples."""
        return float(self.sums.sum() / self.counts.sum())


def evaluate(
    model: Trainable,
    examples: Examples,
    *,
    layout: BatchLayout,
    token_budget: int,
    forwards: int = 0,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Evaluation:
    """Returns the loss of every example without dropout or gradients; bitwise the same each time.

    token_budget: most tokens in one forward, padding included; a longer example is computed alone. With the budget of
    training, evaluation needs no more memory than training.
    forwards: the least number of them, for ranks with a sharded base; one without examples left repeats one.
    progress: called with the number of examples done and their total.
    """
    done = 0
    sums = np.zeros(len(examples))
    unread: list[tuple[npt.NDArray[np.int64], Tensor]] = []  # index of the example of each loss; the losses
    base = cast(PreTrainedModel, model.base_model)
    with torch.no_grad(), evaluating(model), constant_adapters(base), layout.used_by(base):
        for batch in batches_within(token_budget, examples.lengths, layout.packed):
            losses, owners = token_losses(model, [examples[i] for i in batch], layout)
            unread.append((batch[owners], losses))
            done += len(batch)
            if len(unread) == READ_EVERY or done == len(examples):
                values = torch.cat([losses for _, losses in unread]).cpu().double().numpy()
                np.add.at(sums, np.concatenate([indices for indices, _ in unread]), values)
                unread.clear()
            progress(done, len(examples))
            forwards -= 1
        for _ in range(forwards):
            token_losses(model, [examples[0]], layout)
    return Evaluation(sums, examples.supervised.astype(np.int64))


def batches_within(token_budget: int, lengths: npt.NDArray[np.int64], packed: bool) -> Iterator[npt.NDArray[np.int64]]:
    """Yields indices of examples of similar length, each batch within the budget.

    The longest come first, so that a lack of memory shows at once.
    """
    batch: list[int] = []
    tokens = 0
    for i in np.argsort(-lengths, kind="stable"):
        width = int(lengths[i] if packed or not batch else lengths[batch[0]])
        if batch and tokens + width > token_budget:
            yield np.array(batch)
            batch, tokens, width = [], 0, int(lengths[i])
        batch.append(int(i))
        tokens += width
    if batch:
        yield np.array(batch)
