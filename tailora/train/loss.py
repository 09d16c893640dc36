"""Losses in nats at the supervised positions, and at no other: their logits are all that is computed.

A batch is either one packed row (1, total) or padded rows (batch, longest). Position i predicts token i + 1; the first
label of each document is -100, so no prediction crosses a boundary.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tailora.data.batches import collate_packed, collate_padded
from tailora.data.store import IGNORED, Example
from tailora.fast.loss import cross_entropy


@dataclass(frozen=True)
class Rows:
    """How examples become the model's input, and whether it computes logits at chosen positions only."""

    packed: bool
    keeps_logits: bool
    pad_id: int


def keeps_logits(model: nn.Module) -> bool:
    """Whether the model takes `logits_to_keep`: the positions whose logits are wanted."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def token_losses(
    model: nn.Module, examples: Sequence[Example], rows: Rows, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Loss of every supervised token, (supervised,) float32, and the place in `examples` of each, (supervised,)."""
    if rows.packed:
        return _packed_losses(model, examples, rows, device)
    batch = {name: tensor.to(device) for name, tensor in collate_padded(examples, rows.pad_id).items()}
    targets = batch.pop("labels")[:, 1:]
    wanted = targets != IGNORED  # (batch, longest - 1)
    if rows.keeps_logits:
        columns = wanted.any(dim=0).nonzero()[:, 0]
        logits = model(**batch, use_cache=False, logits_to_keep=columns).logits[wanted[:, columns]]
    else:
        logits = model(**batch, use_cache=False).logits[:, :-1][wanted]  # (supervised, vocabulary)
    return cross_entropy(logits, targets[wanted]), wanted.nonzero()[:, 0]


def _packed_losses(
    model: nn.Module, examples: Sequence[Example], rows: Rows, device: torch.device
) -> tuple[Tensor, Tensor]:
    batch = collate_packed(examples)
    ends = batch["cu_seq_lens"]  # (documents + 1,), stays on the CPU, where it is read
    targets = batch["labels"][0, 1:]
    at = (targets != IGNORED).nonzero()[:, 0]
    owners = torch.searchsorted(ends[1:].long(), at, right=True)
    kept = {"logits_to_keep": at.to(device)} if rows.keeps_logits else {}
    output = model(
        input_ids=batch["input_ids"].to(device),
        position_ids=batch["position_ids"].to(device),
        cu_seq_lens_q=ends,
        use_cache=False,
        **kept,
    )
    logits = output.logits[0] if rows.keeps_logits else output.logits[0, at.to(device)]  # (supervised, vocabulary)
    return cross_entropy(logits, targets[at].to(device)), owners.to(device)
