"""Causal attention within the documents of a packed row on a CPU: a torch operator with its own backward.

Every document is computed in one of two ways, chosen by its length and the dtype (`flash_thresholds`):

    flash     torch's FlashAttention for CPUs (arXiv:2205.14135), one document at a time
    blocks    batched products of BLOCK queries with the keys that they attend to; documents of similar length together

Both keep q, k, v, the output and at most one number per query for the backward, and compute probabilities again.

Shapes: q (tokens, heads, width), k and v (tokens, key heads, width).
"""

import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.torch_version import TorchVersion

from tailora.core.device import cpu_flags
from tailora.core.float32_products import REPLACEMENTS, pays

ROUND = 32  # lengths are rounded up to a multiple: oneDNN compiles every product's shape anew, 1 ms and .7 MB each
BLOCK = 128  # queries at a time: products large enough to be fast, probabilities small enough for the cache


class FlashThresholds(NamedTuple):
    """Lengths in tokens from which a document is computed by flash attention, unless a sliding window cuts it."""

    forward: int
    both: int  # forward and backward; flash's backward needs the sums from flash's forward


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


# ---- The operator
#
# It reads the documents' lengths inside, so that a compiler sees one call whatever their number. autograd keeps q, k, v
# and the two results.


def attention(q: Tensor, k: Tensor, v: Tensor, cu_seq_lens: Tensor, scale: float, window: int | None) -> Tensor:
    """Returns causal attention within each document, (tokens, heads, width).

    cu_seq_lens: (documents + 1,), where documents begin and the last ends.
    window: tokens that a token attends to, itself among them.
    """
    width = v.shape[-1]
    if width != q.shape[-1]:  # the operator has one width; zeros change neither scores nor outputs
        widest = max(width, q.shape[-1])
        q, k, v = (F.pad(heads, (0, widest - heads.shape[-1])) for heads in (q, k, v))
        return attention(q, k, v, cu_seq_lens, scale, window)[..., :width]
    output: Tensor = _forward_operator(q, k, v, cu_seq_lens, scale, window)[0]
    return output


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seq_lens: Tensor, scale: float, window: int | None, in_float32: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns (tokens, heads, width), and the logarithms of flash's sums, (tokens, heads). in_float32: converts."""
    if in_float32:
        output, log_sums = forward(q.float(), k.float(), v.float(), cu_seq_lens, scale, window)
        return output.to(q.dtype), log_sums
    threshold = flash_thresholds(q.dtype).forward
    groups, single = split_documents(tuple(cu_seq_lens.tolist()), threshold, window, q.device)
    out = q.new_empty(len(q) + 1, *q.shape[1:])  # the last row is where padding writes
    log_sums = q.new_zeros(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    for group in groups:
        out.index_copy_(0, group.write, _blocks_forward(_read(q, k, v, group, scale), group, window))
    for rows in single:
        output, sums = flash_op(*_flash_heads(q[rows], k[rows], v[rows]), 0.0, True, scale=scale)
        out[rows], log_sums[rows] = output[0].transpose(0, 1), sums[0].transpose(0, 1)
    return out[:-1], log_sums


def backward(
    gradient: Tensor,  # (tokens, heads, width)
    q: Tensor,
    k: Tensor,
    v: Tensor,
    output: Tensor,
    log_sums: Tensor,
    cu_seq_lens: Tensor,
    scale: float,
    window: int | None,
    in_float32: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v, in their shapes. output, log_sums: what `forward` returned."""
    if in_float32:
        g, wide_q, wide_k, wide_v, y = (x.float() for x in (gradient, q, k, v, output))
        dq, dk, dv = backward(g, wide_q, wide_k, wide_v, y, log_sums, cu_seq_lens, scale, window)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
    threshold = flash_thresholds(q.dtype).both
    groups, single = split_documents(tuple(cu_seq_lens.tolist()), threshold, window, q.device)
    gradients = [x.new_empty(len(x) + 1, *x.shape[1:]) for x in (q, k, v)]
    for group in groups:
        padded = gradient.index_select(0, group.read).mul_(group.is_token)
        heads = _by_key_head(padded, group, k.shape[1])
        parts: Sequence[Tensor] = _blocks_backward(heads, _read(q, k, v, group, scale), group, scale, window)
        for total, part in zip(gradients, parts, strict=True):
            total.index_copy_(0, group.write, part)
    for rows in single:
        parts = _flash_backward(gradient[rows], q[rows], k[rows], v[rows], output[rows], log_sums[rows], scale)
        for total, part in zip(gradients, parts, strict=True):
            total[rows] = part
    dq, dk, dv = (total[:-1] for total in gradients)
    return dq, dk, dv


_forward_operator = torch.library.custom_op("tailora::packed_attention", forward, mutates_args=())
_backward_operator = torch.library.custom_op("tailora::packed_attention_backward", backward, mutates_args=())


@_forward_operator.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    log_sums = q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape), log_sums


@_backward_operator.register_fake
def _(_: Tensor, q: Tensor, k: Tensor, v: Tensor, *__: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.window, ctx.in_float32 = inputs
    q, k, v, cu_seq_lens = tensors
    ctx.save_for_backward(q, k, v, *output, cu_seq_lens)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _backward_operator(gradient, *ctx.saved_tensors, ctx.scale, ctx.window, ctx.in_float32)
    return *gradients, None, None, None, None


_forward_operator.register_autograd(_backward, setup_context=_save_for_backward)


def _in_float32(tokens: int, func: Any, args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Any:
    heads = args[0].shape[1]  # of q
    return func(*args[:6], True) if pays(tokens * heads, args[0]) else None


REPLACEMENTS[torch.ops.tailora.packed_attention.default] = _in_float32


# ---- Which documents are computed together


@dataclass(frozen=True)
class DocumentGroup:
    """Documents that are computed together, each padded to `length` tokens."""

    count: int
    length: int
    read: Tensor  # (count * length,) positions in the row; padding reads the document's last token
    write: Tensor  # the same; padding writes to a position behind the row's end
    is_token: Tensor  # (count * length, 1, 1), False for padding


@lru_cache(maxsize=32)  # every layer of a model asks for the same
def split_documents(
    ends: tuple[int, ...], threshold: int, window: int | None, device: torch.device
) -> tuple[tuple[DocumentGroup, ...], tuple[slice, ...]]:
    """Returns groups of documents for blocks, and the positions of others. ends: where they begin and the last ends."""
    by_length: dict[int, list[slice]] = {}
    single = []
    for start, stop in itertools.pairwise(ends):
        length = stop - start
        if length < threshold or (window is not None and window < length):
            by_length.setdefault(math.ceil(length / ROUND) * ROUND, []).append(slice(start, stop))
        else:
            single.append(slice(start, stop))
    groups = []
    for rounded, documents in by_length.items():
        first = torch.tensor([document.start for document in documents])[:, None]
        last = torch.tensor([document.stop for document in documents])[:, None] - 1
        position = first + torch.arange(rounded)  # (documents, rounded)
        read, is_token = position.minimum(last).flatten(), (position <= last).flatten()
        write = torch.where(is_token, read, ends[-1])
        tensors = (x.to(device) for x in (read, write, is_token[:, None, None]))
        groups.append(DocumentGroup(len(documents), rounded, *tensors))
    return tuple(groups), tuple(single)


# ---- Flash


flash_op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward_op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
READS_SHARED_HEADS = TorchVersion(torch.__version__) >= "2.10"  # before, every query head needs separate keys


def _flash_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, log_sums: Tensor, scale: float
) -> tuple[Tensor, ...]:
    """Returns the gradients of one document's q, k and v."""
    g, before, sums = (x.transpose(0, 1)[None] for x in (gradient, output, log_sums))
    parts = flash_backward_op(g, *_flash_heads(q, k, v), before, sums, 0.0, True, scale=scale)
    if not READS_SHARED_HEADS:
        parts = [torch.unflatten(part, 1, (x.shape[1], -1)).sum(2) for part, x in zip(parts, (q, k, v), strict=True)]
    return tuple(part[0].transpose(0, 1) for part in parts)


def _flash_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(length, heads, width) -> (1, heads, length, width)."""
    if not READS_SHARED_HEADS:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    qs, ks, vs = (x.transpose(0, 1)[None] for x in (q, k, v))
    return qs, ks, vs


# ---- Blocks
#
# Query heads that share a key head become rows of one product, so keys are never repeated. A block is BLOCK queries and
# the keys that they attend to, so no work is done beyond the diagonal or outside a sliding window. The backward
# computes the probabilities again, block by block (FlashAttention, sec. 3.1).


Rows = Tensor  # (count * length, heads, width)


class Heads(NamedTuple):
    q: Tensor  # (count * key heads, group, length, width), scaled
    k: Tensor  # (count * key heads, length, width)
    v: Tensor


def _blocks_forward(heads: Heads, group: DocumentGroup, window: int | None) -> Rows:
    parts = []
    for queries, keys in _blocks(group.length, window):
        p = _probabilities(heads, queries, keys, window)
        parts.append(_unflatten(torch.bmm(p, heads.v[:, keys]), heads.q))
    joined = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)  # (count * key heads, group, length, width)
    return _by_token(joined, group)


def _blocks_backward(
    gradient: Tensor,  # (count * key heads, group, length, width)
    heads: Heads,
    group: DocumentGroup,
    scale: float,
    window: int | None,
) -> tuple[Rows, Rows, Rows]:
    parts, dk, dv = [], torch.zeros_like(heads.k), torch.zeros_like(heads.v)
    for queries, keys in _blocks(group.length, window):
        p = _probabilities(heads, queries, keys, window)
        g = gradient[:, :, queries].flatten(1, 2)
        dp = torch.bmm(g, heads.v[:, keys].transpose(1, 2))
        ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype)
        parts.append(_unflatten(torch.bmm(ds, heads.k[:, keys]), heads.q))
        dk[:, keys].baddbmm_(ds.transpose(1, 2), heads.q[:, :, queries].flatten(1, 2))
        dv[:, keys].baddbmm_(p.transpose(1, 2), g)
    dq = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)).mul_(scale)
    return _by_token(dq, group), _by_token(dk[:, None], group), _by_token(dv[:, None], group)


def _blocks(length: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Yields the queries of every block, and the keys that they attend to."""
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        yield slice(start, stop), slice(0 if window is None else max(start - window + 1, 0), stop)


def _probabilities(heads: Heads, queries: slice, keys: slice, window: int | None) -> Tensor:
    """Returns (count * key heads, group * queries, keys)."""
    q, k = heads.q[:, :, queries], heads.k[:, keys]  # q (count * key heads, group, queries, width)
    scores = torch.bmm(q.flatten(1, 2), k.transpose(1, 2))
    offset, count = queries.start - keys.start, q.shape[2]  # query i is at position offset + i of the keys
    by_query = torch.unflatten(scores, 1, (-1, count))  # (count * key heads, group, queries, keys)
    by_query[..., offset:] += q.new_full((count, count), -math.inf).triu_(1)
    if window is not None and offset + count > window:
        by_query += q.new_full((count, offset + count), -math.inf).tril_(offset - window)
    return torch.softmax(scores, dim=-1)


def _unflatten(rows: Tensor, q: Tensor) -> Tensor:
    """(count * key heads, group * queries, width) -> (count * key heads, group, queries, width)."""
    return rows.view(q.shape[0], q.shape[1], -1, q.shape[-1])


def _read(q: Tensor, k: Tensor, v: Tensor, group: DocumentGroup, scale: float) -> Heads:
    qs, ks, vs = (_by_key_head(x.index_select(0, group.read), group, k.shape[1]) for x in (q, k, v))
    return Heads(qs.mul_(scale), ks[:, 0], vs[:, 0])


def _by_key_head(rows: Rows, group: DocumentGroup, key_heads: int) -> Tensor:
    """(count * length, heads, width) -> (count * key heads, group, length, width), contiguous."""
    split = rows.view(group.count, group.length, key_heads, -1, rows.shape[-1])
    return split.permute(0, 2, 3, 1, 4).flatten(0, 1).contiguous()


def _by_token(heads: Tensor, group: DocumentGroup) -> Rows:
    """The inverse of `_by_key_head`: (count * key heads, group, length, width) -> (count * length, heads, width)."""
    width = heads.shape[-1]
    split = heads.view(group.count, -1, heads.shape[1], group.length, width).permute(0, 3, 1, 2, 4)
    return split.reshape(group.count * group.length, -1, width)  # key heads and group together
