"""Attaches adapters to layers: a layer's class is swapped for a cached subclass of it, and restored later.

The layer keeps its name, weights, hooks and `isinstance`. It reaches its adapters through an unregistered
reference, so that the base model's parameters and state dict stay what they were.

    Adapted          W x + b, and what each active adapter adds
    AdaptedWhole     a layer whose layer type computes the whole output
    Substituted      a module that is replaced by its trained copy
    FrozenStatistics a normalisation of the base, whose statistics of training stay as they are
    swap_class, attach, attached, detach
                     change a layer's class, set its active adapters, and restore the class
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tailora.core.extras import Extra
from tailora.core.layer import LoRALayer


class Swapped:
    """The parent of all classes that a layer's class is swapped for. `plain` is the class that the layer came with.

    Copies and pickles remember the mixins and the plain class, since the derived class cannot be imported.
    """

    plain: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, _: Any) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        return _new_instance, (mixins_of(type(self)), self.plain), self.__dict__


class Adapted(Swapped):
    """y = W x + b, and what each active adapter adds."""

    active_adapters: tuple[LoRALayer | Extra, ...]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]  # W x + b, by the plain class
        y = output
        for adapter in self.active_adapters:
            y = adapter.add_to(y, output, x, self)  # type: ignore[arg-type]
        return y


class AdaptedWhole(Adapted):
    """A layer that is not W x + b for one input x: its layer type computes it, with all active adapters."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active_adapters:
            return super(Adapted, self).forward(*args, **kwargs)  # type: ignore[misc]
        layer_type = cast(LoRALayer, self.active_adapters[0]).layer_type
        return layer_type.forward(self, self.active_adapters, *args, **kwargs)


