"""How a class of layer stores its matrix and meets its input: one row of a table per class.

Every kind computes s B A x for its own idea of x, and says how its weight holds B A.
Shapes: A (r, in), B (out, r); convolutions carry their kernel in A: A (r, in/groups, *kernel), B (out, r/groups).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any, Literal

from torch import Tensor, nn

from tailora.core import geometry
from tailora.core.experts import run_with_sums
from tailora.core.geometry import Shape
from tailora.core.multihead_attention import attend
from tailora.errors import ConfigError, TargetError, listing


@dataclass(frozen=True)
class LayerType:
    """dims: layer -> (in, out) of its matrix, the bounds of the rank.
    shapes: (layer, r) -> shapes of A and B.
    update: (layer, x, A, sB) -> s B A x, in the dtype of A; x is the layer's input.
    factors: (layer, A, B) -> (groups, m, r) and (groups, r, n): their product is B A as the weight, seen as
        (groups, m, n), holds it.
    groups: layer -> blocks of A and of the weight that do not meet.
    weight: the parameter's name in the layer.
    drops: whether dropout of x has a meaning.    zero: the factor that starts at zero.
    matrix: (layer, its weight) -> W as the equation has it, (groups, out/groups, n): B A, seen as (groups, out/groups,
        r/groups) and (groups, r/groups, n), adds to it. None where a start cannot be read off the weight.
    columns: layer -> whether an output is a column of the stored weight, (in, out), and not its row.
    linear: whether "all-linear" means it.    stacked: A and B hold one matrix per expert.
    scales: whether its rows can have magnitudes (DoRA).

    What is not W x + s B A x for one input x has `forward` in place of `update`: (layer, adapters, *args, **kwargs) ->
    what the adapted layer computes, with all of its adapters.
    """

    name: str
    dims: Callable[[Any], tuple[int, int]]
    shapes: Callable[[Any, int], tuple[Shape, Shape]]
    update: Callable[[Any, Tensor, Tensor, Tensor], Tensor]
    factors: Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]
    groups: Callable[[Any], int] = lambda _: 1
    weight: str = "weight"
    drops: bool = True
    zero: Literal["A", "B"] = "B"
    matrix: Callable[[Any, Tensor], Tensor] | None = None
    columns: Callable[[Any], bool] = lambda _: False
    linear: bool = False
    stacked: bool = False
    scales: bool = True
    forward: Callable[..., Any] | None = None

    def __reduce__(self) -> tuple[Callable[[str], "LayerType"], tuple[str]]:  # copies and pickles stay the table's row
        return layer_type_named, (self.name,)


# ---- nn.MultiheadAttention: q, k and v in one matrix, or three of their own, and what comes out


def _attention_layer_type(weight: str, dims: Callable[[Any], tuple[int, int]]) -> LayerType:
    shapes = geometry.matrix_shapes(dims)
    return LayerType(
        f"Attention {weight}",
        dims,
        shapes,
        geometry.linear_update,
        geometry.factors,
        weight=weight,
        matrix=geometry.matrix,
        forward=attend,
    )


ATTENTION = {
    "in_proj_weight": _attention_layer_type("in_proj_weight", lambda layer: (layer.embed_dim, 3 * layer.embed_dim)),
    "q_proj_weight": _attention_layer_type("q_proj_weight", lambda layer: (layer.embed_dim, layer.embed_dim)),
    "k_proj_weight": _attention_layer_type("k_proj_weight", lambda layer: (layer.kdim, layer.embed_dim)),
    "v_proj_weight": _attention_layer_type("v_proj_weight", lambda layer: (layer.vdim, layer.embed_dim)),
    "out_proj": _attention_layer_type("out_proj.weight", lambda layer: (layer.embed_dim, layer.embed_dim)),
}


# ---- A parameter that its module multiplies with by itself: (out, in), or of experts (E, out, in)
# A (E r, in), row e r + k;  B (E out, r), row e out + i.


@cache
def parameter_layer_type(name: str) -> LayerType:
    """The row for a parameter of this name; the module's `is_transposed` says that it holds (E, in, out)."""

    def transposed(layer: Any) -> bool:
        return weight_of(layer, name).ndim == 3 and getattr(layer, "is_transposed", False)

    def dims(layer: Any) -> tuple[int, int]:
        m, n = weight_of(layer, name).shape[-2:]
        return (m, n) if transposed(layer) else (n, m)

    def experts(layer: Any) -> int:
        return prod(weight_of(layer, name).shape[:-2])

    def shapes(layer: Any, r: int) -> tuple[Shape, Shape]:
        (in_features, out_features), count = dims(layer), experts(layer)
        return (count * r, in_features), (count * out_features, r)

    def factors(layer: Any, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        right = A.reshape(-1, B.shape[1], A.shape[1])  # (E, r, in)
        left = B.reshape(len(right), -1, B.shape[1])  # (E, out, r)
        return (right.mT, left.mT) if transposed(layer) else (left, right)

    def matrix(layer: Any, weight: Tensor) -> Tensor:
        stack = weight.reshape(-1, *weight.shape[-2:])
        return stack.mT if transposed(layer) else stack

    return LayerType(
        f"Parameter {name}",
        dims,
        shapes,
        _no_update,
        factors,
        groups=experts,
        weight=name,
        drops=False,
        matrix=matrix,
        columns=transposed,
        stacked=True,
        forward=run_with_sums,
    )


def _no_update(*_: Any) -> Tensor:
    raise TargetError("a parameter's update has no input of its own; call the module that holds it")


# ---- The table


def _conv_groups(layer: Any) -> int:
    groups: int = layer.groups
    return groups


LINEAR = LayerType(
    "Linear",
    geometry.linear_dims,
    geometry.matrix_shapes(geometry.linear_dims),
    geometry.linear_update,
    geometry.factors,
    linear=True,
    matrix=geometry.matrix,
)
CONV1D = LayerType(
    "Conv1D",
    geometry.conv1d_dims,
    geometry.matrix_shapes(geometry.conv1d_dims),
    geometry.linear_update,
    geometry.transposed_factors,
    columns=lambda _: True,
    linear=True,
    matrix=geometry.transposed_matrix,
)
EMBEDDING = LayerType(
    "Embedding",
    geometry.embedding_dims,
    geometry.matrix_shapes(geometry.embedding_dims),
    geometry.embedding_update,
    geometry.transposed_factors,
    drops=False,
    zero="A",
    columns=lambda _: True,
    matrix=geometry.transposed_matrix,
)
CONVOLUTION = LayerType(
    "Conv",
    geometry.conv_dims,
    geometry.conv_shapes,
    geometry.conv_update,
    geometry.conv_factors,
    groups=_conv_groups,
    matrix=geometry.conv_matrix,
)

# By qualified name, so that transformers need not be imported to know its Conv1D.
LAYER_TYPES: dict[str, LayerType] = {
    "torch.nn.modules.linear.Linear": LINEAR,
    "transformers.pytorch_utils.Conv1D": CONV1D,
    "torch.nn.modules.sparse.Embedding": EMBEDDING,
    "torch.nn.modules.conv.Conv1d": CONVOLUTION,
    "torch.nn.modules.conv.Conv2d": CONVOLUTION,
    "torch.nn.modules.conv.Conv3d": CONVOLUTION,
}


MULTIHEAD = "torch.nn.modules.activation.MultiheadAttention"


def layer_type_named(name: str) -> LayerType:
    if name.startswith("Parameter "):
        return parameter_layer_type(name.removeprefix("Parameter "))
    return next(layer_type for layer_type in (*LAYER_TYPES.values(), *ATTENTION.values()) if layer_type.name == name)


def qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def layer_type_of(layer: nn.Module) -> LayerType | None:
    """The row for this layer's class or the nearest of its parents; None for what is not in the table."""
    return next((LAYER_TYPES[name] for cls in type(layer).__mro__ if (name := qualified(cls)) in LAYER_TYPES), None)


def projections(layer: Any) -> dict[str, LayerType]:
    """Name -> kind of the matrices of nn.MultiheadAttention; {} for any other class."""
    cls: Any = type(layer)
    if not _is_attention(cls):
        return {}
    separate = layer.in_proj_weight is None
    names = (
        ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj") if separate else ("in_proj_weight", "out_proj")
    )
    return {name: ATTENTION[name] for name in names}


@cache
def _is_attention(cls: Any) -> bool:
    return any(qualified(parent) == MULTIHEAD for parent in cls.__mro__)


def weight_of(layer: nn.Module, name: str = "weight") -> Tensor:
    module, name = holder(layer, name)
    weight = module._parameters[name] if name in module._parameters else getattr(module, name)
    if not isinstance(weight, Tensor):
        raise TargetError(f"{type(module).__name__}.{name} is a {type(weight).__name__}, not a tensor")
    return weight


def host_path(model: nn.Module, path: str) -> str:
    """The path of the module that computes with the matrix at `path`: itself, or what holds the part or parameter."""
    parent = path.rpartition(".")[0]
    try:
        model.get_submodule(path)
    except AttributeError:
        return parent
    return parent if path and projections(model.get_submodule(parent)) else path


def host_of(model: nn.Module, path: str) -> nn.Module:
    return model.get_submodule(host_path(model, path))


def holder(layer: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds the parameter, and its name there."""
    path, _, last = name.rpartition(".")
    return layer.get_submodule(path), last


def is_called(layer: nn.Module) -> bool:
    """False for the output projection of nn.MultiheadAttention, whose weight is read without calling it."""
    return type(layer).__name__ != "NonDynamicallyQuantizableLinear"


def obstacle(layer: nn.Module) -> str | None:
    """Why this layer cannot be adapted, although a kind fits it; None when nothing is in the way."""
    name = type(layer).__name__
    if "forward" in vars(layer):
        return f"its forward was replaced on the instance (an offload hook?); attach adapters before that ({name})"
    if not is_called(layer):
        return "its weight is read without calling it"
    if isinstance(getattr(layer, "weight", None), nn.parameter.UninitializedParameter):
        return f"its shape is not known yet ({name}); run one batch through the model first"
    if getattr(layer, "max_norm", None) is not None:
        return "max_norm rewrites its frozen weight at every look-up"
    if layer_type_of(layer) is EMBEDDING and "forward" in vars(type(layer)) and not _looks_up(layer):
        return f"{name} overrides forward, so what it looks up is not known"
    if projections(layer) and not hasattr(layer, "active_adapters") and qualified(type(layer)) != MULTIHEAD:
        return (
            f"{name} derives from nn.MultiheadAttention, so what it computes is not known"
            if _overrides(layer)
            else None
        )
    return None


def _overrides(layer: nn.Module) -> bool:
    return qualified(next(cls for cls in type(layer).__mro__ if "forward" in vars(cls))) != MULTIHEAD


def _looks_up(layer: nn.Module) -> bool:
    """nn.Embedding itself, our class derived from one, or one that only multiplies what it looks up."""
    return qualified(type(layer)) in LAYER_TYPES or hasattr(layer, "active_adapters") or hasattr(layer, "embed_scale")


# ---- Layer types of the user: one more row in the table `core.layer_types.LAYER_TYPES`.


Dims = Callable[[Any], tuple[int, int]]


def register_layer_type(
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
        raise ConfigError(f"register_layer_type takes a class derived from nn.Module; got {layer_class!r}")
    if not callable(dims):
        raise ConfigError(f"dims is a function: layer -> (in, out); got {dims!r}")
    name = qualified(layer_class)
    if problems := _problems(name, forward is not None and update is not None, replace):
        raise ConfigError(listing(problems))
    stored, matrix = (
        (geometry.transposed_factors, geometry.transposed_matrix) if transposed else (geometry.factors, geometry.matrix)
    )
    LAYER_TYPES[name] = LayerType(
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


def unregister_layer_type(layer_class: type[nn.Module]) -> None:
    """Forget a registered class. Raises ConfigError for one that is not registered; models in use keep working."""
    name = qualified(layer_class)
    if name not in LAYER_TYPES or name in OWN:
        raise ConfigError(f"{name} is not registered; registered are: {', '.join(LAYER_TYPES.keys() - OWN) or 'none'}")
    del LAYER_TYPES[name]


OWN = frozenset(LAYER_TYPES)


def _problems(name: str, both: bool, replace: bool) -> list[str]:
    problems = []
    if name in OWN or name == MULTIHEAD:
        problems.append(f"{name} is a kind of tailora's own, which is not exchanged; derive a class of your own")
    elif name in LAYER_TYPES and not replace:
        problems.append(f"{name} is registered already; pass replace=True to exchange the row")
    if both:
        problems.append("update and forward: a layer has one of the two")
    return problems
