"""How an adapter meets a layer: the layer's class becomes a cached subclass of itself, and back.

The layer keeps its name, weights, hooks and `isinstance`. It reaches its adapters through an unregistered
reference, so that the base model's parameters and state dict stay what they were.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tailora.core.extras import Extra
from tailora.core.layer import LoRALayer


class Swapped:
    """Marks a derived class; `plain` is what it was derived from. Copies and pickles by the plain class."""

    plain: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, _: Any) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
        return _revive, (mixin_of(type(self)), self.plain), self.__dict__


class Adapted(Swapped):
    """y = W x + b + what each active adapter adds to that."""

    active_adapters: tuple[LoRALayer | Extra, ...]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]  # of the plain class
        y = base
        for adapter in self.active_adapters:
            y = adapter.added(y, base, x, self)  # type: ignore[arg-type]
        return y


class AdaptedWhole(Adapted):
    """A layer that is not W x for one input x: its kind computes it, with all active adapters."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active_adapters:
            return super(Adapted, self).forward(*args, **kwargs)  # type: ignore[misc]
        forward = cast(Callable[..., Any], cast(LoRALayer, self.active_adapters[0]).layer_type.forward)
        return forward(self, self.active_adapters, *args, **kwargs)


class Substituted(Swapped):
    """Calls a trained copy in the place of the base's module (`modules_to_save`), in the copy's precision."""

    active_adapters: tuple[nn.Module, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active_adapters:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        copy = self.active_adapters[0]
        own, trained = _dtype(self), _dtype(copy)  # type: ignore[arg-type]
        if own == trained:
            return copy(*args, **kwargs)
        y = copy(*tree_map(_cast(own, trained), args), **tree_map(_cast(own, trained), kwargs))
        return tree_map(_cast(trained, own), y)


def _dtype(module: nn.Module) -> torch.dtype | None:
    return next((parameter.dtype for parameter in module.parameters()), None)


def _cast(source: torch.dtype | None, to: torch.dtype | None) -> Callable[[Any], Any]:
    return lambda value: value.to(to) if isinstance(value, Tensor) and value.dtype == source else value


class CalledEncoderLayer(Swapped):
    """nn.TransformerEncoderLayer whose inference fast path, which reads weights past the layers, is off."""

    activation_relu_or_gelu = property(lambda _: 0, lambda *_: None)


class CalledEncoder(Swapped):
    """nn.TransformerEncoder without the nested tensors that only the fast path can take."""

    use_nested_tensor = property(lambda _: False, lambda *_: None)


FAST_PATHS: dict[type[nn.Module], type[Swapped]] = {
    nn.TransformerEncoderLayer: CalledEncoderLayer,
    nn.TransformerEncoder: CalledEncoder,
}


def _derive(mixin: type[Swapped], cls: type[nn.Module]) -> type[nn.Module]:
    return type(f"{mixin.__name__}{cls.__name__}", (mixin, cls), {"plain": cls, "__module__": __name__})


# One class per pair, so that layers share a type. The stub of lru_cache takes module classes for unhashable.
derived: Callable[[type[Swapped], type[nn.Module]], type[nn.Module]] = cast(Any, cache(_derive))


def mixin_of(cls: type) -> type[Swapped]:
    return cls.__mro__[1]


def class_on(module: nn.Module, plain: type[nn.Module]) -> type[nn.Module]:
    """`plain`, as the module's own class is derived from its plain one."""
    return derived(mixin_of(type(module)), plain) if isinstance(module, Swapped) else plain


def _revive(mixin: type[Swapped], plain: type[nn.Module]) -> nn.Module:
    cls = derived(mixin, plain)
    return cls.__new__(cls)


def mixin_for(part: nn.Module) -> type[Swapped]:
    """What the class of a layer is derived from, too, so that it runs with this part of an adapter."""
    if isinstance(part, LoRALayer):
        return AdaptedWhole if part.layer_type.forward else Adapted
    return Adapted if isinstance(part, Extra) else Substituted


def become(module: nn.Module, mixin: type[Swapped]) -> None:
    """Swap the module's class for the one derived from it; it computes as before until adapters are attached."""
    if not isinstance(module, Swapped):
        module.__class__ = derived(mixin, type(module))
        attach(module, ())


def attach(layer: nn.Module, adapters: tuple[nn.Module, ...]) -> None:
    """Let a layer that has `become` adapted run with these adapters and no others."""
    layer.__dict__["active_adapters"] = adapters  # past nn.Module's __setattr__: a reference, not a registration


def detach(layer: nn.Module) -> None:
    """The class that it was, and no trace."""
    if isinstance(layer, Swapped):
        cast(Any, layer).__class__ = layer.plain
        layer.__dict__.pop("active_adapters", None)


def encoders_around(model: nn.Module, layers: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules whose fast path would pass by one of these layers."""
    adapted = {id(layer) for layer in layers}
    suspects = [module for module in model.modules() if isinstance(module, tuple(FAST_PATHS))]
    return [module for module in suspects if any(id(child) in adapted for child in module.modules())]


def fast_path_mixin(module: nn.Module) -> type[Swapped]:
    return next(mixin for cls, mixin in FAST_PATHS.items() if isinstance(module, cls))


# ---- Evaluation mode for a while.


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for the block; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
