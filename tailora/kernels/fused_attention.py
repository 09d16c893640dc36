"""Causal attention within the documents of a packed row as a forward and a backward, for the fused decoder layers.

`kernels.llama` computes a whole layer as one autograd Function, so it needs the backward of attention as a function.
(Other models use `kernels.attention`, which autograd differentiates.)

    group_documents      documents of similar length are computed together, padded at the end
    attention_forward    computes every group in one of two ways, chosen by length:
                           flash     torch's FlashAttention for CPUs (arXiv:2205.14135)
                           blocks    batched products of BLOCK queries with the keys that they attend to
    attention_backward   computes the gradients in the same way

`flash_thresholds` says which is faster. In float32 flash takes half the time of blocks, or less; in bfloat16 without
AMX twice as long. Forward and backward of 9 heads of 64 over 3 key heads, 4 documents of 256, one core: 20 ms against
37 in float32.

Shapes: q (tokens, heads, width), k and v (tokens, key heads, width).
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from tailora.core.device import cpu_flags
from tailora.kernels.attention import BLOCK, ROUND


@dataclass(frozen=True)
class DocumentGroup:
    """Documents that are computed together, each padded to `length` tokens."""

    count: int
    length: int
    read: Tensor  # (count * length,) positions in the row; padding reads the document's last token
    write: Tensor  # the same; padding writes to a position behind the row's end


@lru_cache(maxsize=32)  # every layer of a model asks for the same
def group_documents(lengths: tuple[int, ...], device: torch.device) -> tuple[DocumentGroup, ...]:
    """Returns the row's documents, grouped by rounded length."""
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        groups.setdefault(math.ceil(length / ROUND) * ROUND, []).append(index)
    result = []
    for rounded, indices in groups.items():
        first = torch.tensor([starts[index] for index in indices])[:, None]
        last = torch.tensor([lengths[index] for index in indices])[:, None] - 1
        column = torch.arange(rounded)
        read = first + column.minimum(last)  # (documents, rounded)
        write = torch.where(column <= last, read, sum(lengths))
        result.append(DocumentGroup(len(indices), rounded, read.flatten().to(device), write.flatten().to(device)))
    return tuple(result)


# ---- Flash or blocks


class FlashThresholds(NamedTuple):
    """Lengths in tokens from which a document is computed by flash attention, unless a sliding window cuts it."""

    forward: int
    both: int  # forward and backward; flash's backward needs the sums of its own forward


FLASH_ONLY = FlashThresholds(0, 0)
BLOCKS_ONLY = FlashThresholds(sys.maxsize, sys.maxsize)
# bfloat16 with AMX: a layer of 9 heads of 64 over 3 key heads takes .98 of its time in blocks with documents of 256
# tokens, .92 with one of 1024, .87 with one of 2048 (two threads); flash's backward is even at 1024 and slower below
WITH_AMX = FlashThresholds(256, 1024)


def flash_thresholds(dtype: torch.dtype) -> FlashThresholds:
    """Returns what was measured to be fastest on a CPU."""
    if dtype != torch.bfloat16:
        return FLASH_ONLY
    return WITH_AMX if "amx_bf16" in cpu_flags() else BLOCKS_ONLY


