"""Layers of the Llama family, computed as one Function each, by a class swap that is undone afterwards.

A layer qualifies as a whole, by its class and parts (`obstacle`); a call qualifies by what it is given: a packed row,
no cache, at most one plain adapter on each projection. Whatever does not qualify takes the layer's own forward.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.fsdp import FSDPModule
from torch.utils._pytree import tree_flatten, tree_unflatten

from tailora.core.attach import Adapted, Swapped, attached_parts, derived_class
from tailora.core.layer import LoRALayer
from tailora.core.layer_types import LINEAR, qualified_name
from tailora.core.quantization import is_quantized
from tailora.kernels import cpu_attention
from tailora.kernels.products import add_product, product

# ---- Linear layers that share an input, with their updates: forward and backward, by large products.
#
# For the layers i that read x (tokens, in), with noise n for dropout and B scaled:
#
#     x_low = x * n               XA = x_low A^T, A of all i stacked: one product
#     y_i   = x W_i^T + b_i + XA_i B_i^T
#     G_i   = gradient of y_i     GB_i = G_i B_i
#     d x   = sum G_i W_i + n * (GB A)
#     d A   = GB^T x_low          d B_i = G_i^T XA_i


@dataclass(frozen=True)
class Projection:
    """One linear layer, frozen, and the factors of its update in the layer's precision, if it has one."""

    weight: Tensor  # (out, in)
    bias: Tensor | None  # (out,)
    A: Tensor | None = None  # (r, in)
    B: Tensor | None = None  # (out, r), scaled

    @property
    def r(self) -> int:
        return 0 if self.A is None else self.A.shape[0]


Pairs = list[tuple[Tensor, Tensor] | None]


def forward(
    x: Tensor, projections: Sequence[Projection], noise: Tensor | None = None, residual: Tensor | None = None
) -> tuple[list[Tensor], Tensor | None]:
    """Every layer's output (tokens, out), and XA (tokens, sum of r). `residual` is added to the output."""
    low = _low(x, projections, noise)
    outputs = []
    for projection, rows in zip(projections, _columns(low, projections), strict=True):
        y = product(x, projection.weight.t(), residual)
        if projection.bias is not None:
            y.add_(projection.bias)
        if projection.B is not None:
            y.addmm_(rows, projection.B.t())
        outputs.append(y)
    return outputs, low


def backward_low(gradients: Sequence[Tensor], projections: Sequence[Projection]) -> Tensor | None:
    """GB (tokens, sum of r); None where nothing is adapted."""
    adapted = [(g, p.B) for g, p in zip(gradients, projections, strict=True) if p.B is not None]
    if not adapted:
        return None
    return torch.cat([torch.mm(gradient, B) for gradient, B in adapted], dim=1)


