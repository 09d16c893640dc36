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

from tailora.kernels import blocks, dropout, projections
from tailora.kernels.pointwise import (
    inverse_rms,
    rms_norm,
    rms_norm_backward,
    rotate,
    standardised,
    swiglu,
    swiglu_backward,
)
from tailora.kernels.projections import Projection

NAMES = ("q", "k", "v", "o", "gate", "up", "down")


class Norm(NamedTuple):
    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Its output, and the 1 / rms(x) that leads there."""
        inverse = inverse_rms(x, self.eps)
        return rms_norm(x, self.weight, inverse), inverse

    def backward(self, gradient: Tensor, x: Tensor, inverse: Tensor) -> Tensor:
        return rms_norm_backward(gradient, self.weight, standardised(x, inverse), inverse)


@dataclass(frozen=True)
class Layer:
    """One decoder layer on one packed row: all that is not trained."""

    projections: dict[str, Projection]  # by NAMES
    input_norm: Norm
    middle_norm: Norm
    head_norms: tuple[Norm, Norm] | None  # of q and k, over each head's width
    width: int  # of a head
    scale: float
    window: int | None
    documents: tuple[blocks.Together, ...]
    ways: blocks.Ways
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
    raw: tuple[tuple[Tensor, Tensor], ...]  # q and k before their norms, where they have some, and 1 / rms
    attended: Tensor
    middle: Tensor
    inverse: tuple[Tensor, Tensor]  # 1 / rms of x and of middle
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
    n1, x_inverse = layer.input_norm(x)
    (q, k, v), low_qkv = projections.forward(n1, layer.named("q", "k", "v"), layer.noise(0, n1, "q", "k", "v"))
    q, k, v = (heads.view(len(x), -1, layer.width) for heads in (q, k, v))  # (tokens, heads, width)
    raw: tuple[tuple[Tensor, Tensor], ...] = ()
    if layer.head_norms:
        (q, q_inverse), (k, k_inverse), raw_q, raw_k = layer.head_norms[0](q), layer.head_norms[1](k), q, k
        raw = (raw_q, q_inverse), (raw_k, k_inverse)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    attended, heads = blocks.forward(q, k, v, layer.documents, layer.scale, layer.window, layer.ways)
    attended = attended.flatten(1)
    (middle,), low_o = projections.forward(attended, layer.named("o"), layer.noise(1, attended, "o"), residual=x)
    n2, middle_inverse = layer.middle_norm(middle)
    (gate, up), low_mlp = projections.forward(n2, layer.named("gate", "up"), layer.noise(2, n2, "gate", "up"))
    inner = swiglu(gate, up)
    (output,), low_down = projections.forward(inner, layer.named("down"), layer.noise(3, inner, "down"), middle)
    inverse = x_inverse, middle_inverse
    return output, Kept(x, heads, raw, attended, middle, inverse, gate, up, low_qkv, low_o, low_mlp, low_down)


FactorGradients = dict[str, tuple[Tensor, Tensor]]  # name -> gradients of A and B


def _mlp_backward(gradient: Tensor, layer: Layer, kept: Kept, below: bool) -> tuple[Tensor | None, FactorGradients]:
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
    names, norm, inverse = ("gate", "up"), layer.middle_norm, kept.inverse[1]
    n2 = rms_norm(kept.middle, norm.weight, inverse)
    n2_gradient, more = _shared_backward(n2, names, gradients, kept.low_mlp, layer, 2, below)
    if n2_gradient is None:
        return None, pairs | more
    return gradient + norm.backward(n2_gradient, kept.middle, inverse), pairs | more


def _attention_backward(
    gradient: Tensor, cos: Tensor, sin: Tensor, layer: Layer, kept: Kept, wants_x: bool
) -> tuple[Tensor | None, FactorGradients]:
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
    by_head = rows.view(tokens + 1, -1, layer.width)
    output = kept.attended.view(tokens, -1, layer.width)
    q, k, v = blocks.backward(by_head, output, kept.heads, layer.documents, layer.scale, layer.window)
    q, k = rotate(q, cos, -sin), rotate(k, cos, -sin)
    if layer.head_norms:
        q, k = (
            norm.backward(heads, raw, inverse)
            for norm, heads, (raw, inverse) in zip(layer.head_norms, (q, k), kept.raw, strict=True)
        )
    names, norm, inverse = ("q", "k", "v"), layer.input_norm, kept.inverse[0]
    n1 = rms_norm(kept.x, norm.weight, inverse)
    gradients = [heads.flatten(1) for heads in (q, k, v)]
    n1_gradient, more = _shared_backward(n1, names, gradients, kept.low_qkv, layer, 0, wants_x)
    if n1_gradient is None:
        return None, pairs | more
    return gradient + norm.backward(n1_gradient, kept.x, inverse), pairs | more


def _shared_backward(
    x: Tensor,
    names: tuple[str, ...],
    gradients: Sequence[Tensor],
    forward_low: Tensor | None,
    layer: Layer,
    place: int,
    wants_x: bool,
) -> tuple[Tensor | None, FactorGradients]:
    """Through the projections that share the input x: its gradient, and those of their factors."""
    group = layer.named(*names)
    low = projections.backward_low(gradients, group)
    noise = layer.noise(place, x, *names)
    pairs = _named(names, projections.backward_factors(x, gradients, group, forward_low, low, noise))
    return projections.backward_input(gradients, group, low, noise) if wants_x else None, pairs


def _named(names: Sequence[str], pairs: projections.FactorGradients) -> FactorGradients:
    return {name: pair for name, pair in zip(names, pairs, strict=True) if pair is not None}
