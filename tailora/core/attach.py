"""Attaches adapters to layers: a layer's class is swapped for a cached subclass of it, and restored later.

The layer keeps its name, weights, hooks and `isinstance`. It has an unregistered reference to its adapters, so the
base model's parameters and state dict stay unchanged.

    AdapterPart      used by an adapted layer: a part of an adapter, or its temporary replacement
    Adapted          W x + b, plus the changes of its parts
    AdaptedWhole     a layer whose layer type computes the whole output
    Substituted      a module that is replaced by its trained copy
    FrozenStatistics a normalization of the base with frozen running statistics
    swap_class, attach, attached, detach
                     change a layer's class, set its parts, and restore the class
    TensorChange, ClassChange
                     changes of a merge or a dequantization; `make` applies one and returns the inverse change
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


class AdapterPart:
    """A part of an adapter, attached to a layer. In `generate` or a mixed batch, it stands for several parts."""

    def add_to(self, y: Tensor, output: Tensor, x: Tensor, layer: Any, /) -> Tensor:
        """Returns y + the change of the layer's `output` W x + b, for the layer's input x."""
        raise NotImplementedError

    def whole_output(self, _x: Tensor, _layer: Any, /) -> Tensor | None:
        """Returns the layer's output with the change, if computing both together is faster; None otherwise."""
        return None


class Swapped:
    """The parent of swapped classes. `plain` is the original class, which copies and pickles store with the mixins."""

    plain: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, _: Any) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        return _new_instance, (mixins_of(type(self)), self.plain), self.__dict__


