"""Kinds of the user's own: one more row in the table `core.layer_types.KINDS`."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tailora.core import geometry
from tailora.core.geometry import Shape
from tailora.core.layer_types import KINDS, MULTIHEAD, Kind, qualified
from tailora.errors import ConfigError, listing

Dims = Callable[[Any], tuple[int, int]]


def register_kind(
    layer_class: type[nn.Module],
    dims: Dims,
    *,
    update: Callable[[Any, Tensor, Tensor, Tensor], Tensor] | None = None,
    factors: Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    shapes: Callable[[Any, int], tuple[Shape, Shape]] | None = None,
    forward: Callable[..., Any] | None = None,
    weight: str = "weight",
    transposed: bool = False,
    linear: bool = False,
    replace: bool = False,
) -> None:
    """Let layers of this class, and of classes derived from it, be adapted. Lasts as long as the process.

    dims: layer -> (in, out) of its matrix.    weight: the name of the parameter that holds it, as (out, in), or as
        (in, out) when `transposed`.    linear: "all-linear" means this class, too.
    update: (layer, x, A, sB) -> what the adapter adds to the layer's output, by default that of a matrix, B A x.
    factors: (layer, A, B) -> (groups, m, r) and (groups, r, n) whose product, reshaped, is B A as the weight holds it:
        what merging adds. By default that of a matrix.
    shapes: (layer, r) -> shapes of A and B, by default (r, in) and (out, r).
    forward: (layer, adapters, *args, **kwargs) -> the adapted layer's output, where it is not a sum of the layer's own
        and an update of one input; in the place of `update`. `layer.plain.forward(layer, ...)` is the layer's own.

    The class is known by its qualified name. Registering a name a second time, or one that tailora knows, raises
    ConfigError; with `replace` it exchanges a row that was registered, never one of tailora's own.
    """
    if not (isinstance(layer_class, type) and issubclass(layer_class, nn.Module)):
        raise ConfigError(f"register_kind takes a class derived from nn.Module; got {layer_class!r}")
    if not callable(dims):
        raise ConfigError(f"dims is a function: layer -> (in, out); got {dims!r}")
    name = qualified(layer_class)
    if problems := _problems(name, forward is not None and update is not None, replace):
        raise ConfigError(listing(problems))
    stored, matrix = (
        (geometry.transposed_factors, geometry.transposed_matrix) if transposed else (geometry.factors, geometry.matrix)
    )
    KINDS[name] = Kind(
        name,
        dims,
        shapes or geometry.matrix_shapes(dims),
        update or geometry.linear_update,
        factors or stored,
        weight=weight,
        matrix=None if factors or shapes else matrix,
        columns=lambda _: transposed,
        linear=linear,
        scales=forward is None,
        forward=forward,
    )


def unregister_kind(layer_class: type[nn.Module]) -> None:
    """Forget a registered class. Raises ConfigError for one that is not registered; models in use keep working."""
    name = qualified(layer_class)
    if name not in KINDS or name in OWN:
        raise ConfigError(f"{name} is not registered; registered are: {', '.join(KINDS.keys() - OWN) or 'none'}")
    del KINDS[name]


OWN = frozenset(KINDS)


def _problems(name: str, both: bool, replace: bool) -> list[str]:
    problems = []
    if name in OWN or name == MULTIHEAD:
        problems.append(f"{name} is a kind of tailora's own, which is not exchanged; derive a class of your own")
    elif name in KINDS and not replace:
        problems.append(f"{name} is registered already; pass replace=True to exchange the row")
    if both:
        problems.append("update and forward: a layer has one of the two")
    return problems
