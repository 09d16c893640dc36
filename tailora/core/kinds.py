"""How a class of layer stores its matrix and meets its input: one row of a table per class.

Every kind computes s B A x for its own idea of x, and says how its weight holds B A.
Shapes: A (r, in), B (out, r); convolutions carry their kernel in A: A (r, in/groups, *kernel), B (out, r/groups).
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from tailora.errors import MergeError, TargetError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Kind:
    """dims: layer -> (in, out) of its matrix, the bounds of the rank.
    shapes: (layer, r) -> shapes of A and B.
    update: (layer, x, A, sB) -> s B A x, in the dtype of A; x is the layer's input.
    factors: (layer, A, B) -> (groups, m, r) and (groups, r, n): their product is B A as the weight, seen as
        (groups, m, n), holds it.
    drops: whether dropout of x has a meaning.    zero: the factor that starts at zero.
    matrix: (layer, its weight) -> W as the equation has it, (groups, out/groups, n): B A, seen as (groups, out/groups,
        r/groups) and (groups, r/groups, n), adds to it. None where a start cannot be read off the weight.
    columns: whether an output is a column of the stored weight, (in, out), and not its row.
    """

    name: str
    dims: Callable[[Any], tuple[int, int]]
    shapes: Callable[[Any, int], tuple[Shape, Shape]]
    update: Callable[[Any, Tensor, Tensor, Tensor], Tensor]
    factors: Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]]
    drops: bool = True
    zero: Literal["A", "B"] = "B"
    matrix: Callable[[Any, Tensor], Tensor] | None = None
    columns: bool = False

    def __reduce__(self) -> tuple[Callable[[str], "Kind"], tuple[str]]:  # copies and pickles stay the table's row
        return kind_named, (self.name,)


def _matrix_shapes(dims: Callable[[Any], tuple[int, int]]) -> Callable[[Any, int], tuple[Shape, Shape]]:
    def shapes(layer: Any, r: int) -> tuple[Shape, Shape]:
        in_features, out_features = dims(layer)
        return (r, in_features), (out_features, r)

    return shapes


# ---- Linear; Conv1D of transformers, which stores the transpose


def _linear_dims(layer: Any) -> tuple[int, int]:
    return layer.in_features, layer.out_features


def _conv1d_dims(layer: Any) -> tuple[int, int]:
    return layer.nx, layer.nf


def _linear_update(_: Any, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return F.linear(F.linear(x, A), B)


def _factors(_: Any, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    return B[None], A[None]


def _transposed_factors(_: Any, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    return A.T[None], B.T[None]


def _matrix(_: Any, weight: Tensor) -> Tensor:
    return weight[None]


def _transposed_matrix(_: Any, weight: Tensor) -> Tensor:
    return weight.T[None]


# ---- Embedding: x are ids, a row of the weight is a column of B A


def _embedding_dims(layer: Any) -> tuple[int, int]:
    return layer.num_embeddings, layer.embedding_dim


def _embedding_update(layer: Any, ids: Tensor, A: Tensor, B: Tensor) -> Tensor:
    rows = F.embedding(ids, A.T, layer.padding_idx)  # (..., r)
    update = F.linear(rows, B)
    scale = getattr(layer, "embed_scale", None)  # Gemma and others multiply what they look up
    return update if scale is None else update * scale


# ---- ConvNd


def _conv_dims(layer: Any) -> tuple[int, int]:
    return layer.in_channels * prod(layer.kernel_size), layer.out_channels


def _conv_shapes(layer: Any, r: int) -> tuple[Shape, Shape]:
    if r % layer.groups:
        raise TargetError(f"r = {r} on a convolution of {layer.groups} groups; take a multiple of {layer.groups}")
    return (r, layer.in_channels // layer.groups, *layer.kernel_size), (layer.out_channels, r // layer.groups)


_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def _conv_update(layer: Any, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    convolve = _CONVOLUTIONS[len(layer.kernel_size)]
    padding = layer.padding
    if layer.padding_mode != "zeros":
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0
    groups = layer.in_channels // A.shape[1]  # 1 for a file whose A reads all channels of a grouped layer
    hidden = convolve(x, A, None, layer.stride, padding, layer.dilation, groups)
    return convolve(hidden, B[(..., *[None] * len(layer.kernel_size))], None, groups=layer.groups)


def _conv_factors(layer: Any, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    groups = layer.groups
    if layer.in_channels // A.shape[1] != groups:
        raise MergeError(
            f"A reads all {layer.in_channels} channels, but the layer's {groups} groups read "
            f"{layer.in_channels // groups} each: no weight of this layer can hold the update; keep it unmerged"
        )
    return B.view(groups, layer.out_channels // groups, -1), A.reshape(groups, A.shape[0] // groups, -1)


def _conv_matrix(layer: Any, weight: Tensor) -> Tensor:
    return weight.reshape(layer.groups, layer.out_channels // layer.groups, -1)


LINEAR = Kind("Linear", _linear_dims, _matrix_shapes(_linear_dims), _linear_update, _factors, matrix=_matrix)
CONV1D = Kind(
    "Conv1D",
    _conv1d_dims,
    _matrix_shapes(_conv1d_dims),
    _linear_update,
    _transposed_factors,
    columns=True,
    matrix=_transposed_matrix,
)
EMBEDDING = Kind(
    "Embedding",
    _embedding_dims,
    _matrix_shapes(_embedding_dims),
    _embedding_update,
    _transposed_factors,
    drops=False,
    zero="A",
    matrix=_transposed_matrix,
    columns=True,
)
CONVOLUTION = Kind("Conv", _conv_dims, _conv_shapes, _conv_update, _conv_factors, matrix=_conv_matrix)

# By qualified name, so that transformers need not be imported to know its Conv1D.
KINDS: dict[str, Kind] = {
    "torch.nn.modules.linear.Linear": LINEAR,
    "transformers.pytorch_utils.Conv1D": CONV1D,
    "torch.nn.modules.sparse.Embedding": EMBEDDING,
    "torch.nn.modules.conv.Conv1d": CONVOLUTION,
    "torch.nn.modules.conv.Conv2d": CONVOLUTION,
    "torch.nn.modules.conv.Conv3d": CONVOLUTION,
}


def kind_named(name: str) -> Kind:
    return next(kind for kind in KINDS.values() if kind.name == name)


def qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def kind_of(layer: nn.Module) -> Kind | None:
    """The row for this layer's class or the nearest of its parents; None for what is not in the table."""
    return next((KINDS[name] for cls in type(layer).__mro__ if (name := qualified(cls)) in KINDS), None)


