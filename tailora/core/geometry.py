"""Where each class of layer keeps its matrix: its sizes, s B A x for its own idea of x, and B A as its weight holds it.

The functions that the rows of `core.layer_types.LAYER_TYPES` are made of. Shapes: A (r, in), B (out, r); convolutions
carry their kernel in A: A (r, in/groups, *kernel), B (out, r/groups).
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tailora.errors import MergeError, TargetError

Shape = tuple[int, ...]


def matrix_shapes(dims: Callable[[Any], tuple[int, int]]) -> Callable[[Any, int], tuple[Shape, Shape]]:
    def shapes(layer: Any, r: int) -> tuple[Shape, Shape]:
        in_features, out_features = dims(layer)
        return (r, in_features), (out_features, r)

    return shapes


# ---- Linear; Conv1D of transformers, which stores the transpose


def linear_dims(layer: Any) -> tuple[int, int]:
    return layer.in_features, layer.out_features


def conv1d_dims(layer: Any) -> tuple[int, int]:
    return layer.nx, layer.nf


def linear_update(_: Any, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return F.linear(F.linear(x, A), B)


def factors(_: Any, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    return B[None], A[None]


def transposed_factors(_: Any, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    return A.T[None], B.T[None]


def matrix(_: Any, weight: Tensor) -> Tensor:
    return weight[None]


def transposed_matrix(_: Any, weight: Tensor) -> Tensor:
    return weight.T[None]


# ---- Embedding: x are ids, a row of the weight is a column of B A


def embedding_dims(layer: Any) -> tuple[int, int]:
    return layer.num_embeddings, layer.embedding_dim


def embedding_update(layer: Any, ids: Tensor, A: Tensor, B: Tensor) -> Tensor:
    rows = F.embedding(ids, A.T, layer.padding_idx)  # (..., r)
    update = F.linear(rows, B)
    scale = getattr(layer, "embed_scale", None)  # Gemma and others multiply what they look up
    return update if scale is None else update * scale


# ---- ConvNd


def conv_dims(layer: Any) -> tuple[int, int]:
    return layer.in_channels * prod(layer.kernel_size), layer.out_channels


def conv_shapes(layer: Any, r: int) -> tuple[Shape, Shape]:
    if r % layer.groups:
        raise TargetError(f"r = {r} on a convolution of {layer.groups} groups; take a multiple of {layer.groups}")
    return (r, layer.in_channels // layer.groups, *layer.kernel_size), (layer.out_channels, r // layer.groups)


_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def conv_update(layer: Any, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    convolve = _CONVOLUTIONS[len(layer.kernel_size)]
    padding = layer.padding
    if layer.padding_mode != "zeros":
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode), 0
    groups = layer.in_channels // A.shape[1]  # 1 for a file whose A reads all channels of a grouped layer
    hidden = convolve(x, A, None, layer.stride, padding, layer.dilation, groups)
    return convolve(hidden, B[(..., *[None] * len(layer.kernel_size))], None, groups=layer.groups)


def conv_factors(layer: Any, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    groups = layer.groups
    if layer.in_channels // A.shape[1] != groups:
        raise MergeError(
            f"A reads all {layer.in_channels} channels, but the layer's {groups} groups read "
            f"{layer.in_channels // groups} each: no weight of this layer can hold the update; keep it unmerged"
        )
    return B.view(groups, layer.out_channels // groups, -1), A.reshape(groups, A.shape[0] // groups, -1)


def conv_matrix(layer: Any, weight: Tensor) -> Tensor:
    return weight.reshape(layer.groups, layer.out_channels // layer.groups, -1)


# ---- What multiplies the weight where its rows have magnitudes


def own_share(layer: Any, adapters: Sequence[Any], gains: Sequence[Tensor | None]) -> Tensor | None:
    """1 + the sum of t (g - 1), t the adapters' strengths and g their gains: what the layer's own weight is times.

    (groups, m, 1) or (groups, 1, n), which spreads over the weight as `layer_type.factors` has it; None without
    magnitudes.
    """
    excess = [adapter.excess(gain) for adapter, gain in zip(adapters, gains, strict=True) if gain is not None]
    if not excess:
        return None
    layer_type = adapters[0].layer_type
    own = (1 + torch.stack(excess).sum(0)).view(layer_type.groups(layer), -1)  # (groups, out/groups)
    return own[:, None] if layer_type.columns(layer) else own[:, :, None]