def backward_input(
    gradients: Sequence[Tensor],
    projections: Sequence[Projection],
    low: Tensor | None,
    noise: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Gradient of x (tokens, in), from GB; into `out` where given."""
    first, *others = zip(gradients, projections, strict=True)
    dx = product(first[0], first[1].weight, out=out)
    for gradient, projection in others:
        add_product(dx, gradient, projection.weight)
    if low is not None:
        A = _stacked(projections)
        dx = dx.addmm_(low, A) if noise is None else dx.addcmul_(torch.mm(low, A), noise)
    return dx


def backward_factors(
    x: Tensor,
    gradients: Sequence[Tensor],
    projections: Sequence[Projection],
    forward_low: Tensor | None,
    low: Tensor | None,
    noise: Tensor | None = None,
) -> Pairs:
    """Gradients of A and B of every layer, None where it has none; from XA and GB."""
    if forward_low is None or low is None:
        return [None] * len(projections)
    dA = torch.mm(low.t(), x if noise is None else x * noise)  # (sum of r, in)
    rows = torch.split(dA, [projection.r for projection in projections])
    parts = zip(projections, gradients, rows, _columns(forward_low, projections), strict=True)
    return [(own, torch.mm(gradient.t(), low_own)) if p.r else None for p, gradient, own, low_own in parts]


def _low(x: Tensor, projections: Sequence[Projection], noise: Tensor | None) -> Tensor | None:
    if not any(projection.r for projection in projections):
        return None
    return torch.mm(x if noise is None else x * noise, _stacked(projections).t())


def _columns(low: Tensor | None, projections: Sequence[Projection]) -> Sequence[Tensor]:
    """Each layer's part of XA; of width 0 where it is not adapted."""
    if low is None:
        return [projection.weight for projection in projections]  # never read
    return torch.split(low, [projection.r for projection in projections], dim=1)


def _stacked(projections: Sequence[Projection]) -> Tensor:
    factors = [projection.A for projection in projections if projection.A is not None]
    return factors[0] if len(factors) == 1 else torch.cat(factors)


# ---- The parts of a layer that are not products: RMSNorm, rotary positions, SwiGLU. Forward, and backward from the
# input.
#
# Nothing that can be computed again from the layer's input is kept. Norms are computed in float32 at least, as
# transformers does.


silu_backward = torch.ops.aten.silu_backward


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / rms(x) over the last dimension, in float32 or wider: (..., 1)."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_wide(x))
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def standardised(x: Tensor, inverse: Tensor) -> Tensor:
    """x / rms(x), a new tensor in float32 or wider."""
    return x.to(_wide(x), copy=True).mul_(inverse)


def rms_norm(x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """RMSNorm, arXiv:1910.07467, eq. 4: weight * x / rms(x), rounded once."""
    return standardised(x, inverse).mul_(weight).to(x.dtype)


def rms_norm_backward(gradient: Tensor, weight: Tensor, hat: Tensor, inverse: Tensor) -> Tensor:
    """Gradient of the input from that of the output, in its dtype, for `hat` the standardised input.

    d x = (g - hat mean(g hat)) / rms(x) with g = gradient * weight.
    """
    g = gradient.to(hat.dtype, copy=True).mul_(weight)
    mean = (g * hat).mean(dim=-1, keepdim=True)
    return g.addcmul_(hat, mean, value=-1).mul_(inverse).to(gradient.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, RoFormer, arXiv:2104.09864, eq. 34: (tokens, heads, width) by (tokens, 1, width / 2).

    With -sin it is its own inverse, and so its backward.
    """
    low, high = heads.chunk(2, dim=-1)
    out = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    first, second = out.chunk(2, dim=-1)
    torch.mul(low, cos, out=first).addcmul_(high, sin, value=-1)
    torch.mul(high, cos, out=second).addcmul_(low, sin)
    return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up; GLU variants, arXiv:2002.05202, eq. 6."""
    return F.silu(gate) * up  # in bfloat16 a product in place takes 1.6 times as long


def swiglu_backward(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The output again, and the gradients of gate and up."""
    activated = F.silu(gate)
    return activated * up, silu_backward(gradient * up, gate), gradient * activated


# ---- Dropout noise as a function of a seed: drawn in the forward, drawn again in the backward, never kept.
#
# torch draws one double-precision number per element. Sixteen bits decide as well: one 64-bit draw serves four
# elements, and p is met to within 1 in 65,536.


LEVELS = 2**16


def new_seed() -> int:
    """From torch's random state. In a plan, whose tensors hold no numbers, any will do."""
    drawn = torch.randint(2**62, ())
    return 0 if isinstance(drawn, FakeTensor) else int(drawn)


def noise(seed: int, like: Tensor, p: float) -> Tensor:
    """0 with probability p, else 1 / (1 - p): the shape, dtype and device of `like`."""
    dropped = round(p * LEVELS)
    generator = torch.Generator(like.device).manual_seed(seed)
    words = torch.empty(math.ceil(like.numel() / 4), dtype=torch.int64, device=like.device)
    words.random_(-(2**63), None, generator=generator)  # all 64 bits
    kept = words.view(torch.int16)[: like.numel()].view(like.shape) >= dropped - LEVELS // 2
    return kept.to(like.dtype).mul_(LEVELS / (LEVELS - dropped))


# ---- A whole Llama-family layer as one autograd Function.
#
#     n1 = norm(x);  q, k, v = n1 W^T + updates;  q, k = rotate(norm(q), norm(k));  a = attention(q, k, v)
#     x2 = x + a W_o^T;  n2 = norm(x2);  out = x2 + (silu(gate) * up) W_down^T,  gate, up = n2 W^T
#
# Kept for the backward: x, q, k and v as attention reads them, a, x2, gate, up, and the low-rank rows XA. Computed
# again: the norms, the probabilities, SwiGLU. With `checkpointed`, x alone is kept and all of it computed again. The
# backward goes down only as far as something asks for a gradient.


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
    cu_seq_lens: Tensor
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
        return noise(self.seed + place, like, self.dropout)


class Kept(NamedTuple):
    """All tensors are (tokens, ...)."""

    x: Tensor
    heads: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # q, k, v, output, log sums
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
    (q, k, v), low_qkv = forward(n1, layer.named("q", "k", "v"), layer.noise(0, n1, "q", "k", "v"))
    q, k, v = (heads.view(len(x), -1, layer.width) for heads in (q, k, v))  # (tokens, heads, width)
    raw: tuple[tuple[Tensor, Tensor], ...] = ()
    if layer.head_norms:
        (q, q_inverse), (k, k_inverse), raw_q, raw_k = layer.head_norms[0](q), layer.head_norms[1](k), q, k
        raw = (raw_q, q_inverse), (raw_k, k_inverse)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    by_head, log_sums = cpu_attention.forward(q, k, v, layer.cu_seq_lens, layer.scale, layer.window)
    heads, attended = (q, k, v, by_head, log_sums), by_head.flatten(1)
    (middle,), low_o = forward(attended, layer.named("o"), layer.noise(1, attended, "o"), residual=x)
    n2, middle_inverse = layer.middle_norm(middle)
    (gate, up), low_mlp = forward(n2, layer.named("gate", "up"), layer.noise(2, n2, "gate", "up"))
    inner = swiglu(gate, up)
    (output,), low_down = forward(inner, layer.named("down"), layer.noise(3, inner, "down"), middle)
    inverse = x_inverse, middle_inverse
    return output, Kept(x, heads, raw, attended, middle, inverse, gate, up, low_qkv, low_o, low_mlp, low_down)


FactorGradients = dict[str, tuple[Tensor, Tensor]]  # name -> gradients of A and B


def _mlp_backward(gradient: Tensor, layer: Layer, kept: Kept, below: bool) -> tuple[Tensor | None, FactorGradients]:
    """Gradient of the layer's middle (None unless wanted `below`), and of the factors of the MLP."""
    down = layer.named("down")
    low = backward_low([gradient], down)
    noise = layer.noise(3, kept.gate, "down")
    if not (below or layer.adapted("gate", "up")):
        return None, _named(
            ["down"],
            backward_factors(swiglu(kept.gate, kept.up), [gradient], down, kept.low_down, low, noise),
        )
    inner_gradient = backward_input([gradient], down, low, noise)
    inner, *gradients = swiglu_backward(inner_gradient, kept.gate, kept.up)
    pairs = _named(["down"], backward_factors(inner, [gradient], down, kept.low_down, low, noise))
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
    low = backward_low([gradient], o)
    noise = layer.noise(1, kept.attended, "o")
    pairs = _named(["o"], backward_factors(kept.attended, [gradient], o, kept.low_o, low, noise))
    if not (wants_x or layer.adapted("q", "k", "v")):
        return None, pairs
    tokens = len(kept.attended)
    by_head = backward_input([gradient], o, low, noise).view(tokens, -1, layer.width)
    q, k, v = cpu_attention.backward(by_head, *kept.heads, layer.cu_seq_lens, layer.scale, layer.window)
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
    low = backward_low(gradients, group)
    noise = layer.noise(place, x, *names)
    pairs = _named(names, backward_factors(x, gradients, group, forward_low, low, noise))
    return backward_input(gradients, group, low, noise) if wants_x else None, pairs


def _named(names: Sequence[str], pairs: Pairs) -> FactorGradients:
    return {name: pair for name, pair in zip(names, pairs, strict=True) if pair is not None}


# ----


FAMILY = frozenset(
    f"transformers.models.{name.lower()}.modeling_{name.lower()}.{name}DecoderLayer"
    for name in ("Llama", "Mistral", "Qwen2", "Qwen3")
)


class FastLayer(Swapped):
    """A decoder layer that takes the Function when its input allows it, and its own forward when not."""

    checkpointed: bool  # keep the input alone for the backward

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        layer = None if args else _described(cast(nn.Module, self), hidden_states, kwargs)
        if layer is None:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        cos, sin = (part[0] for part in kwargs["position_embeddings"])  # (tokens, width)
        # no view, because FSDP2 hooks the output, and an operation in place would lose the hook of a view
        output = run(hidden_states[0], cos, sin, layer)
        whole: Tensor = torch.ops.aten._unsafe_view(output, [1, *output.shape])
        return whole


@contextmanager
def fast_layers(model: nn.Module, *, checkpointed: bool = False) -> Iterator[int]:
    """Within the block every layer that qualifies is a `FastLayer`; yields their number."""
    layers = eligible(model)
    for layer in layers:
        layer.__class__ = derived_class(FastLayer, type(layer))
        layer.__dict__["checkpointed"] = checkpointed
    try:
        yield len(layers)
    finally:
        for layer in layers:
            cast(Any, layer).__class__ = cast(Any, layer).plain
            del layer.__dict__["checkpointed"]


def _family(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if qualified_name(_class_of(module)) in FAMILY]


def _class_of(module: nn.Module) -> type[nn.Module]:
    """Returns the class of a layer, before FSDP2 put its own in front."""
    return type(module).__mro__[2] if isinstance(module, FSDPModule) else type(module)


def eligible(model: nn.Module) -> list[nn.Module]:
    """The layers that can be computed as one Function."""
    return [layer for layer in _family(model) if obstacle(layer) is None]


def obstacle_to_layers(model: nn.Module) -> str | None:
    """Why no layer of the model can be computed as one Function, or None when one can."""
    layers = _family(model)
    if not layers:
        return f"{type(model).__name__} is not of the Llama family"
    reasons = [obstacle(layer) for layer in layers]
    return reasons[0] if all(reasons) else None


PROJECTIONS = {
    **{name: ("self_attn", f"{name}_proj") for name in ("q", "k", "v", "o")},
    **{name: ("mlp", f"{name}_proj") for name in ("gate", "up", "down")},
}
ACTIVATIONS = ("SiLU", "SiLUActivation")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def obstacle(layer: nn.Module) -> str | None:
    """Why a layer of the family cannot be computed as one Function, or None."""
    attention, mlp = cast(Any, layer).self_attn, cast(Any, layer).mlp
    linears = {name: getattr(getattr(layer, owner), attribute) for name, (owner, attribute) in PROJECTIONS.items()}
    if quantized := [name for name, linear in linears.items() if is_quantized(linear)]:
        return f"{', '.join(quantized)} are quantised"
    if odd := [name for name, linear in linears.items() if _plain(linear) is not nn.Linear]:
        return f"{', '.join(odd)} are not plain linear layers"
    norms = [module for module in layer.modules() if type(module).__name__.endswith("RMSNorm")]
    frozen = [*(linear.parameters(recurse=False) for linear in linears.values()), *(n.parameters() for n in norms)]
    hooked = [module for module in layer.modules() if module is not layer and any(map(module.__dict__.get, HOOKS))]
    replaced = [module for module in layer.modules() if "forward" in vars(module)]
    rules = [
        (len(norms) != 2 + 2 * hasattr(attention, "q_norm"), "its norms are not the family's"),
        (type(mlp.act_fn).__name__ not in ACTIVATIONS, f"its activation is {type(mlp.act_fn).__name__}"),
        (attention.attention_dropout > 0, "its attention has dropout"),
        (bool(hooked or replaced), "its parts carry hooks"),
        (any(p.requires_grad for parameters in frozen for p in parameters), "the model's own weights are trained"),
        (len({linear.weight.dtype for linear in linears.values()}) > 1, "its weights have several dtypes"),
    ]
    return next((reason for broken, reason in rules if broken), None)


def _plain(module: nn.Module) -> type[nn.Module]:
    return module.plain if isinstance(module, Adapted) else type(module)


def _described(module: nn.Module, x: Tensor, given: dict[str, Any]) -> Layer | None:
    """The layer as the Function takes it; None when this call is not for it."""
    ends = given.get("cu_seq_lens_q")
    others = [given.get(name) for name in ("attention_mask", "cache", "past_key_values")]
    if ends is None or any(other is not None for other in others) or x.shape[0] != 1:
        return None
    linears = {name: getattr(getattr(module, owner), part) for name, (owner, part) in PROJECTIONS.items()}
    adapters = {name: attached_parts(linear) for name, linear in linears.items()}
    active = [adapter for several in adapters.values() for adapter in several]
    if not all(map(_is_plain, active)) or any(len(several) > 1 for several in adapters.values()):
        return None
    dropouts = {adapter.lora_dropout if adapter.training else 0.0 for adapter in active} or {0.0}
    if len(dropouts) > 1:
        return None
    attention = cast(Any, module).self_attn
    dropout = dropouts.pop()
    return Layer(
        projections={name: _projection(linear, adapters[name], x.dtype) for name, linear in linears.items()},
        input_norm=_norm(cast(Any, module).input_layernorm),
        middle_norm=_norm(cast(Any, module).post_attention_layernorm),
        head_norms=(_norm(attention.q_norm), _norm(attention.k_norm)) if hasattr(attention, "q_norm") else None,
        width=attention.head_dim,
        scale=attention.scaling,
        window=_window(attention),
        cu_seq_lens=ends,
        dropout=dropout,
        seed=new_seed() if dropout else 0,
        checkpointed=cast(Any, module).checkpointed,
    )


def _is_plain(adapter: nn.Module) -> bool:
    """y = W x + s (B A - B0 A0) x, and nothing more."""
    return type(adapter) is LoRALayer and adapter.layer_type is LINEAR and adapter.is_plain


def _projection(linear: nn.Linear, adapters: tuple[LoRALayer, ...], dtype: torch.dtype) -> Projection:
    if not adapters:
        return Projection(linear.weight, linear.bias)
    (adapter,) = adapters
    A, B = adapter.update_factors()
    return Projection(linear.weight, linear.bias, A.to(dtype), B.to(dtype))


def _norm(module: Any) -> Norm:
    return Norm(module.weight, module.variance_epsilon)


def _window(attention: Any) -> int | None:
    """Tokens that a token sees, itself among them: per layer where the class says so, else of the model."""
    if hasattr(attention, "sliding_window"):
        return cast("int | None", attention.sliding_window)
    return getattr(attention.config, "sliding_window", None)
