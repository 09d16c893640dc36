"""Turns quantised layers and models into plain ones, and back: the same objects, the same bits.

The values of a quantised weight come from `quantization.dense_weight`.

TensorChange, ClassChange    one change each; `make` makes it and returns the change that undoes it
dequantize_layer, dequantize_model
                             the changes that dequantise a layer, or all other layers of a model
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tailora.core.attach import class_with_plain
from tailora.core.quantization import dense_weight, is_transposed, quantized_layers, storage_of

SAMPLE = 2**18  # numbers that are quantised again to measure the error; NF4 takes 30 million a second on one core

# Attributes that bitsandbytes and transformers leave on quantised layers, models and configs.
BITSANDBYTES = {"compute_dtype", "compute_type_is_set", "quant_state", "quant_storage", "support_avx512bf16_for_cpu"}
OF_LAYERS = frozenset(BITSANDBYTES | {"state", "index", "source_cls", "extra_repr", "_hf_quantized_needs_local_tp"})
OF_MODELS = frozenset(("is_quantized", "quantization_method", "hf_quantizer", "is_loaded_in_4bit", "is_loaded_in_8bit"))
OF_CONFIGS = frozenset(("quantization_config", "_is_quantized"))


@dataclass(frozen=True)
class TensorChange:
    """Replaces a module's parameter or buffer by another tensor."""

    module: nn.Module
    name: str
    tensor: Tensor

    def make(self) -> "TensorChange":
        module = self.module
        table: dict[str, Any] = module._parameters if self.name in module._parameters else module._buffers
        former = table[self.name]
        table[self.name] = self.tensor
        return TensorChange(module, self.name, former)


@dataclass(frozen=True)
class ClassChange:
    """Changes the class of an object, and adds and removes attributes."""

    target: Any
    cls: type
    added: dict[str, Any]
    removed: frozenset[str]

    def make(self) -> "ClassChange":
        attributes = vars(self.target)
        former = {name: attributes[name] for name in self.added.keys() | self.removed if name in attributes}
        undo = ClassChange(self.target, type(self.target), former, frozenset(self.added.keys() - attributes.keys()))
        for name in self.removed:
            attributes.pop(name, None)
        attributes.update(self.added)
        if self.cls is not type(self.target):
            self.target.__class__ = self.cls
        return undo


Change = TensorChange | ClassChange


def dequantize_layer(layer: nn.Module, weight: Tensor) -> Iterator[Change]:
    """Yields the changes to the plain class of the layer, with this dense weight (out, in)."""
    added: dict[str, Any] = {}
    if is_transposed(layer):
        weight = weight.T.contiguous()
        cls = vars(layer)["source_cls"]
        added = {"nx": weight.shape[0], "nf": weight.shape[1]}
    else:
        former_class = getattr(layer, "plain", type(layer))
        cls = next(parent for parent in former_class.__mro__ if not _is_of_bitsandbytes(parent))
    yield TensorChange(layer, "weight", nn.Parameter(weight, requires_grad=False))
    hooks = layer._load_state_dict_pre_hooks
    other_hooks = {key: hook for key, hook in hooks.items() if not _is_of_bitsandbytes(getattr(hook, "hook", hook))}
    if len(other_hooks) < len(hooks):
        added["_load_state_dict_pre_hooks"] = OrderedDict(other_hooks)
    yield ClassChange(layer, class_with_plain(layer, cls), added, OF_LAYERS)


def dequantize_to_linear(layer: nn.Module) -> Iterator[Change]:
    """Yields the changes to nn.Linear with the dense weight in float32; its adapters compute the same as before."""
    yield TensorChange(layer, "weight", nn.Parameter(dense_weight(layer).float(), requires_grad=False))
    yield ClassChange(layer, class_with_plain(layer, nn.Linear), {}, frozenset())


def _is_of_bitsandbytes(value: Any) -> bool:
    return str(getattr(value, "__module__", "")).startswith("bitsandbytes.")


def dequantize_model(model: nn.Module, exclude: Iterable[nn.Module], dtype: torch.dtype) -> Iterator[Change]:
    """Yields the changes to all other quantised layers, and to the attributes that mark the model as quantised.

    transformers cannot read a model of which only some layers are quantised, so all of it becomes plain.
    """
    excluded = {id(layer) for layer in exclude}
    for layer in quantized_layers(model).values():
        if id(layer) not in excluded:
            yield from dequantize_layer(layer, dense_weight(layer, int8_dtype=dtype))
    for module in model.modules():  # a model within a model is marked, too
        if OF_MODELS & vars(module).keys():
            yield ClassChange(module, type(module), {}, OF_MODELS)
    config = getattr(model, "config", None)
    if config is not None and OF_CONFIGS & vars(config).keys():
        yield ClassChange(config, type(config), {}, OF_CONFIGS)


def common_dtype(model: nn.Module) -> torch.dtype:
    """Returns the dtype of the weights that are not quantised; float32 if there are none."""
    quantized = {id(layer.weight) for layer in quantized_layers(model).values()}
    dtypes = (p.dtype for p in model.parameters() if id(p) not in quantized and p.is_floating_point())
    return next(dtypes, torch.float32)


@torch.no_grad()
def requantization_error(layer: nn.Module, weight: Tensor, merged: Tensor) -> float:
    """Returns ||Q(M) - M|| / ||M - W|| over evenly spaced rows, for the layer's quantisation Q; 0 where M is W.

    weight W: what the layer stores; merged M: with its update. Both (out, in).
    """
    count = max(1, min(len(merged), SAMPLE // merged.shape[1]))
    rows = torch.linspace(0, len(merged) - 1, count, device=merged.device).long()
    before, after = weight[rows].float(), merged[rows].float()
    update = float((after - before).norm())
    error = float((storage_of(layer).requantize(layer, after).float() - after).norm())
    return error / update if update > 0 else 0.0