class Adapted(Swapped):
    """y = W x + b, plus the changes of each part of an active adapter."""

    adapter_parts: tuple[AdapterPart, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        layer = cast(nn.Module, self)
        x = args[0] if args else next(iter(kwargs.values()))  # input=x
        if len(self.adapter_parts) == 1 and (whole := self.adapter_parts[0].whole_output(x, layer)) is not None:
            return whole
        output: Tensor = self.plain.forward(layer, *args, **kwargs)  # W x + b
        y = output
        for part in self.adapter_parts:
            y = part.add_to(y, output, x, layer)
        return y


class AdaptedWhole(Adapted):
    """A layer that is not W x + b for one input x: its layer type computes the output with all active parts."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.adapter_parts:
            return self.plain.forward(cast(nn.Module, self), *args, **kwargs)
        layer_type = cast(Any, self.adapter_parts[0]).layer_type
        return layer_type.forward(self, self.adapter_parts, *args, **kwargs)


class Substituted(Swapped):
    """Calls a trained copy instead of the base's module (`modules_to_save`), in the copy's precision."""

    adapter_parts: tuple[nn.Module, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        layer = cast(nn.Module, self)
        if not self.adapter_parts:
            return self.plain.forward(layer, *args, **kwargs)
        copy = self.adapter_parts[0]
        return call_in_dtype(copy, _dtype(layer), _dtype(copy), args, kwargs)


def call_in_dtype(
    function: Callable[..., Any], dtype: torch.dtype | None, own_dtype: torch.dtype | None, args: Any, kwargs: Any
) -> Any:
    """Calls a function that computes in `own_dtype`, with inputs and outputs in `dtype`."""
    if dtype == own_dtype:
        return function(*args, **kwargs)
    args, kwargs = tree_map(lambda value: _cast(value, dtype, own_dtype), (args, kwargs))
    return tree_map(lambda value: _cast(value, own_dtype, dtype), function(*args, **kwargs))


def call_plain(layer: Any, dtype: torch.dtype | None, args: Any, kwargs: Any) -> Any:
    """Calls the base's module with inputs and outputs in the dtype of its trained copies."""
    return call_in_dtype(partial(layer.plain.forward, layer), dtype, _dtype(layer), args, kwargs)


def _dtype(module: nn.Module) -> torch.dtype | None:
    return next((parameter.dtype for parameter in module.parameters()), None)


def _cast(value: Any, source: torch.dtype | None, to: torch.dtype | None) -> Any:
    return value.to(to) if isinstance(value, Tensor) and value.dtype == source else value


# ---- Normalizations of activations or weights with running statistics


class FrozenStatistics(Swapped):
    """A module that stays in evaluation mode; the requested mode is stored for when it gets its class back."""

    training = property(lambda _: False, lambda self, mode: self.__dict__.update(training=mode))


# Statistics that a training forward updates: BatchNorm, InstanceNorm with track_running_stats, also in other libraries;
# spectral_norm as a parametrization and as a hook.
TRAINING_BUFFERS = ("running_mean", "_u", "weight_u")


def freeze_statistics(model: nn.Module) -> None:
    """Prevents training from changing the base's running statistics, which are not saved with an adapter."""
    for module in model.modules():
        if any(isinstance(module._buffers.get(name), Tensor) for name in TRAINING_BUFFERS):
            swap_class(module, FrozenStatistics)


# ---- Torch's encoders, whose fast path for inference reads weights without calling the layers


class WithoutFastPath(Swapped):
    """A torch encoder or its layer, without the fast path and its nested tensors."""

    use_nested_tensor = property(lambda _: False, lambda *_: None)
    activation_relu_or_gelu = property(lambda _: 0, lambda *_: None)


def prevent_fast_paths(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Swaps the classes of modules whose fast path would skip one of these layers."""
    adapted = set(layers)
    for module in model.modules():
        is_encoder = isinstance(module, nn.TransformerEncoder | nn.TransformerEncoderLayer)
        if is_encoder and not adapted.isdisjoint(module.modules()):
            swap_class(module, WithoutFastPath)


# ---- Swapping classes


def _derive(mixin: type[Swapped], cls: type[nn.Module]) -> type[nn.Module]:
    plain = cls.plain if issubclass(cls, Swapped) else cls
    # transformers looks up what a model records by str(class)
    same_text = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(f"{mixin.__name__}{cls.__name__}", (mixin, cls), {"plain": plain, **same_text})


# One class per pair, so that layers share a type. The stub of lru_cache considers module classes unhashable.
derived_class: Callable[[type[Swapped], type[nn.Module]], type[nn.Module]] = cast(Any, cache(_derive))


def mixins_of(cls: type) -> tuple[type[Swapped], ...]:
    """Returns the mixins of a derived class, the outermost first: one, or one around FrozenStatistics."""
    return (cls.__mro__[1], *((FrozenStatistics,) if issubclass(cls.__mro__[2], FrozenStatistics) else ()))


def class_with_plain(module: nn.Module, plain: type[nn.Module]) -> type[nn.Module]:
    """Returns `plain`, with the module's mixins if its class is swapped."""
    return _with_mixins(mixins_of(type(module)), plain) if isinstance(module, Swapped) else plain


def _with_mixins(mixins: tuple[type[Swapped], ...], plain: type[nn.Module]) -> type[nn.Module]:
    for mixin in reversed(mixins):
        plain = derived_class(mixin, plain)
    return plain


def _new_instance(mixins: tuple[type[Swapped], ...], plain: type[nn.Module]) -> nn.Module:
    cls = _with_mixins(mixins, plain)
    return cls.__new__(cls)


def runs_adapters(module: nn.Module) -> bool:
    """True if the module's class is swapped for more than freezing its statistics."""
    return isinstance(module, Swapped) and mixins_of(type(module)) != (FrozenStatistics,)


def swap_class(module: nn.Module, mixin: type[Swapped]) -> None:
    """Gives the module the class derived by the mixin. Its results stay the same until adapters are attached."""
    if not runs_adapters(module) and not isinstance(module, mixin):
        module.__class__ = derived_class(mixin, type(module))
        attach(module, ())


def attach(layer: nn.Module, parts: tuple[AdapterPart | nn.Module, ...]) -> None:
    """Sets the parts of a layer with a swapped class."""
    layer.__dict__["adapter_parts"] = parts  # a reference: nn.Module.__setattr__ would register them


def attached_parts(layer: nn.Module) -> tuple[Any, ...]:
    """Returns the layer's parts; () if its class is not swapped."""
    return cast(tuple[Any, ...], vars(layer).get("adapter_parts", ()))


@contextmanager
def attached(parts: Mapping[nn.Module, tuple[AdapterPart | nn.Module, ...]]) -> Iterator[None]:
    """Within the block, each layer uses the given parts, and afterwards its previous ones."""
    before = {layer: attached_parts(layer) for layer in parts}
    try:
        for layer, layer_parts in parts.items():
            attach(layer, layer_parts)
        yield
    finally:
        for layer, layer_parts in before.items():
            attach(layer, layer_parts)


def detach(layer: nn.Module) -> None:
    """Restores the layer's original class and removes its reference to adapters."""
    if isinstance(layer, Swapped):
        cast(Any, layer).__class__ = layer.plain
        layer.__dict__.pop("adapter_parts", None)


# ---- Reversible changes


@dataclass(frozen=True)
class TensorChange:
    """Replaces a module's parameter or buffer with a different tensor."""

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


# ---- Evaluation mode


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within the block; restores the mode of every module afterwards."""
    modes = [(module, vars(module).get("training", module.training)) for module in model.modules()]  # as asked for
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