def weight_of(layer: nn.Module) -> Tensor:
    weight = layer.weight
    if not isinstance(weight, Tensor):
        raise TargetError(f"{type(layer).__name__}.weight is a {type(weight).__name__}, not a tensor")
    return weight


def is_called(layer: nn.Module) -> bool:
    """False for the output projection of nn.MultiheadAttention, whose weight is read without calling it."""
    return type(layer).__name__ != "NonDynamicallyQuantizableLinear"


def obstacle(layer: nn.Module) -> str | None:
    """Why this layer cannot be adapted, although a kind fits it; None when nothing is in the way."""
    name = type(layer).__name__
    if "forward" in vars(layer):
        return f"its forward was replaced on the instance (an offload hook?); attach adapters before that ({name})"
    if not is_called(layer):
        return "nn.MultiheadAttention reads its weight without calling it"
    if isinstance(getattr(layer, "weight", None), nn.parameter.UninitializedParameter):
        return f"its shape is not known yet ({name}); run one batch through the model first"
    if getattr(layer, "max_norm", None) is not None:
        return "max_norm rewrites its frozen weight at every look-up"
    if kind_of(layer) is EMBEDDING and "forward" in vars(type(layer)) and not _looks_up(layer):
        return f"{name} overrides forward, so what it looks up is not known"
    return None


def _looks_up(layer: nn.Module) -> bool:
    """nn.Embedding itself, our class derived from one, or one that only multiplies what it looks up."""
    return qualified(type(layer)) in KINDS or hasattr(layer, "active_adapters") or hasattr(layer, "embed_scale")
