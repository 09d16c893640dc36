"""Quantised layers and models made plain, as exchanges that can be taken back: the same objects, the same bits."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tailora.core.attach import class_with_plain
from tailora.core.quantization import base_of, dense_weight, is_transposed, quantized_layers

ROWS = 2**18  # numbers that are quantised again to see what that costs; NF4 takes 30 million a second on one core
BITSANDBYTES = {"compute_dtype", "compute_type_is_set", "quant_state", "quant_storage", "support_avx512bf16_for_cpu"}
OF_LAYERS = frozenset(BITSANDBYTES | {"state", "index", "source_cls", "extra_repr", "_hf_quantized_needs_local_tp"})
OF_MODELS = frozenset(("is_quantized", "quantization_method", "hf_quantizer", "is_loaded_in_4bit", "is_loaded_in_8bit"))
OF_CONFIGS = frozenset(("quantization_config", "_is_quantized"))


@dataclass(frozen=True)
class Exchange:
    """A tensor of a module (parameter or buffer), and what takes its place."""

    module: nn.Module
    name: str
    tensor: Tensor

    def make(self) -> "Exchange":
        """Put the tensor in; returns the exchange that puts the former object back."""
        table: dict[str, Any] = (
            self.module._parameters if self.name in self.module._parameters else self.module._buffers
        )
        former = table[self.name]
        table[self.name] = self.tensor
        return Exchange(self.module, self.name, former)


@dataclass(frozen=True)
class Recast:
    """An object's class and some of its own attributes, and what takes their place."""

    target: Any
    cls: type
    given: dict[str, Any]
    gone: frozenset[str]

    def make(self) -> "Recast":
        """Change the object; returns what changes it back."""
        own = vars(self.target)
        former = {name: own[name] for name in self.given.keys() | self.gone if name in own}
        back = Recast(self.target, type(self.target), former, frozenset(self.given.keys() - own.keys()))
        for name in self.gone:
            own.pop(name, None)
        own.update(self.given)
        if self.cls is not type(self.target):
            self.target.__class__ = self.cls
        return back


Change = Exchange | Recast


def made_plain(layer: nn.Module, weight: Tensor) -> Iterator[Change]:
    """The layer with this dense weight, (out, in), for its quantised one, and of the class that has such weights."""
    transposed = is_transposed(layer)
    weight = weight.T.contiguous() if transposed else weight
    yield Exchange(layer, "weight", nn.Parameter(weight, requires_grad=False))
    cls = vars(layer)["source_cls"] if transposed else _plain_class(layer)
    given: dict[str, Any] = {"nx": weight.shape[0], "nf": weight.shape[1]} if transposed else {}
    hooks = layer._load_state_dict_pre_hooks
    kept = OrderedDict((key, hook) for key, hook in hooks.items() if not _is_theirs(getattr(hook, "hook", hook)))
    if len(kept) < len(hooks):
        given["_load_state_dict_pre_hooks"] = kept
    yield Recast(layer, class_with_plain(layer, cls), given, OF_LAYERS)


def as_linear(layer: nn.Module) -> Iterator[Change]:
    """The layer as nn.Linear with the dequantised weight in float32; what an adapter on it computes stays the same."""
    yield Exchange(layer, "weight", nn.Parameter(dense_weight(layer).float(), requires_grad=False))
    yield Recast(layer, class_with_plain(layer, nn.Linear), {}, frozenset())


def _plain_class(layer: nn.Module) -> type[nn.Module]:
    cls = getattr(layer, "plain", type(layer))
    return next(parent for parent in cls.__mro__ if not _is_theirs(parent))


def _is_theirs(thing: Any) -> bool:
    return str(getattr(thing, "__module__", "")).startswith("bitsandbytes.")


def whole_plain(model: nn.Module, but: Iterable[nn.Module], dtype: torch.dtype) -> Iterator[Change]:
    """What makes the other quantised layers plain and the model forget its quantisation: it saves as a plain one.

    A model of which only some layers are quantised has no form on the disk that transformers would read.
    """
    done = {id(layer) for layer in but}
    for layer in quantized_layers(model).values():
        if id(layer) not in done:
            yield from made_plain(layer, dense_weight(layer, others=dtype))
    for module in model.modules():  # a model within a model has marks of its own
        if OF_MODELS & vars(module).keys():
            yield Recast(module, type(module), {}, OF_MODELS)
    config = getattr(model, "config", None)
    if config is not None and OF_CONFIGS & vars(config).keys():
        yield Recast(config, type(config), {}, OF_CONFIGS)


def common_dtype(model: nn.Module) -> torch.dtype:
    """Of the weights that are not quantised; float32 where there are none."""
    packed = {id(layer.weight) for layer in quantized_layers(model).values()}
    found = (p.dtype for p in model.parameters() if id(p) not in packed and p.is_floating_point())
    return next(found, torch.float32)


@torch.no_grad()
def requantizing_error(layer: nn.Module, weight: Tensor, merged: Tensor) -> float:
    """||Q(M) - M|| / ||M - W|| over evenly spaced rows, Q the layer's quantisation; 0 where M is W.

    weight W: what the layer stores; merged M: with its update. Both (out, in).
    """
    rows = torch.linspace(0, len(merged) - 1, max(1, min(len(merged), ROWS // merged.shape[1])), device=merged.device)
    before, after = weight[rows.long()].float(), merged[rows.long()].float()
    update = float((after - before).norm())
    error = float((base_of(layer).again(layer, after).float() - after).norm())
    return error / update if update > 0 else 0.0