class Substituted(Swapped):
    """Calls a trained copy instead of the base's module (`modules_to_save`), in the copy's precision."""

    active_adapters: tuple[nn.Module, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active_adapters:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        copy = self.active_adapters[0]
        base_dtype, copy_dtype = _dtype(self), _dtype(copy)  # type: ignore[arg-type]
        if base_dtype == copy_dtype:
            return copy(*args, **kwargs)
        to_copy = _cast(base_dtype, copy_dtype)
        return tree_map(_cast(copy_dtype, base_dtype), copy(*tree_map(to_copy, args), **tree_map(to_copy, kwargs)))


def _dtype(module: nn.Module) -> torch.dtype | None:
    return next((parameter.dtype for parameter in module.parameters()), None)


def _cast(source: torch.dtype | None, to: torch.dtype | None) -> Callable[[Any], Any]:
    return lambda value: value.to(to) if isinstance(value, Tensor) and value.dtype == source else value


# ---- Normalisations of activations or weights, with statistics that training would move


class FrozenStatistics(Swapped):
    """A module in evaluation mode, whatever `train` asks for: it uses its statistics, and leaves them alone.

    The mode that was asked for is kept, for the time when the module has its own class again.
    """

    training = property(lambda _: False, lambda self, mode: self.__dict__.update(training=mode))


# Statistics that a forward in training mode moves: of BatchNorm, and InstanceNorm with track_running_stats, also of
# other libraries; of spectral_norm as a parametrization, and as a hook.
TRAINING_BUFFERS = ("running_mean", "_u", "weight_u")


def has_training_buffers(module: nn.Module) -> bool:
    return any(isinstance(module._buffers.get(name), Tensor) for name in TRAINING_BUFFERS)


# ---- Encoders of torch, whose fast path for inference reads weights without calling the layers


class CalledEncoderLayer(Swapped):
    """nn.TransformerEncoderLayer without its fast path."""

    activation_relu_or_gelu = property(lambda _: 0, lambda *_: None)


class CalledEncoder(Swapped):
    """nn.TransformerEncoder without the nested tensors that only the fast path can take."""

    use_nested_tensor = property(lambda _: False, lambda *_: None)


FAST_PATHS: dict[type[nn.Module], type[Swapped]] = {
    nn.TransformerEncoderLayer: CalledEncoderLayer,
    nn.TransformerEncoder: CalledEncoder,
}


def encoders_around(model: nn.Module, layers: Iterable[nn.Module]) -> list[nn.Module]:
    """Returns the modules whose fast path would not call one of these layers."""
    adapted = {id(layer) for layer in layers}
    encoders = [module for module in model.modules() if isinstance(module, tuple(FAST_PATHS))]
    return [encoder for encoder in encoders if any(id(child) in adapted for child in encoder.modules())]


def fast_path_mixin(module: nn.Module) -> type[Swapped]:
    return next(mixin for cls, mixin in FAST_PATHS.items() if isinstance(module, cls))


# ---- Swapping classes


def _derive(mixin: type[Swapped], cls: type[nn.Module]) -> type[nn.Module]:
    plain = cls.plain if issubclass(cls, Swapped) else cls
    return type(f"{mixin.__name__}{cls.__name__}", (mixin, cls), {"plain": plain, "__module__": __name__})


# One class per pair, so that layers share a type. The stub of lru_cache takes module classes for unhashable.
derived_class: Callable[[type[Swapped], type[nn.Module]], type[nn.Module]] = cast(Any, cache(_derive))


def mixins_of(cls: type) -> tuple[type[Swapped], ...]:
    """Returns the mixins of a derived class, the outermost first: one, or one around FrozenStatistics."""
    return (cls.__mro__[1], *((FrozenStatistics,) if issubclass(cls.__mro__[2], FrozenStatistics) else ()))


def mixin_for(part: nn.Module) -> type[Swapped]:
    """Returns the mixin for a layer that is to run with this part of an adapter."""
    if isinstance(part, LoRALayer):
        return AdaptedWhole if part.layer_type.replaces_forward else Adapted
    return Adapted if isinstance(part, Extra) else Substituted


def class_with_plain(module: nn.Module, plain: type[nn.Module]) -> type[nn.Module]:
    """Returns `plain`, or the class derived from it by the module's mixins if the module's class is swapped."""
    return _with_mixins(mixins_of(type(module)), plain) if isinstance(module, Swapped) else plain


def _with_mixins(mixins: tuple[type[Swapped], ...], plain: type[nn.Module]) -> type[nn.Module]:
    for mixin in reversed(mixins):
        plain = derived_class(mixin, plain)
    return plain


def _new_instance(mixins: tuple[type[Swapped], ...], plain: type[nn.Module]) -> nn.Module:
    cls = _with_mixins(mixins, plain)
    return cls.__new__(cls)


def runs_adapters(module: nn.Module) -> bool:
    """True if the module's class is swapped, and not only to freeze its statistics."""
    return isinstance(module, Swapped) and mixins_of(type(module)) != (FrozenStatistics,)


def swap_class(module: nn.Module, mixin: type[Swapped]) -> None:
    """Give the module the class derived by the mixin; it computes as before until adapters are attached."""
    if not runs_adapters(module) and not isinstance(module, mixin):
        module.__class__ = derived_class(mixin, type(module))
        attach(module, ())


def attach(layer: nn.Module, adapters: tuple[nn.Module, ...]) -> None:
    """Let a layer whose class is swapped run with these adapters and no others."""
    layer.__dict__["active_adapters"] = adapters  # a reference: nn.Module.__setattr__ would register them


@contextmanager
def attached(adapters: Mapping[nn.Module, tuple[nn.Module, ...]]) -> Iterator[None]:
    """Within the block, each layer runs with the given adapters, afterwards with its former ones."""
    before = {layer: vars(layer)["active_adapters"] for layer in adapters}
    try:
        for layer, layer_adapters in adapters.items():
            attach(layer, layer_adapters)
        yield
    finally:
        for layer, layer_adapters in before.items():
            attach(layer, layer_adapters)


def detach(layer: nn.Module) -> None:
    """Give the layer the class back that it came with, and remove its reference to adapters."""
    if isinstance(layer, Swapped):
        cast(Any, layer).__class__ = layer.plain
        layer.__dict__.pop("active_adapters", None)


# ---- Evaluation mode


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the block; afterwards every module is in the mode that it was in."""
    modes = [(module, vars(module).get("training", module.training)) for module in model.modules()]  # as asked for
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