class SavedHeads(NamedTuple):
    """What the backward of a group needs.

    For blocks q is (count * key heads, group, length, width), k and v (count * key heads, length, width); for flash
    they are (count, heads or key heads, length, width).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_sums: Tensor | None  # of flash: logarithm of every softmax's sum, (count, heads, length)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: tuple[DocumentGroup, ...],
    scale: float,
    window: int | None,
    thresholds: FlashThresholds,
) -> tuple[Tensor, list[SavedHeads]]:
    """Returns (tokens, heads, width), and what the backward needs."""
    tokens, heads, width = q.shape
    out = q.new_empty(tokens + 1, heads, width)  # the last position is where padding writes
    saved = []
    for group in groups:
        if group.length < thresholds.forward or (window is not None and window < group.length):
            rows, group_heads = _blocks_forward(q, k, v, group, scale, window)
        else:
            rows, group_heads = _flash_forward(q, k, v, group, scale, blocks_backward=group.length < thresholds.both)
        out.index_copy_(0, group.write, rows)
        saved.append(group_heads)
    return out[:tokens], saved


def attention_backward(
    gradient: Tensor,  # (tokens + 1, heads, width), its last row zero
    output: Tensor,  # (tokens, heads, width), of the forward
    saved: list[SavedHeads],
    groups: tuple[DocumentGroup, ...],
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v, in their shapes."""
    key_heads = saved[0].k.shape[:-2].numel() // groups[0].count
    dq = torch.empty_like(gradient)
    dk, dv = (gradient.new_empty(len(gradient), key_heads, gradient.shape[-1]) for _ in range(2))
    for group, heads in zip(groups, saved, strict=True):
        rows = gradient.index_select(0, group.write)  # zero for padding
        if heads.log_sums is None:
            parts = _blocks_backward(_by_key_head(rows, group, key_heads), heads, group, scale, window)
        else:
            parts = _flash_backward(rows, output, heads, group, scale)
        for total, part in zip((dq, dk, dv), parts, strict=True):
            total.index_copy_(0, group.write, part)
    return dq[:-1], dk[:-1], dv[:-1]


Rows = Tensor  # (count * length, heads, width)


flash_op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward_op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, group: DocumentGroup, scale: float, blocks_backward: bool
) -> tuple[Rows, SavedHeads]:
    """blocks_backward: the backward is that of blocks, so what it needs is returned in its shapes."""
    if blocks_backward:
        heads = _gather(q, k, v, group)
        qs, ks, vs = (part.view(group.count, -1, group.length, part.shape[-1]) for part in (heads.q, heads.k, heads.v))
    else:
        qs, ks, vs = (_split(part.index_select(0, group.read), group) for part in (q, k, v))
    shared_by = q.shape[1] // k.shape[1]
    output, log_sums = flash_op(qs, _repeated(ks, shared_by), _repeated(vs, shared_by), 0.0, True, scale=scale)
    return _joined(output), heads if blocks_backward else SavedHeads(qs, ks, vs, log_sums)


def _flash_backward(
    gradient: Rows, output: Tensor, heads: SavedHeads, group: DocumentGroup, scale: float
) -> tuple[Rows, Rows, Rows]:
    assert heads.log_sums is not None
    shared_by = heads.q.shape[1] // heads.k.shape[1]
    keys, values = _repeated(heads.k, shared_by), _repeated(heads.v, shared_by)
    before = _split(output.index_select(0, group.read), group)
    dq, dk, dv = flash_backward_op(
        _split(gradient, group), heads.q, keys, values, before, heads.log_sums, 0.0, True, scale=scale
    )
    return _joined(dq), _joined(_summed(dk, shared_by)), _joined(_summed(dv, shared_by))


def _repeated(heads: Tensor, count: int) -> Tensor:
    """Repeats each key head for every query head that reads it; older versions of torch require this."""
    return heads if count == 1 else heads.repeat_interleave(count, dim=1)


def _summed(heads: Tensor, count: int) -> Tensor:
    """Sums the gradients of the repeated key heads."""
    return heads if count == 1 else torch.unflatten(heads, 1, (-1, count)).sum(dim=2)


def _split(rows: Rows, group: DocumentGroup) -> Tensor:
    """Returns (count, heads, length, width), a view."""
    return rows.view(group.count, group.length, *rows.shape[1:]).transpose(1, 2)


def _joined(heads: Tensor) -> Rows:
    return heads.transpose(1, 2).flatten(0, 1)


# ---- Blocks
#
# Query heads that share a key head become rows of one product, so keys are never repeated. A block is BLOCK queries and
# the keys that they attend to, so no work is done beyond the diagonal or outside a sliding window. The backward
# computes the probabilities again, block by block (FlashAttention, sec. 3.1).


