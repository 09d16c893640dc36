"""Held-out loss, per example, in batches that never need more memory than training did."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from tailora.core.modes import evaluating
from tailora.data.dataset import Examples
from tailora.kernels.attention import packed_rows
from tailora.train.loss import Rows, token_losses
from tailora.train.subject import Subject


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
    model: Subject,
    examples: Examples,
    *,
    rows: Rows,
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
