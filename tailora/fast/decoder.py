"""A whole Llama-family layer as one autograd Function.

    n1 = norm(x);  q, k, v = n1 W^T + updates;  q, k = rotate(norm(q), norm(k));  a = attention(q, k, v)
    x2 = x + a W_o^T;  n2 = norm(x2);  out = x2 + (silu(gate) * up) W_down^T,  gate, up = n2 W^T

Kept for the backward: x, q, k and v as attention reads them, a, x2, gate, up, and the low-rank rows XA. Computed again:
the norms, the probabilities, SwiGLU. With `checkpointed`, x alone is kept and all of it computed again.
The backward goes down only as far as something asks for a gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from tailora.fast import blocks, dropout, projections
from tailora.fast.pointwise import rms_norm, rms_norm_backward, rotate, standardised, swiglu, swiglu_backward
from tailora.fast.projections import Projection

NAMES = ("q", "k", "v", "o", "gate", "up", "down")


class Norm(NamedTuple):
    weight: Tensor
    eps: float


@dataclass(frozen=True)
class Layer:
    """One decoder layer on one packed row: all that is not trained."""

    projections: dict[str, Projection]  # by NAMES
    input_norm: Norm
    middle_norm: Norm
    q_norm: Norm | None  # over each head's width
    k_norm: Norm | None
    width: int  # of a head
    scale: float
    window: int | None
    documents: tuple[blocks.Together, ...]
    dropout: float
    seed: int
    checkpointed: bool

    def named(self, *names: str) -> list[Projection]:
        return [self.projections[name] for name in names]

    def adapted(self, *names: str) -> bool:
        return any(projection.r for projection in self.named(*names))

    def noise(self, place: int, like: Tensor, *names: str) -> Tensor | None:
        """Of the inputs of these projections, which share it."""
        if not self.dropout or not self.adapted(*names):
            return None
        return dropout.noise(self.seed + place, like, self.dropout)


class Kept(NamedTuple):
    """All tensors are (tokens, ...)."""

    x: Tensor
    heads: list[blocks.Kept]
    raw_q: Tensor | None  # before its norm, where it has one
    raw_k: Tensor | None
    attended: Tensor
    middle: Tensor
    gate: Tensor
    up: Tensor
    low_qkv: Tensor | None
    low_o: Tensor | None
    low_mlp: Tensor | None
    low_down: Tensor | None


def run(x: Tensor, cos: Tensor, sin: Tensor, layer: Layer) -> Tensor:
    """The layer's output (tokens, hidden) for x (tokens, hidden), differentiable in x and in every A and B.

    cos and sin: (tokens, width), of the model's own rotary positions.
    """
    half = layer.width // 2
    cos, sin = cos[:, None, :half], sin[:, None, :half]  # (tokens, 1, width / 2): both halves are equal
    factors = [factor for p in layer.named(*NAMES) if p.r for factor in (p.A, p.B)]
    output: Tensor = _Layer.apply(x, cos, sin, layer, *factors)  # type: ignore[no-untyped-call]
    return output


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, layer: Layer, *factors: Tensor) -> Tensor:
        output, kept = _forward(x, cos, sin, layer)
        tensors, ctx.structure = tree_flatten(x if layer.checkpointed else kept)
        ctx.layer, ctx.count = layer, len(factors)
        ctx.save_for_backward(cos, sin, *factors, *tensors)  # factors: so that a change in between is noticed
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        layer: Layer = ctx.layer
        cos, sin, *rest = ctx.saved_tensors
        kept = tree_unflatten(rest[ctx.count :], ctx.structure)
        if layer.checkpointed:
            _, kept = _forward(kept, cos, sin, layer)
        wants_x = ctx.needs_input_grad[0]
        middle, pairs = _mlp_backward(gradient, layer, kept, wants_x or layer.adapted("q", "k", "v", "o"))
        dx = None
        if middle is not None:
            dx, attention = _attention_backward(middle, cos, sin, layer, kept, wants_x)
            pairs |= attention
        return dx, None, None, None, *(factor for name in NAMES if name in pairs for factor in pairs[name])


def _forward(x: Tensor, cos: Tensor, sin: Tensor, layer: Layer) -> tuple[Tensor, Kept]:
    n1 = rms_norm(x, *layer.input_norm)
    (q, k, v), low_qkv = projections.forward(n1, layer.named("q", "k", "v"), layer.noise(0, n1, "q", "k", "v"))
    q, k, v = (heads.unflatten(1, (-1, layer.width)) for heads in (q, k, v))  # (tokens, heads, width)
    raw = q if layer.q_norm else None, k if layer.k_norm else None
    if layer.q_norm and layer.k_norm:
        q, k = rms_norm(q, *layer.q_norm), rms_norm(k, *layer.k_norm)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    attended, heads = blocks.forward(q, k, v, layer.documents, layer.scale, layer.window)
    attended = attended.flatten(1)
    (middle,), low_o = projections.forward(attended, layer.named("o"), layer.noise(1, attended, "o"), residual=x)
    n2 = rms_norm(middle, *layer.middle_norm)
    (gate, up), low_mlp = projections.forward(n2, layer.named("gate", "up"), layer.noise(2, n2, "gate", "up"))
    inner = swiglu(gate, up)
    (output,), low_down = projections.forward(inner, layer.named("down"), layer.noise(3, inner, "down"), middle)
    return output, Kept(x, heads, *raw, attended, middle, gate, up, low_qkv, low_o, low_mlp, low_down)


Pairs = dict[str, tuple[Tensor, Tensor]]  # name -> gradients of A and B


def _mlp_backward(gradient: Tensor, layer: Layer, kept: Kept, below: bool) -> tuple[Tensor | None, Pairs]:
    """Gradient of the layer's middle (None unless wanted `below`), and of the factors of the MLP."""
    down = layer.named("down")
    low = projections.backward_low([gradient], down)
    noise = layer.noise(3, kept.gate, "down")
    if not (below or layer.adapted("gate", "up")):
        return None, _named(
            ["down"],
            projections.backward_factors(swiglu(kept.gate, kept.up), [gradient], down, kept.low_down, low, noise),
        )
    inner_gradient = projections.backward_input([gradient], down, low, noise)
    inner, *gradients = swiglu_backward(inner_gradient, kept.gate, kept.up)
    pairs = _named(["down"], projections.backward_factors(inner, [gradient], down, kept.low_down, low, noise))
    hat, inverse = standardised(kept.middle, layer.middle_norm.eps)
    n2 = hat.to(gradient.dtype, copy=True).mul_(layer.middle_norm.weight)
    middle, more = _shared_backward(n2, ("gate", "up"), gradients, kept.low_mlp, layer, 2, below)
    if middle is not None:
        middle = rms_norm_backward(middle, layer.middle_norm.weight, hat, inverse).add_(gradient).to(gradient.dtype)
    return middle, pairs | more


