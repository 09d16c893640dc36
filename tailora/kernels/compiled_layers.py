"""Decoder layers compiled by torch.compile, for any architecture: the same results in fewer passes over memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from tailora.core.attach import Adapted


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Returns the modules that a model repeats, by structure: elements of a list that are decoder layers or adapted."""
    found: dict[nn.Module, None] = {}
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and module not in inside:
            for layer in module:
                if isinstance(layer, GradientCheckpointingLayer) or any(isinstance(m, Adapted) for m in layer.modules()):
                    found[layer] = None
                    inside.update(layer.modules())
    return list(found)


def _call(layer: nn.Module, args: Any, kwargs: Any) -> Any:
    return layer._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]


@contextmanager
def compiled_layers(layers: list[nn.Module], activation_memory: float = 1.0, backend: str = "inductor") -> Iterator[None]:
    """Within the block the layers are compiled while gradients are computed."""
    function = FunctionType(_call.__code__.replace(), globals(), "call_layer")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)

    def call_of(layer: nn.Module) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                return compiled(layer, args, kwargs)
            return layer._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

        return call

    try:
        for layer in layers:
            layer._compiled_call_impl = call_of(layer)
        with torch._functorch.config.patch(activation_memory_budget=activation_memory):
            yield
    finally:
        for layer in layers:
            layer.__dict__.pop("_compiled_call_impl", None)
