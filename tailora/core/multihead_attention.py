"""nn.MultiheadAttention, whose two projections are read and never called: its forward with updates in their places."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tailora.errors import ShapeError


def attend(
    layer: Any,
    adapters: Sequence[Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What nn.MultiheadAttention computes (arXiv:1706.03762, sec. 3.2.2), with s B A x added to its projections.

    The updates stay products of two factors: W + s B A is never formed, and in 16 bits nothing of it is rounded away.
    """
    batched = query.dim() == 3
    if not batched and key_padding_mask is not None:
        key_padding_mask = key_padding_mask[None]
    query, key, value = _sequence_first(layer, query, key, value)
    if is_causal and attn_mask is None:
        raise ShapeError("is_causal is a hint about attn_mask; pass the mask, too")
    hinted = is_causal and key_padding_mask is None and not need_weights  # the hint is enough
    mask = _mask(layer, None if hinted else attn_mask, key_padding_mask, query, key)
    q, k, v = _project(layer, adapters, query, key, value)
    k, v, mask = _extended(layer, k, v, mask)
    dropout = layer.dropout if layer.training else 0.0
    size, weights = query.shape[1], None
    if need_weights:
        several = None if mask is None else mask.expand(size, layer.num_heads, -1, -1).flatten(0, 1)
        weights, heads = _weighted(q, k, v, several, dropout)
        weights = weights.view(size, layer.num_heads, *weights.shape[1:])
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        q, k, v = (each.view(size, layer.num_heads, *each.shape[1:]) for each in (q, k, v))
        heads = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=hinted).flatten(0, 1)
    y = _out(layer, adapters, heads)  # (L, N, E)
    if not batched:
        return y[:, 0], None if weights is None else weights[0]
    return y.transpose(0, 1) if layer.batch_first else y, weights


def _sequence_first(layer: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(L, N, E) each; what is one tensor stays one."""
    given: dict[int, Tensor] = {}
    for x in (query, key, value):
        if x.dim() == 2:
            given.setdefault(id(x), x[:, None])
        else:
            given.setdefault(id(x), x.transpose(0, 1) if layer.batch_first else x)
    return given[id(query)], given[id(key)], given[id(value)]


def _project(
    layer: Any, adapters: Sequence[Any], query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of (N heads, length, width)."""
    if layer.in_proj_weight is None:
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        biases = (None,) * 3 if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)
        rows = zip(names, (query, key, value), biases, strict=True)
        projected = [_linear(layer, adapters, name, x, getattr(layer, name), bias) for name, x, bias in rows]
    elif query is key and key is value:
        projected = list(_packed(layer, adapters, query, 0, 3).chunk(3, -1))
    elif key is value:
        projected = [
            _packed(layer, adapters, query, 0, 1),
            *_packed(layer, adapters, key, 1, 3).chunk(2, -1),
        ]
    else:
        projected = [_packed(layer, adapters, x, i, i + 1) for i, x in enumerate((query, key, value))]
    q, k, v = projected
    return _heads(layer, q), _heads(layer, k), _heads(layer, v)


def _packed(layer: Any, adapters: Sequence[Any], x: Tensor, first: int, last: int) -> Tensor:
    """Of q, k, v those from first to last."""
    rows = slice(first * layer.embed_dim, last * layer.embed_dim)
    bias = None if layer.in_proj_bias is None else layer.in_proj_bias[rows]
    return _linear(layer, adapters, "in_proj_weight", x, layer.in_proj_weight[rows], bias, rows)


def _linear(
    layer: Any,
    adapters: Sequence[Any],
    name: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: slice = slice(None),
) -> Tensor:
    base = y = F.linear(x, weight, bias)
    for adapter in adapters:
        if adapter.layer_type.weight == name:
            gain = adapter.gain(layer)
            y = y + adapter(x, layer, y.dtype, gain)[..., rows]
            if gain is not None:
                y = y + (base if bias is None else base - bias) * adapter.excess(gain)[rows].to(y.dtype)
    return y


def _heads(layer: Any, x: Tensor) -> Tensor:
    return x.reshape(len(x), -1, layer.head_dim).transpose(0, 1)


def _extended(layer: Any, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """With the learned and the zero key and value that the layer may add; every query sees them."""
    size, added = len(k) // layer.num_heads, []
    if layer.bias_k is not None:
        added.append([_heads(layer, bias.expand(1, size, -1)) for bias in (layer.bias_k, layer.bias_v)])
    if layer.add_zero_attn:
        added.append([k.new_zeros(len(k), 1, layer.head_dim)] * 2)
    for extra_k, extra_v in added:
        k, v = torch.cat([k, extra_k], 1), torch.cat([v, extra_v], 1)
        mask = None if mask is None else F.pad(mask, (0, 1))
    return k, v, mask


def _mask(
    layer: Any, attn_mask: Tensor | None, key_padding_mask: Tensor | None, query: Tensor, key: Tensor
) -> Tensor | None:
    """What is added to the scores, (N or 1, heads or 1, L, S)."""
    (length, size, _), source, heads = query.shape, key.shape[0], layer.num_heads
    mask = None
    if attn_mask is not None:
        if attn_mask.shape not in ((length, source), (size * heads, length, source)):
            raise ShapeError(
                f"attn_mask is {tuple(attn_mask.shape)}; take {(length, source)} or {(size * heads, length, source)}"
            )
        each = attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.view(size, heads, length, source)
        mask = _added(each, query.dtype)
    if key_padding_mask is not None:
        if key_padding_mask.shape != (size, source):
            raise ShapeError(f"key_padding_mask is {tuple(key_padding_mask.shape)}; take {(size, source)}")
        padding = _added(key_padding_mask[:, None, None], query.dtype)
        mask = padding if mask is None else mask + padding
    return mask


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask.bool(), float("-inf"))


def _weighted(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
    """The weights (N heads, L, S) and what they sum up to (N heads, L, width)."""
    q = q * math.sqrt(1 / q.shape[-1])
    scores = torch.bmm(q, k.mT) if mask is None else torch.baddbmm(mask, q, k.mT)
    weights = F.softmax(scores, -1)
    weights = F.dropout(weights, dropout) if dropout else weights
    return weights, torch.bmm(weights, v)


def _out(layer: Any, adapters: Sequence[Any], heads: Tensor) -> Tensor:
    """(N heads, L, width) -> (L, N, E)."""
    x = heads.transpose(0, 1).reshape(heads.shape[1], -1, layer.embed_dim)
    return _linear(layer, adapters, "out_proj.weight", x, layer.out_proj.weight, layer.out_proj.bias)
