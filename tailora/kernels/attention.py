"""Attention for packed rows: every document of the row attends to itself alone.

A packed row is (1, total) tokens; `cu_seq_lens_q` (documents + 1,) says where its documents start and end, and reaches
this function through the model's keyword arguments, by transformers' attention registry. So no mask of total x total
exists, and no work is done for pairs of tokens from different documents.

Each document goes to torch's own attention, with one exception: in bf16 on a CPU, documents of up to 512 tokens take
batched products in causal blocks, which autograd differentiates, because torch's attention gains nothing from bf16
there. Forward and backward of 9 heads of 64 over 3 key heads on one core: .9 ms against 1.8 for 90 tokens, 2.9 against
3.8 for 256, 8.5 against 11.6 for 512. The blocks keep their probabilities, length^2 numbers, hence the limit. In
float32 torch is as fast.

Left out: attention sinks, position biases and soft caps, which are refused by name.
"""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from tailora.kernels.products import cpu_flags

NAME = "tailora_packed"
SHORT = 512  # tokens of a document that is computed in blocks
ROUND = 32  # lengths are rounded up to a multiple: oneDNN compiles every product's shape anew, 1 ms and .7 MB each
BLOCK = 128  # queries at a time: products large enough to be fast, probabilities small enough for the cache
REFUSED = ("softcap", "s_aux", "position_bias", "head_mask")


class PackingError(ValueError):
    """The model asks its attention for something that packed rows do not have."""


