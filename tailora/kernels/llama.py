"""Layers of the Llama family, computed as one Function each, by a class swap that is undone afterwards.

A layer qualifies as a whole, by its class and parts (`obstacle`); a call qualifies by what it is given: a packed row,
no cache, at most one plain adapter on each projection. Whatever does not qualify takes the layer's own forward.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from tailora.core.attach import Adapted, Swapped, derived
from tailora.core.layer import LoRALayer
from tailora.core.layer_types import LINEAR, qualified
from tailora.core.quantization import is_quantized
from tailora.kernels import blocks, decoder
from tailora.kernels.decoder import Layer, Norm
from tailora.kernels.dropout import new_seed
from tailora.kernels.projections import Projection

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
        return decoder.run(hidden_states[0], cos, sin, layer)[None]


@contextmanager
def fast_layers(model: nn.Module, *, checkpointed: bool = False) -> Iterator[int]:
    """Within the block every layer that qualifies is a `FastLayer`; yields their number."""
    layers = eligible(model)
    for layer in layers:
        layer.__class__ = derived(FastLayer, type(layer))
        layer.__dict__["checkpointed"] = checkpointed
    try:
        yield len(layers)
    finally:
        for layer in layers:
            cast(Any, layer).__class__ = cast(Any, layer).plain
            del layer.__dict__["checkpointed"]


def _family(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if qualified(type(module)) in FAMILY]


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
        (any(p.requires_grad for parameters in frozen for p in parameters), "weights of it are trained"),
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
    adapters = {name: vars(linear).get("active_adapters", ()) for name, linear in linears.items()}
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
        documents=blocks.arranged(tuple(ends.diff().tolist()), x.device),
        ways=blocks.best_ways(x.dtype),
        dropout=dropout,
        seed=new_seed() if dropout else 0,
        checkpointed=cast(Any, module).checkpointed,
    )


def _is_plain(adapter: nn.Module) -> bool:
    """y = W x + s (B A - B0 A0) x, and nothing more."""
    return type(adapter) is LoRALayer and adapter.kind is LINEAR and adapter.is_plain


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
