"""Attention for packed rows, for any model of transformers: every document of the row attends only to itself.

A packed row is (1, total) tokens; `cu_seq_lens_q` (documents + 1,) says where its documents start and end, and reaches
this function through the model's keyword arguments, by transformers' attention registry. So no mask of total x total
exists, and no work is done for pairs of tokens from different documents.

Each document is computed by torch's scaled_dot_product_attention, with one exception: in bf16 on a CPU, documents of up
to 512 tokens are computed by batched products in causal blocks, because torch's attention gains nothing from bf16
there. autograd differentiates both; the fused decoder layers have an attention of their own with an explicit backward,
`kernels.fused_attention`.

Forward and backward of 9 heads of 64 over 3 key heads on one core take .9 ms in blocks against 1.8 for 90 tokens, 2.9
against 3.8 for 256, 8.5 against 11.6 for 512. The blocks keep their probabilities, length^2 numbers, hence the limit.
In float32 torch is as fast.

Attention sinks, position biases and soft caps are not supported and raise PackingError.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

NAME = "tailora_packed"
SHORT = 512  # tokens of a document that is computed in blocks
ROUND = 32  # lengths are rounded up to a multiple: oneDNN compiles every product's shape anew, 1 ms and .7 MB each
BLOCK = 128  # queries at a time: products large enough to be fast, probabilities small enough for the cache
UNSUPPORTED = ("softcap", "s_aux", "position_bias", "head_mask")


class PackingError(ValueError):
    """The model asks its attention for something that packed rows do not support."""


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
    """Returns causal attention within each document, (1, total, heads, width), and no weights. Raises PackingError."""
    if cu_seq_lens_q is None:
        raise PackingError("the model did not pass cu_seq_lens_q on to its attention")
    unsupported = [name for name in UNSUPPORTED if kwargs.get(name) is not None]
    if attention_mask is not None:
        unsupported.append("an attention mask")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        unsupported.append("attention to later tokens")
    if key.shape[2] != query.shape[2]:
        unsupported.append("keys of another sequence")
    if unsupported:
        raise PackingError(f"the attention of {type(module).__name__} asks for {', '.join(unsupported)}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    lengths = cu_seq_lens_q.diff().tolist()
    documents = list(zip(*(torch.split(heads, lengths, dim=2) for heads in (query, key, value)), strict=True))
    in_blocks = query.device.type == "cpu" and query.dtype == torch.bfloat16 and not dropout
    groups: dict[int, list[int]] = {}  # rounded length -> documents computed together; each long one on its own
    outputs: list[Tensor] = [query] * len(documents)
    for index, length in enumerate(lengths):
        if in_blocks and length <= min(SHORT, sliding_window or SHORT):
            groups.setdefault(-(-length // ROUND) * ROUND, []).append(index)
        else:
            outputs[index] = _single_document(documents[index], scale, dropout, sliding_window)
    for rounded, group in groups.items():
        computed = _group_in_blocks([documents[index] for index in group], rounded, scale)
        for index, output in zip(group, computed, strict=True):
            outputs[index] = output[None, :, : lengths[index]]
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1), None


def _single_document(document: tuple[Tensor, ...], scale: float, dropout: float, window: int | None) -> Tensor:
    """Returns torch's attention of one document, (1, heads, length, width)."""
    q, k, v = document
    length = q.shape[2]
    mask = None
    if window is not None and window < length:  # a token attends to itself and to the `window` - 1 before it
        position = torch.arange(length, device=q.device)
        back = position[:, None] - position
        mask = (back >= 0) & (back < window)  # (length, length)
    grouped = k.shape[1] != q.shape[1]
    if grouped and q.device.type == "cuda" and (mask is not None or q.dtype == torch.float32):
        # here only that kernel of torch supports grouped heads which stores all scores
        k, v = (heads.repeat_interleave(q.shape[1] // heads.shape[1], dim=1) for heads in (k, v))
        grouped = False
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )


def _group_in_blocks(documents: list[tuple[Tensor, ...]], rounded: int, scale: float) -> Tensor:
    """Returns the attention of documents of similar length, (documents, heads, rounded, width).

    They are padded at the end, to which no earlier token attends. Query heads that share a key head become rows of one
    product, so that keys are never repeated.
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
    """Returns the attention of one block of queries to all keys up to their own, (batch, group, block, width)."""
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
    """Within the block the model's attention reads packed rows; afterwards it is restored. Raises PackingError."""
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