def _blocks_forward(
    q: Tensor, k: Tensor, v: Tensor, group: DocumentGroup, scale: float, window: int | None
) -> tuple[Rows, SavedHeads]:
    heads = _gather(q, k, v, group)
    parts = []
    for queries, keys in _blocks(group.length, window):
        p = _probabilities(heads.q, heads.k, scale, window, queries, keys)
        parts.append(_unflatten(torch.bmm(p, heads.v[:, keys]), heads.q))
    joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)  # (count * key heads, group, length, width)
    return _by_token(joined, group), heads


def _blocks_backward(
    gradient: Tensor,  # (count * key heads, group, length, width)
    heads: SavedHeads,
    group: DocumentGroup,
    scale: float,
    window: int | None,
) -> tuple[Rows, Rows, Rows]:
    parts, dk, dv = [], torch.zeros_like(heads.k), torch.zeros_like(heads.v)
    for queries, keys in _blocks(group.length, window):
        p = _probabilities(heads.q, heads.k, scale, window, queries, keys)
        g = gradient[:, :, queries].flatten(1, 2)
        dp = torch.bmm(g, heads.v[:, keys].transpose(1, 2))
        ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype).mul_(scale)
        parts.append(_unflatten(torch.bmm(ds, heads.k[:, keys]), heads.q))
        dk[:, keys].baddbmm_(ds.transpose(1, 2), heads.q[:, :, queries].flatten(1, 2))
        dv[:, keys].baddbmm_(p.transpose(1, 2), g)
    dq = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return _by_token(dq, group), _by_token(dk[:, None], group), _by_token(dv[:, None], group)


def _blocks(length: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Yields the queries of every block, and the keys that they attend to."""
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        yield slice(start, stop), slice(0 if window is None else max(start - window + 1, 0), stop)


def _probabilities(q: Tensor, k: Tensor, scale: float, window: int | None, queries: slice, keys: slice) -> Tensor:
    """Returns (count * key heads, group * queries, keys)."""
    offset, count = queries.start - keys.start, queries.stop - queries.start
    # (queries, keys), -inf where query i, at position offset + i of the keys, does not attend
    mask = q.new_full((count, offset + count), -math.inf).triu_(offset + 1)
    if window is not None and offset + count > window:
        mask += torch.full_like(mask, -math.inf).tril_(offset - window)
    mask = mask.repeat(q.shape[1], 1)[None]  # (1, group * queries, keys)
    scores = torch.baddbmm(mask, q[:, :, queries].flatten(1, 2), k[:, keys].transpose(1, 2), alpha=scale)
    return torch.softmax(scores, dim=-1)


def _unflatten(rows: Tensor, q: Tensor) -> Tensor:
    """(count * key heads, group * queries, width) -> (count * key heads, group, queries, width)."""
    return rows.view(q.shape[0], q.shape[1], -1, q.shape[-1])


def _gather(q: Tensor, k: Tensor, v: Tensor, group: DocumentGroup) -> SavedHeads:
    """Returns q (count * key heads, group, length, width); k, v (count * key heads, length, width)."""
    key_heads = k.shape[1]
    qs, ks, vs = (_by_key_head(part.index_select(0, group.read), group, key_heads) for part in (q, k, v))
    return SavedHeads(qs, ks[:, 0], vs[:, 0], None)


def _by_key_head(rows: Rows, group: DocumentGroup, key_heads: int) -> Tensor:
    """(count * length, heads, width) -> (count * key heads, group, length, width), contiguous."""
    split = rows.view(group.count, group.length, key_heads, -1, rows.shape[-1])
    return split.permute(0, 2, 3, 1, 4).flatten(0, 1).contiguous()


def _by_token(heads: Tensor, group: DocumentGroup) -> Rows:
    """The inverse of `_by_key_head`: (count * key heads, group, length, width) -> (count * length, heads, width)."""
    width = heads.shape[-1]
    split = heads.view(group.count, -1, heads.shape[1], group.length, width).permute(0, 3, 1, 2, 4)
    return split.reshape(group.count * group.length, -1, width)  # key heads and group together