def _attention_backward(
    gradient: Tensor, cos: Tensor, sin: Tensor, layer: Layer, kept: Kept, wants_x: bool
) -> tuple[Tensor | None, Pairs]:
    """Gradient of the layer's input (None unless wanted), and of the factors of the attention."""
    o = layer.named("o")
    low = projections.backward_low([gradient], o)
    noise = layer.noise(1, kept.attended, "o")
    pairs = _named(["o"], projections.backward_factors(kept.attended, [gradient], o, kept.low_o, low, noise))
    if not (wants_x or layer.adapted("q", "k", "v")):
        return None, pairs
    tokens, width = kept.attended.shape
    rows = gradient.new_zeros(tokens + 1, width)  # the last row is what padding reads
    projections.backward_input([gradient], o, low, noise, out=rows[:-1])
    by_head = rows.unflatten(1, (-1, layer.width))
    q, k, v = blocks.backward(by_head, kept.heads, layer.documents, layer.scale, layer.window)
    q, k = rotate(q, cos, -sin), rotate(k, cos, -sin)
    if layer.q_norm and layer.k_norm:
        q, k = _norm_backward(q, kept.raw_q, layer.q_norm), _norm_backward(k, kept.raw_k, layer.k_norm)
    hat, inverse = standardised(kept.x, layer.input_norm.eps)
    n1 = hat.to(gradient.dtype, copy=True).mul_(layer.input_norm.weight)
    gradients = [heads.flatten(1) for heads in (q, k, v)]
    dx, more = _shared_backward(n1, ("q", "k", "v"), gradients, kept.low_qkv, layer, 0, wants_x)
    if dx is not None:
        dx = rms_norm_backward(dx, layer.input_norm.weight, hat, inverse).add_(gradient).to(gradient.dtype)
    return dx, pairs | more


def _shared_backward(
    x: Tensor,
    names: tuple[str, ...],
    gradients: Sequence[Tensor],
    forward_low: Tensor | None,
    layer: Layer,
    place: int,
    wants_x: bool,
) -> tuple[Tensor | None, Pairs]:
    """Through the projections that share the input x: its gradient, and those of their factors."""
    group = layer.named(*names)
    low = projections.backward_low(gradients, group)
    noise = layer.noise(place, x, *names)
    pairs = _named(names, projections.backward_factors(x, gradients, group, forward_low, low, noise))
    return projections.backward_input(gradients, group, low, noise) if wants_x else None, pairs


def _norm_backward(gradient: Tensor, raw: Tensor | None, norm: Norm) -> Tensor:
    """Of a norm over each head."""
    assert raw is not None  # kept wherever there is a norm
    return rms_norm_backward(gradient, norm.weight, *standardised(raw, norm.eps)).to(gradient.dtype)


def _named(names: Sequence[str], pairs: projections.Pairs) -> Pairs:
    return {name: pair for name, pair in zip(names, pairs, strict=True) if pair is not None}
