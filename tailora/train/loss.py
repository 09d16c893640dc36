"""Losses in nats at the supervised positions of examples, for training and for held-out evaluation.

    examples -> `make_batch`: one packed row (1, total), or padded rows (batch, longest)
             -> `token_losses`: one loss per supervised token
             -> `ModelWithLoss` for the backward, `evaluate` for the loss of every held-out example

Position i predicts token i + 1. The first label of each document is -100, so no prediction crosses a boundary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tailora.core.attach import evaluating
from tailora.data.collate import collate_packed, collate_padded
from tailora.data.dataset import IGNORED, Example, Examples
from tailora.kernels.attention import packed_rows
from tailora.kernels.loss import FORMS, Batch
from tailora.train.trainable import Trainable


@dataclass(frozen=True)
class BatchLayout:
    """How examples become the model's input, and how losses are computed from its output."""

    packed: bool
    loss: str  # a key of kernels.loss.FORMS
    pad_id: int
    attention: str | None = None  # what computes it for packed rows: see `kernels.attention.packed_rows`


class ModelWithLoss(nn.Module):
    """Calls a model with examples and returns losses, so that a wrapper of modules (DDP) sees one forward."""

    def __init__(self, model: nn.Module, layout: BatchLayout) -> None:
        super().__init__()
        self.model, self.layout = model, layout

    def forward(self, examples: Sequence[Example], expected_gradient: float) -> tuple[Tensor, Tensor]:
        return token_losses(self.model, examples, self.layout, expected_gradient)


def token_losses(
    model: nn.Module, examples: Sequence[Example], layout: BatchLayout, expected_gradient: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Returns the loss of every supervised token, (supervised,) float32, and the index of its example, (supervised,).

    expected_gradient: the gradient that each loss will get, if known; half precision then rounds once less.
    """
    batch, owners = make_batch(examples, layout.packed, layout.pad_id, next(model.parameters()).device)
    return FORMS[layout.loss](model, replace(batch, expected_gradient=expected_gradient)), owners


def make_batch(examples: Sequence[Example], packed: bool, pad_id: int, device: torch.device) -> tuple[Batch, Tensor]:
    """Returns the model's input, and the index of the example of each supervised token, (supervised,)."""
    if packed:
        row = collate_packed(examples)
        ends = row["cu_seq_lens"]  # (documents + 1,), stays on the CPU, where it is read
        longest = max(len(example.input_ids) for example in examples)
        documents = {"position_ids": row["position_ids"].to(device), "cu_seq_lens_q": ends, "max_length_q": longest}
        batch = _batch(row, documents, device)
        positions = batch.supervised[0].nonzero()[:, 0]
        return batch, torch.searchsorted(ends[1:].to(positions), positions, right=True)
    padded = collate_padded(examples, pad_id)
    batch = _batch(padded, {"attention_mask": padded["attention_mask"].to(device)}, device)
    return batch, batch.supervised.nonzero()[:, 0]


def _batch(tensors: dict[str, Tensor], other_inputs: dict[str, Any], device: torch.device) -> Batch:
    labels = F.pad(tensors["labels"][:, 1:], (0, 1), value=IGNORED).to(device)  # (batch, length), of the next token
    supervised = labels != IGNORED
    return Batch({"input_ids": tensors["input_ids"].to(device), **other_inputs}, supervised, labels[supervised])


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
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Evaluation:
    """Returns the loss of every example without dropout or gradients; bitwise the same each time.

    token_budget: most tokens in one forward, padding included; a longer example is computed alone. With the budget of
    training, evaluation needs no more memory than training.
    progress: called with the number of examples done and their total.
    """
    done = 0
    sums = np.zeros(len(examples))
    attention = packed_rows(model.base_model, layout.attention) if layout.packed else nullcontext()
    with torch.no_grad(), evaluating(model), attention:
        for batch in batches_within(token_budget, examples.lengths, layout.packed):
            losses, owners = token_losses(model, [examples[i] for i in batch], layout)
            np.add.at(sums, batch[owners.cpu().numpy()], losses.cpu().double().numpy())
            done += len(batch)
            progress(done, len(examples))
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
