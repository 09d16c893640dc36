"""The adapters of one base model: their names, the layers they change, and which of them are active.

Every part of an adapter (an update, a trained copy, a trained bias) is stored under the path of what it changes. The
layer that uses it has the same path, or the parent path for a slice of a fused layer or a single parameter.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, SupportsFloat, cast

import torch
from torch import Tensor, nn

from tailora.core.adapter import Adapter, as_module, check_compatible, group_by_path
from tailora.core.attach import (
    Adapted,
    AdaptedWhole,
    Substituted,
    Swapped,
    attach,
    attached,
    detach,
    freeze_statistics,
    prevent_fast_paths,
    runs_adapters,
    swap_class,
)
from tailora.core.extras import Extra
from tailora.core.inference import generating
from tailora.core.layer import LoRALayer
from tailora.core.layer_calls import LayerCalls
from tailora.core.layer_types import find_layer
from tailora.core.mixed_batch import MixedBatch, flat_layers, mixed_parts
from tailora.core.quantization import allow_repacking, prevent_repacking
from tailora.errors import AdapterError, ConfigError, RowsError, TargetError, nearest
from tailora.patches import compiled_call


class AdapterSet:
    """The adapters of `base_model` by name. The base model, including running statistics, is frozen until `clear`.

    `add` swaps the classes of an adapter's layers; `activate` selects the adapters that the layers use.

    adapters: name -> adapter, in insertion order.
    active: names of the active adapters.
    layers: path -> layer of the base, for all layers changed by an adapter.
    batch: the adapter of every row, inside an `activated_by_row` block.
    training_obstacle: why the active adapters cannot be trained yet, or "".
    """

    def __init__(self, base_model: nn.Module, adapters: Mapping[str, Adapter]) -> None:
        self.base_model = base_model
        self.adapters: dict[str, Adapter] = {}
        self.active: tuple[str, ...] = ()
        self.layers: dict[str, nn.Module] = {}
        self.batch: MixedBatch | None = None
        self.training_obstacle = ""
        self._watched: set[str] = set()  # paths of layers whose first training forward was watched
        self._unwatched: set[str] = set()  # paths of the other active layers
        self._layer_paths: dict[str, str] = {}  # path of an adapter's part -> path of the layer that uses it
        self._modules: dict[str, nn.ModuleDict] = {}  # name -> the adapter's parts as a module
        for name in adapters:
            self.check_new(name)  # before changing the base
        # Tied parameters have an entry for each name, because a merge may untie them
        parameters = base_model.named_parameters(remove_duplicate=False)
        self._required_grad = {name: parameter.requires_grad for name, parameter in parameters}
        base_model.requires_grad_(False)
        freeze_statistics(base_model)
        self._not_repacked = prevent_repacking(base_model)
        for name, adapter in adapters.items():
            self.add(name, adapter)

    # ---- Names

    def __getitem__(self, name: str) -> Adapter:
        """Returns an adapter. For an unknown name, raises AdapterError with the existing names."""
        if name not in self.adapters:
            raise AdapterError(
                f"unknown adapter {name!r}; existing adapters: {', '.join(self.adapters) or 'none'}"
                f"{nearest(name, self.adapters)}"
            )
        return self.adapters[name]

    def check_new(self, name: str) -> None:
        """Raises AdapterError unless an adapter can be added under this name."""
        if not isinstance(name, str) or not name:
            raise AdapterError(f"expected a non-empty string as the adapter name, got {name!r}")
        if name in self.adapters:
            raise AdapterError(
                f"adapter {name!r} already exists; call delete_adapter({name!r}) or use a different name"
            )

    # ---- Adding and removing

    def add(self, name: str, adapter: Adapter) -> None:
        """Adds an inactive adapter and swaps the classes of its layers. Raises TargetError for conflicts."""
        layers_by_path = {path: find_layer(self.base_model, path) for path in adapter.parts}
        layer_paths = {path: layer_path for path, (layer_path, _) in layers_by_path.items()}
        parts = group_by_path((layer_paths[path], part) for path, part in adapter.parts.items())
        layers = dict(layers_by_path.values())
        mixins = {path: _mixin_for(layer_parts[0]) for path, layer_parts in parts.items()}
        if conflicts := [
            path for path, layer in layers.items() if runs_adapters(layer) and not isinstance(layer, mixins[path])
        ]:
            raise TargetError(
                f"these layers are adapted by one adapter and trained in full by another: {', '.join(conflicts)}; use "
                "a separate model for each adapter"
            )
        for path in layers.keys() - self.layers.keys():
            swap_class(layers[path], mixins[path])
        prevent_fast_paths(self.base_model, layers.values())
        self._layer_paths |= layer_paths
        self.layers |= layers
        self.replace(name, adapter)

    def replace(self, name: str, adapter: Adapter) -> None:
        """Replaces the adapter of this name with one for the same layers. Call `activate` to use it."""
        self.adapters[name] = adapter
        self._modules[name] = as_module(group_by_path(adapter.parts.items()))

    def remove(self, name: str) -> None:
        """Removes an inactive adapter. Layers that no other adapter changes get their class back."""
        layer_paths = self._layers_of([name])
        del self.adapters[name], self._modules[name]
        for path in layer_paths - self._layers_of(self.adapters):
            layer = self.layers.pop(path)
            detach(layer)
            freeze_statistics(layer)

    def clear(self) -> None:
        """Removes all adapters, and restores the base model's classes and requires_grad."""
        for module in self.base_model.modules():
            detach(module)
        allow_repacking(self._not_repacked)
        for name, parameter in self.base_model.named_parameters(remove_duplicate=False):
            parameter.requires_grad = self._required_grad.get(name, False)  # a dequantized one is new
        self.adapters, self.active, self._modules = {}, (), {}
        self.layers.clear()

    def _layers_of(self, names: Iterable[str]) -> set[str]:
        """Returns the paths of the layers that these adapters change."""
        return {self._layer_paths[path] for name in names for path in self[name].parts}

    # ---- Activating adapters

    def activate(self, name: str | Iterable[str] | None, training: bool) -> nn.ModuleDict:
        """Activates an adapter, the sum of several, or none; returns their parts, which are all that is trained."""
        if not isinstance(name, str | Iterable | None):
            raise AdapterError(f"expected a name, several names, or None for the base model, got {name!r}")
        names = (name,) if isinstance(name, str) else tuple(dict.fromkeys(name or ()))
        adapters = {name: self[name] for name in names}
        self.check_no_batch("switch adapters")
        check_compatible(adapters)
        parts = group_by_path(item for adapter in adapters.values() for item in adapter.parts.items())
        parts_of_layers = group_by_path(
            (self._layer_paths[path], part) for path, same_path in parts.items() for part in same_path
        )
        for path in self._layers_of(self.active) - parts_of_layers.keys():
            attach(self.layers[path], ())
        for path, layer_parts in parts_of_layers.items():
            attach(self.layers[path], layer_parts)
        self.active = names
        self._unwatched = self._layers_of(names) - self._watched
        self.training_obstacle = _training_obstacle(adapters)
        module = self._modules[names[0]] if len(names) == 1 else as_module(parts)
        if any(part.training != training for same_path in parts.values() for part in same_path):
            module.train(training)
        return module

    def layer_calls(self) -> LayerCalls:
        """Returns a recorder for the active adapters' layers that a forward pass calls; replaces `first_forward`."""
        self._watched |= self._unwatched
        self._unwatched = set()
        return LayerCalls(self.base_model, self._in_order(self._layers_of(self.active)))

    def first_forward(self) -> AbstractContextManager[None]:
        """Returns the context of a training forward; the first warns of skipped layers, unless compiled."""
        if not self._unwatched or not torch.is_grad_enabled():
            return nullcontext()
        layers = self._in_order(self._unwatched)
        self._watched |= self._unwatched
        self._unwatched = set()
        is_compiled = any(map(compiled_call, self.base_model.modules()))
        return nullcontext() if is_compiled else LayerCalls(self.base_model, layers).warned_of()

    def _in_order(self, paths: Collection[str]) -> dict[str, nn.Module]:
        return {path: layer for path, layer in self.layers.items() if path in paths}

    def check_not_adapted(self, modules: Collection[nn.Module | None], operation: str) -> None:
        """Raises AdapterError if an adapter has factors for, or a trained copy of, one of these modules."""
        paths = {path for adapter in self.adapters.values() for path in (*adapter.low_rank, *adapter.saved)}
        if adapted := [path for path, layer in self.layers.items() if path in paths and layer in modules]:
            raise AdapterError(
                f"cannot {operation} the base model, because adapters of {', '.join(adapted)} fit its size now; "
                f"{operation} it before adding adapters"
            )

    @contextmanager
    def activated_by_row(self, names: Sequence[str | None]) -> Iterator[None]:
        """Within the block, each row uses its adapter in `names`, or none. Raises AdapterError, RowsError."""
        if isinstance(names, str) or not isinstance(names, Sequence) or not names:
            raise AdapterError(f"expected a list with a name or None for every row of the batch, got {names!r}")
        known = [None, *self.adapters]
        if unknown := dict.fromkeys(repr(name) for name in names if name not in known):
            existing = ", ".join(self.adapters) or "none"
            raise AdapterError(f"unknown adapter {', '.join(unknown)}; existing adapters: {existing}")
        self.check_no_batch("choose adapters by row")
        adapters = {name: self.adapters[name] for name in dict.fromkeys(names) if name is not None}
        check_compatible(adapters, by_row=True)
        batch = MixedBatch(tuple(names), flat=flat_layers(self.base_model, self.layers))
        parts = mixed_parts(batch, self.adapters, self._layer_paths, self.layers)
        obstacle = self.training_obstacle
        self.batch, self.training_obstacle = batch, _training_obstacle(adapters)
        try:
            in_use = {layer: parts.get(path, ()) for path, layer in self.layers.items()}
            with attached(in_use), batch.watching(self.base_model):
                yield
        finally:
            self.batch, self.training_obstacle = None, obstacle

    def attach_by_token(self, batch: MixedBatch | None) -> None:
        """Makes every token of a packed batch use its adapter in `batch`, until the next call. None means no adapters.

        Call it again after adding or removing adapters. Raises RowsError for layers that do not process tokens
        independently.
        """
        self.check_no_batch("choose adapters by token")
        parts = {} if batch is None else mixed_parts(batch, self.adapters, self._layer_paths, self.layers)
        self.active = ()
        for path, layer in self.layers.items():
            attach(layer, parts.get(path, ()))

    def check_no_batch(self, action: str) -> None:
        """Raises RowsError within a block of `activated_by_row`."""
        if self.batch is not None:
            raise RowsError(f"cannot {action} inside an adapter_rows block; exit the block first")

    def generation(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Returns the context for `base_model.generate`, where all beams of a prompt use the prompt's adapter."""
        if self.batch is None:
            return generating(self.base_model, self.layers)
        argument = args[1] if len(args) > 1 else kwargs.get("generation_config")
        config = argument or getattr(self.base_model, "generation_config", None)
        names = ("num_beams", "num_return_sequences")
        return self.batch.generation(max(kwargs.get(name) or getattr(config, name, None) or 1 for name in names))

    # ---- Changing all parts of adapters

    def set_strength(self, name: str, strength: float) -> None:
        """Multiplies everything the adapter adds by `strength`. Raises ConfigError unless it is finite."""
        adapter = self[name]
        if not isinstance(strength, SupportsFloat) or not math.isfinite(strength):
            raise ConfigError(f"expected a finite strength (1 means as trained), got {strength!r}")
        for part in (*adapter.low_rank.values(), *adapter.extras.values()):
            if hasattr(part, "strength"):
                cast(Any, part).strength = float(strength)

    def apply_to_inactive(self, fn: Callable[[Tensor], Tensor], recurse: bool) -> None:
        """Applies `fn` to the tensors of inactive adapters, like `nn.Module._apply`."""
        active = {id(part) for name in self.active for part in self.adapters[name].parts.values()}
        for adapter in self.adapters.values():
            for part in adapter.parts.values():
                if id(part) not in active:
                    cast(Any, part)._apply(fn, recurse)

    def measure_row_norms(self) -> None:
        """Recomputes DoRA's cached row norms, after the weights were moved or cast."""
        for adapter in self.adapters.values():
            for path, layer in adapter.low_rank.items():
                if layer.row_norms is not None:
                    layer.row_norms.refresh(self.layers[self._layer_paths[path]])


def layer_calls(model: nn.Module) -> LayerCalls:
    """Returns a recorder for the layers with active adapters that a forward pass calls."""
    return cast(AdapterSet, model._adapter_set).layer_calls()


def check_base(base_model: Any) -> None:
    """Raises TargetError if the base model is not a module or already has adapters."""
    if not isinstance(base_model, nn.Module):
        hint = "; load it first: AutoModelForCausalLM.from_pretrained(...)" if isinstance(base_model, str) else ""
        raise TargetError(f"expected a torch.nn.Module as base_model, got {type(base_model).__name__}{hint}")
    has_adapters = isinstance(getattr(base_model, "_adapter_set", None), AdapterSet)
    if has_adapters or any(isinstance(module, Swapped) for module in base_model.modules()):
        raise TargetError("this model already has tailora adapters; use its add_adapter, or call unload() first")
    if hasattr(base_model, "peft_config"):
        raise TargetError("this model has PEFT adapters; unload or merge them first")


def _mixin_for(part: nn.Module) -> type[Swapped]:
    if isinstance(part, LoRALayer):
        return AdaptedWhole if part.layer_type.replaces_forward else Adapted
    return Adapted if isinstance(part, Extra) else Substituted


def _training_obstacle(adapters: Mapping[str, Adapter]) -> str:
    """Returns why one of these adapters cannot be trained yet; "" if all can."""
    return next((reason for name, adapter in adapters.items() if (reason := adapter.missing_data(name))), "")
