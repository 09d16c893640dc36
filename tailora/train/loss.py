"""Losses in nats at the supervised positions of examples.

A batch is either one packed row (1, total) or padded rows (batch, longest). Position i predicts token i + 1; the first
label of each document is -100, so no prediction crosses a boundary.
"""

from collections.abc import Iterator, Sequence
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
    """How examples become the model's input, and its output becomes losses."""

    packed: bool
    loss: str  # a key of FORMS: "chunked, head frozen"
    pad_id: int


class Supervised(nn.Module):
    """A model that is called with examples and gives losses, so that what wraps a module (DDP) sees one forward."""

    def __init__(self, model: nn.Module, rows: BatchLayout, device: torch.device) -> None:
        super().__init__()
        self.model, self.rows, self.device = model, rows, device

    def forward(self, examples: Sequence[Example], expected: float) -> tuple[Tensor, Tensor]:
        return token_losses(self.model, examples, self.rows, self.device, expected)


def token_losses(
    model: nn.Module, examples: Sequence[Example], rows: BatchLayout, device: torch.device, expected: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Loss of every supervised token, (supervised,) float32, and the place in `examples` of each, (supervised,).

    expected: the gradient that each loss will get, if known; half precision then rounds once less.
    """
    batch, owners = as_batch(examples, rows.packed, rows.pad_id, device)
    return FORMS[rows.loss](model, replace(batch, expected=expected)), owners


def as_batch(examples: Sequence[Example], packed: bool, pad_id: int, device: torch.device) -> tuple[Batch, Tensor]:
    """The examples as the model reads them, and the place in `examples` of each supervised token, (supervised,)."""
    if packed:
        row = collate_packed(examples)
        ends = row["cu_seq_lens"]  # (documents + 1,), stays on the CPU, where it is read
        places = {"position_ids": row["position_ids"].to(device), "cu_seq_lens_q": ends}
        batch = _judged(row, places, device)
        at = batch.wanted[0].nonzero()[:, 0]
        return batch, torch.searchsorted(ends[1:].to(at), at, right=True)
    padded = collate_padded(examples, pad_id)
    batch = _judged(padded, {"attention_mask": padded["attention_mask"].to(device)}, device)
    return batch, batch.wanted.nonzero()[:, 0]


def _judged(tensors: dict[str, Tensor], others: dict[str, Any], device: torch.device) -> Batch:
    labels = F.pad(tensors["labels"][:, 1:], (0, 1), value=IGNORED).to(device)  # (batch, length), of the next token
    wanted = labels != IGNORED
    return Batch({"input_ids": tensors["input_ids"].to(device), **others}, wanted, labels[wanted])


# ---- Held-out loss, per example, in batches that never need more memory than training did.


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Sums in nats and counts of supervised tokens, one of each per example."""

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
    rows: BatchLayout,
    token_budget: int,
    device: torch.device | None = None,
) -> Evaluation:
    """Loss of every example without dropout or gradients; bitwise the same each time.

    token_budget: most tokens in one forward, padding included; a longer example goes alone.
    """
    device = device or next(model.parameters()).device
    sums = np.zeros(len(examples))
    attention = packed_rows(model.base_model) if rows.packed else nullcontext()
    with torch.no_grad(), evaluating(model), attention:
        for batch in budgeted(examples.lengths, token_budget, rows.packed):
            losses, owners = token_losses(model, [examples[i] for i in batch], rows, device)
            np.add.at(sums, batch[owners.cpu().numpy()], losses.cpu().double().numpy())
    return Evaluation(sums, examples.supervised.astype(np.int64))


def budgeted(lengths: npt.NDArray[np.int64], token_budget: int, packed: bool) -> Iterator[npt.NDArray[np.int64]]:
    """Indices in batches of similar length, each within the budget; the longest come first, where memory shows."""
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