def packed_attention(
    module: nn.Module,
    query: Tensor,  # (1, heads, total, width)
    key: Tensor,  # (1, key heads, total, width)
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document: (1, total, heads, width), and no weights. Raises PackingError."""
    if cu_seq_lens_q is None:
        raise PackingError("the model did not hand cu_seq_lens_q on to its attention")
    refused = [name for name in REFUSED if kwargs.get(name) is not None]
    if attention_mask is not None:
        refused.append("an attention mask")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        refused.append("attention to later tokens")
    if key.shape[2] != query.shape[2]:
        refused.append("keys from elsewhere")
    if refused:
        raise PackingError(f"the attention of {type(module).__name__} asks for {', '.join(refused)}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    lengths = cu_seq_lens_q.diff().tolist()
    documents = list(zip(*(torch.split(heads, lengths, dim=2) for heads in (query, key, value)), strict=True))
    in_blocks = query.device.type == "cpu" and query.dtype == torch.bfloat16 and not dropout
    groups: dict[int, list[int]] = {}  # rounded length -> documents computed together; each long one on its own
    outputs: list[Tensor] = [query] * len(documents)
    for place, length in enumerate(lengths):
        if in_blocks and length <= min(SHORT, sliding_window or SHORT):
            groups.setdefault(-(-length // ROUND) * ROUND, []).append(place)
        else:
            outputs[place] = _alone(documents[place], scale, dropout, sliding_window)
    for rounded, places in groups.items():
        together = _attend_together([documents[place] for place in places], rounded, scale)
        for place, output in zip(places, together, strict=True):
            outputs[place] = output[None, :, : lengths[place]]
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1), None


def _alone(document: tuple[Tensor, ...], scale: float, dropout: float, window: int | None) -> Tensor:
    """torch's attention of one document: (1, heads, length, width)."""
    q, k, v = document
    length = q.shape[2]
    mask = _window(length, window, q.device) if window is not None and window < length else None
    grouped = k.shape[1] != q.shape[1]
    if grouped and q.device.type == "cuda" and (mask is not None or q.dtype == torch.float32):
        # of torch's kernels for these only the one that keeps all scores takes grouped heads
        k, v = (heads.repeat_interleave(q.shape[1] // heads.shape[1], dim=1) for heads in (k, v))
        grouped = False
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )


def _window(length: int, window: int, device: torch.device) -> Tensor:
    """True where a token may look: itself and the `window` - 1 tokens before it. (length, length) of one document."""
    position = torch.arange(length, device=device)
    back = position[:, None] - position
    return (back >= 0) & (back < window)


def _attend_together(documents: list[tuple[Tensor, ...]], rounded: int, scale: float) -> Tensor:
    """Attention of documents of about one length, padded at the end, where no earlier token looks.

    (documents, heads, rounded, width). The query heads that share a key head are laid out as rows, so that keys are
    never repeated.
    """
    q, k, v = (
        torch.cat([F.pad(part, (0, 0, 0, rounded - part.shape[2])) for part in parts])
        for parts in zip(*documents, strict=True)
    )
    count, heads, _, width = q.shape
    batch = count * k.shape[1]  # documents * key heads
    grouped = (q * scale).view(batch, -1, rounded, width)  # (batch, group, rounded, width)
    keys, values = k.view(batch, rounded, width), v.view(batch, rounded, width)
    blocks = [_block(grouped, keys, values, start) for start in range(0, rounded, BLOCK)]
    return torch.cat(blocks, dim=2).view(count, heads, rounded, width)


def _block(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
    """Attention of one block of queries to all keys up to their own: (batch, group, block, width)."""
    stop = min(start + BLOCK, k.shape[1])
    rows = q[:, :, start:stop].flatten(1, 2)  # (batch, group * block, width)
    scores = torch.bmm(rows, k[:, :stop].transpose(1, 2)).view(len(q), -1, stop - start, stop)
    later = torch.full((stop - start, stop - start), float("-inf"), dtype=q.dtype).triu_(1)
    scores[..., start:].add_(later)
    p = torch.softmax(scores, dim=-1).flatten(1, 2)  # sums in float32 inside, whatever the dtype
    return torch.bmm(p, v[:, :stop]).view(len(q), -1, stop - start, q.shape[-1])


def _no_mask(*, attention_mask: Tensor | None = None, **_: Any) -> None:
    if attention_mask is not None:
        raise PackingError("a packed row has no padding, yet an attention mask was given")


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, _no_mask)


@contextmanager
def packed_rows(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block the model's attention reads packed rows; afterwards it is what it was. Raises PackingError."""
    config = model.config
    parts = {name: part for name in config.sub_configs if (part := getattr(config, name)) is not None}
    before = {"": config._attn_implementation, **{name: part._attn_implementation for name, part in parts.items()}}
    if getattr(config, "attention_chunk_size", None) is not None:
        raise PackingError("the model attends in chunks (attention_chunk_size)")
    model.set_attn_implementation(NAME)
    try:
        if config._attn_implementation != NAME:
            raise PackingError(f"{type(model).__name__} does not let its attention be chosen")
        yield
    finally:
        model.set_attn_implementation(before)


# ---- torch's own attention on a CPU as a forward and a backward, for groups of documents of one length.
#
# It is FlashAttention (arXiv:2205.14135) in tiles that stay in the cache. In float32 it takes half the time of batched
# products in blocks, or less; in bfloat16 without AMX twice as long. Forward and backward of 9 heads of 64 over 3 key
# heads, 4 documents of 256, one core: 20 ms against 37 in float32.
#
# Shapes: q (documents, heads, length, width), k and v (documents, key heads, length, width).


attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def flash_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention like q, and the logarithm of every softmax's sum, (documents, heads, length)."""
    group = q.shape[1] // k.shape[1]
    output, log_sums = attention(q, _repeated(k, group), _repeated(v, group), 0.0, True, scale=scale)
    return output, log_sums


def flash_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, output: Tensor, log_sums: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, from that of the output and what the forward gave."""
    group = q.shape[1] // k.shape[1]
    keys, values = _repeated(k, group), _repeated(v, group)
    dq, dk, dv = attention_backward(gradient, q, keys, values, output, log_sums, 0.0, True, scale=scale)
    return dq, _summed(dk, group), _summed(dv, group)


def _repeated(heads: Tensor, group: int) -> Tensor:
    """Each key head once for every query head that reads it; older torch takes no fewer."""
    return heads if group == 1 else heads.repeat_interleave(group, dim=1)


def _summed(heads: Tensor, group: int) -> Tensor:
    return heads if group == 1 else torch.unflatten(heads, 1, (-1, group)).sum(dim=2)


# ---- Causal attention within the documents of a packed row, forward and backward, by batched products in blocks.
#
# Documents of about one length are computed together, padded at the end, where no earlier token looks. The query heads
# that share a key head are laid out as rows, so keys are never repeated. A block is BLOCK queries against the keys that
# they see, so no work is done beyond the diagonal or outside a sliding window. The backward computes the probabilities
# again (FlashAttention, arXiv:2205.14135, sec. 3.1), block by block. Where torch's own attention is faster (`Ways`), it
# takes the place of the blocks.
#
# Shapes: q (tokens, heads, width), k and v (tokens, key heads, width).


softmax_backward = torch.ops.aten._softmax_backward_data


@dataclass(frozen=True)
class Together:
    """Documents that are computed together, each padded to `length` tokens."""

    count: int
    length: int
    read: Tensor  # (count * length,) places in the row; padding reads the document's last token
    write: Tensor  # the same; padding writes to a place behind the row's end


class Ways(NamedTuple):
    """Tokens from which on a document, where no window cuts, takes torch's attention."""

    forward: int
    both: int  # with its backward, which takes the probabilities of no other forward


TORCHS = Ways(0, 0)
BLOCKS = Ways(sys.maxsize, sys.maxsize)
# bfloat16 with AMX: a layer of 9 heads of 64 over 3 key heads takes .98 of its time in blocks with documents of 256
# tokens, .92 with one of 1024, .87 with one of 2048 (two threads); torch's backward is even at 1024 and slower below
TILES = Ways(256, 1024)


def best_ways(dtype: torch.dtype) -> Ways:
    """What is fastest on a CPU, by measurement."""
    if dtype != torch.bfloat16:
        return TORCHS
    return TILES if "amx_bf16" in cpu_flags() else BLOCKS


class Kept(NamedTuple):
    """What the backward needs of documents computed together.

    In blocks q is (count * key heads, group, length, width), k and v (count * key heads, length, width); by torch's
    backward they are (count, heads or key heads, length, width).
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_sums: Tensor | None  # (count, heads, length) for torch's backward; None in blocks


@lru_cache(maxsize=32)  # every layer of a model asks for the same
def arranged(lengths: tuple[int, ...], device: torch.device) -> tuple[Together, ...]:
    """The row's documents, grouped by rounded length."""
    starts = [sum(lengths[:place]) for place in range(len(lengths))]
    groups: dict[int, list[int]] = {}
    for place, length in enumerate(lengths):
        groups.setdefault(math.ceil(length / ROUND) * ROUND, []).append(place)
    return tuple(_together(starts, lengths, places, rounded, device) for rounded, places in groups.items())


def _together(
    starts: list[int], lengths: tuple[int, ...], places: list[int], rounded: int, device: torch.device
) -> Together:
    first = torch.tensor([starts[place] for place in places])[:, None]
    own = torch.tensor([lengths[place] for place in places])[:, None]
    column = torch.arange(rounded)
    read = first + column.minimum(own - 1)  # (documents, rounded)
    write = torch.where(column < own, read, sum(lengths))
    return Together(len(places), rounded, read.flatten().to(device), write.flatten().to(device))


def forward(
    q: Tensor, k: Tensor, v: Tensor, documents: tuple[Together, ...], scale: float, window: int | None, ways: Ways
) -> tuple[Tensor, list[Kept]]:
    """(tokens, heads, width), and what the backward needs."""
    tokens, heads, width = q.shape
    out = q.new_empty(tokens + 1, heads, width)  # the last place takes what padding computes
    kept = []
    for each in documents:
        rows, own = _way(each, window, ways)(q, k, v, each, scale, window)
        out.index_copy_(0, each.write, rows)
        kept.append(own)
    return out[:tokens], kept


def backward(
    gradient: Tensor,  # (tokens + 1, heads, width), its last row zero
    output: Tensor,  # (tokens, heads, width), of the forward
    kept: list[Kept],
    documents: tuple[Together, ...],
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in their shapes."""
    key_heads = kept[0].k.shape[:-2].numel() // documents[0].count
    dq = torch.empty_like(gradient)
    dk, dv = (gradient.new_empty(len(gradient), key_heads, gradient.shape[-1]) for _ in range(2))
    for each, own in zip(documents, kept, strict=True):
        rows = gradient.index_select(0, each.write)  # zero for padding
        if own.log_sums is None:
            found = _blocks_backward(_by_head(rows, each, key_heads), own, each, scale, window)
        else:
            found = _flash_backward(rows, output, own, each, scale)
        for whole, part in zip((dq, dk, dv), found, strict=True):
            whole.index_copy_(0, each.write, part)
    return dq[:-1], dk[:-1], dv[:-1]


Rows = Tensor  # (count * length, heads, width)
Way = Callable[[Tensor, Tensor, Tensor, Together, float, int | None], tuple[Rows, Kept]]


def _way(each: Together, window: int | None, ways: Ways) -> Way:
    if window is not None and window < each.length:
        return _blocks_forward
    if each.length >= ways.both:
        return _flash_forward
    return _flash_before_blocks if each.length >= ways.forward else _blocks_forward


def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, each: Together, scale: float, _window: int | None
) -> tuple[Rows, Kept]:
    qs, ks, vs = (_apart(part.index_select(0, each.read), each) for part in (q, k, v))
    output, log_sums = flash_forward(qs, ks, vs, scale)
    return _joined(output), Kept(qs, ks, vs, log_sums)


def _flash_before_blocks(
    q: Tensor, k: Tensor, v: Tensor, each: Together, scale: float, _window: int | None
) -> tuple[Rows, Kept]:
    own = _gathered(q, k, v, each)
    qs, ks, vs = (part.view(each.count, -1, each.length, part.shape[-1]) for part in (own.q, own.k, own.v))
    output, _ = flash_forward(qs, ks, vs, scale)
    return _joined(output), own


def _flash_backward(gradient: Rows, output: Tensor, own: Kept, each: Together, scale: float) -> tuple[Rows, Rows, Rows]:
    assert own.log_sums is not None
    before = _apart(output.index_select(0, each.read), each)
    found = flash_backward(_apart(gradient, each), own.q, own.k, own.v, before, own.log_sums, scale)
    dq, dk, dv = map(_joined, found)
    return dq, dk, dv


def _apart(rows: Rows, each: Together) -> Tensor:
    """(count, heads, length, width), a view."""
    return rows.view(each.count, each.length, *rows.shape[1:]).transpose(1, 2)


def _joined(heads: Tensor) -> Rows:
    return heads.transpose(1, 2).flatten(0, 1)


def _blocks_forward(
    q: Tensor, k: Tensor, v: Tensor, each: Together, scale: float, window: int | None
) -> tuple[Rows, Kept]:
    own = _gathered(q, k, v, each)
    parts = []
    for block in _blocks(each.length, window):
        p = _probabilities(own.q, own.k, block, scale, window)
        parts.append(_by_group(torch.bmm(p, own.v[:, block.keys]), own.q))
    together = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)  # (count * key heads, group, length, width)
    return _by_token(together, each), own


def _blocks_backward(
    gs: Tensor,  # (count * key heads, group, length, width)
    own: Kept,
    each: Together,
    scale: float,
    window: int | None,
) -> tuple[Rows, Rows, Rows]:
    parts, k_gradient, v_gradient = [], torch.zeros_like(own.k), torch.zeros_like(own.v)
    for block in _blocks(each.length, window):
        p = _probabilities(own.q, own.k, block, scale, window)
        g, rows_q = gs[:, :, block.queries].flatten(1, 2), own.q[:, :, block.queries].flatten(1, 2)
        dp = torch.bmm(g, own.v[:, block.keys].transpose(1, 2))
        ds = softmax_backward(dp, p, -1, p.dtype).mul_(scale)
        parts.append(_by_group(torch.bmm(ds, own.k[:, block.keys]), own.q))
        k_gradient[:, block.keys].baddbmm_(ds.transpose(1, 2), rows_q)
        v_gradient[:, block.keys].baddbmm_(p.transpose(1, 2), g)
    together = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return _by_token(together, each), _by_token(k_gradient[:, None], each), _by_token(v_gradient[:, None], each)


class _Block(NamedTuple):
    queries: slice
    keys: slice


def _blocks(length: int, window: int | None) -> Iterator[_Block]:
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        yield _Block(slice(start, stop), slice(0 if window is None else max(start - window + 1, 0), stop))


def _probabilities(qs: Tensor, ks: Tensor, block: _Block, scale: float, window: int | None) -> Tensor:
    """(count * key heads, group * queries, keys)."""
    rows = qs[:, :, block.queries].flatten(1, 2)
    hidden = _hidden(block.queries.start - block.keys.start, block.queries.stop - block.queries.start, window, qs)
    mask = hidden.repeat(qs.shape[1], 1)[None]  # (1, group * queries, keys)
    return torch.softmax(torch.baddbmm(mask, rows, ks[:, block.keys].transpose(1, 2), alpha=scale), dim=-1)


def _by_group(rows: Tensor, qs: Tensor) -> Tensor:
    """(count * key heads, group * queries, width) -> (count * key heads, group, queries, width)."""
    return rows.view(qs.shape[0], qs.shape[1], -1, qs.shape[-1])


def _hidden(offset: int, queries: int, window: int | None, like: Tensor) -> Tensor:
    """-inf where query i, at place offset + i of the keys, may not look: (queries, offset + queries)."""
    shape = queries, offset + queries
    hidden = torch.full(shape, -math.inf, dtype=like.dtype, device=like.device).triu_(offset + 1)
    if window is not None and offset + queries > window:
        hidden += torch.full_like(hidden, -math.inf).tril_(offset - window)
    return hidden


def _gathered(q: Tensor, k: Tensor, v: Tensor, each: Together) -> Kept:
    """q (count * key heads, group, length, width); k, v (count * key heads, length, width)."""
    key_heads = k.shape[1]
    qs, ks, vs = (_by_head(part.index_select(0, each.read), each, key_heads) for part in (q, k, v))
    return Kept(qs, ks[:, 0], vs[:, 0], None)


def _by_head(rows: Tensor, each: Together, key_heads: int) -> Tensor:
    """(count * length, heads, width) -> (count * key heads, group, length, width), contiguous."""
    split = rows.view(each.count, each.length, key_heads, -1, rows.shape[-1])
    return split.permute(0, 2, 3, 1, 4).flatten(0, 1).contiguous()


def _by_token(heads: Tensor, each: Together) -> Tensor:
    """The way back: (count * length, heads, width)."""
    width = heads.shape[-1]
    split = heads.view(each.count, -1, heads.shape[1], each.length, width).permute(0, 3, 1, 2, 4)
    return split.reshape(each.count * each.length, -1, width)  # key heads and group together
