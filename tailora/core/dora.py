"""DoRA (arXiv:2402.09353): every output row of W + s B A gets its own trained norm m, g = m / ||W + s B A||.

gain            g, computed from the norms
weight_scale    the factor of the layer's own weight, for several adapters
RowNorms        the norms of one layer, row by row, without W + s B A or an (in x in) product:

||W + s B A||^2 = ||W||^2 + <2 W A^T + s B (A A^T), s B>
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from tailora.core.device import wide_dtype
from tailora.core.layer_types import LayerType, weight_of, whole_tensor
from tailora.core.quantization import dense_weight, is_quantized, stored_weight

BLOCK = 2**18  # numbers of a 16-bit weight to cast at a time, so that they stay in a CPU's cache


def gain(magnitude: Tensor, norms: Tensor, has_zeros: bool = True) -> Tensor:
    """Returns g = m / ||W + s B A|| (out,).

    A row with norm 0 adds nothing to the output, whatever its gain. Its gain is m + 1, so that B gets a gradient.
    has_zeros: whether a norm may be 0.
    """
    if not has_zeros:
        return magnitude / norms
    is_zero = norms == 0
    return (magnitude + is_zero) / (norms + is_zero)


def weight_scale(layer: Any, adapters: Sequence[Any], gains: Sequence[Tensor | None]) -> Tensor | None:
    """Returns 1 + sum of t (g - 1), (groups, m, 1) or (groups, 1, n), for strengths t; None without DoRA."""
    rescalings = [adapter.rescaling(gain) for adapter, gain in zip(adapters, gains, strict=True) if gain is not None]
    if not rescalings:
        return None
    layer_type = adapters[0].layer_type
    scale = (1 + torch.stack(rescalings).sum(0)).view(layer_type.groups(layer), -1)  # (groups, out/groups)
    return scale[:, None] if layer_type.is_transposed(layer) else scale[:, :, None]


class WeightState(NamedTuple):
    """Identifies a weight's tensor, memory and version (torch's change counter), without keeping the tensor alive."""

    weight: ReferenceType[Tensor]
    storage: StorageWeakRef
    version: int | None

    @classmethod
    def of(cls, weight: Tensor) -> "WeightState":
        version = None if weight.is_inference() else weight._version
        return cls(ref(weight), cast(Any, StorageWeakRef)(weight.untyped_storage()), version)

    def is_of(self, weight: Tensor) -> bool:
        """True if this is the tensor's current state. Comparing two weak references would compare tensor values."""
        return self.weight() is weight and self[1:] == WeightState.of(weight)[1:]


class RowNorms:
    """||W + B A|| of every output row of one layer, in float32 at least.

    ||W|| is computed once, and again after torch has registered a change of the weight or the weight was replaced.
    The rest is computed in every forward pass, because fused optimizers and writes to `.data` change A and B unnoticed.
    """

    squares: Tensor  # ||W||^2 (out,)
    has_zeros: bool  # whether W has rows of zeros: only their norms may be 0

    def __init__(self, layer: nn.Module, layer_type: LayerType, dtype: torch.dtype) -> None:
        self.layer_type = layer_type
        self.dtype = torch.promote_types(dtype, torch.float32)
        self._weight: WeightState | None = None
        self.refresh(layer)

    def __getstate__(self) -> dict[str, object]:  # for copies and pickles
        return {**self.__dict__, "_weight": None}

    @torch.no_grad()
    def refresh(self, layer: nn.Module) -> None:
        """Recomputes ||W|| if the layer's weight was replaced or changed."""
        name = self.layer_type.weight_name
        weight = stored_weight(layer, name)
        if self._weight is None or not self._weight.is_of(weight):
            self._is_quantized = name == "weight" and is_quantized(layer)  # here: the compiler cannot trace it
            self.squares = row_squares(self._dense(layer), self.layer_type.is_transposed(layer), self.dtype)
            # the host waits for it once; a tensor without contents has none
            self.has_zeros = not self.squares.is_meta and bool((self.squares == 0).any())
            self._weight = WeightState.of(weight)

    @torch.no_grad()
    def __call__(self, layer: nn.Module, A: Tensor, B: Tensor, *, exact: bool = False) -> Tensor:
        """exact: recompute everything in float64, if the device supports it."""
        if not torch.compiler.is_compiling():
            self.refresh(layer)
        weight, transposed = self._dense(layer), self.layer_type.is_transposed(layer)
        squares = row_squares(weight, transposed, wide_dtype(A.device)) if exact else self.squares
        return row_norms(weight, transposed, squares, *self.layer_type.factors(layer, A, B), self.has_zeros)

    def _dense(self, layer: nn.Module) -> Tensor:
        """Returns the dense weight (groups, m, n), as in `LayerType.factors`."""
        layer_type = self.layer_type
        name = layer_type.weight_name
        weight = dense_weight(layer, name) if self._is_quantized else whole_tensor(weight_of(layer, name).detach())
        if layer_type.is_stacked:
            return weight.reshape(-1, *weight.shape[-2:])
        groups = layer_type.groups(layer)
        return weight.reshape(groups, len(weight) // groups, -1)


# ---- Norms of rows, block by block


def row_squares(weight: Tensor, transposed: bool, dtype: torch.dtype) -> Tensor:
    """Returns ||W||^2 of every output row (column if `transposed`) of W (groups, m, n): (out,), in `dtype`."""
    squares = [[block.to(dtype).square().sum(0 if transposed else 1) for block in _blocks(W)] for W in weight]
    return torch.cat([torch.stack(sums).sum(0) if transposed else torch.cat(sums) for sums in squares])


def row_norms(
    weight: Tensor, transposed: bool, squares: Tensor, left: Tensor, right: Tensor, has_zeros: bool = True
) -> Tensor:
    """Returns ||W + L R|| of every output row: (out,), in the dtype of `squares`, which is ||W||^2.

    W (groups, m, n), L (groups, m, r), R (groups, r, n).
    has_zeros: whether rows may be zero; if not, a norm of 0 is a rounding error and becomes 1.
    """
    left, right = left.to(squares.dtype), right.to(squares.dtype)
    if transposed:  # the columns of W + L R are the rows of W^T + R^T L^T
        product, left, right = _left_product(left, weight).mT, right.mT, left.mT
    else:
        product = _product(weight, right.mT)
    change = product.baddbmm_(left, right @ right.mT, beta=2)  # (groups, m, r)
    return F.threshold(squares + (change * left).sum(2).flatten(), 0, 0 if has_zeros else 1).sqrt()


def _product(weight: Tensor, right: Tensor) -> Tensor:
    """Returns weight (groups, m, n) @ right (groups, n, r), in the dtype of `right`.

    A weight without blocks is multiplied in its own precision, because it would be cast to float32 in every forward.
    Sums are float32 on every device. The product, rounded to W's 16 bits, is a small part of the norm: with an update
    as large as W, bfloat16 changed the norm of 576 inputs by at most 3e-4. A bfloat16 output is only exact to 4e-3.
    """
    if right.dtype == torch.float32 and not _has_blocks(weight):
        return (weight @ right.to(weight.dtype)).to(right.dtype)
    pairs = zip(weight, right, strict=True)
    return torch.stack([torch.cat([block.to(right.dtype) @ R for block in _blocks(W)]) for W, R in pairs])


def _left_product(left: Tensor, weight: Tensor) -> Tensor:
    """Returns left^T (groups, r, m) @ weight (groups, m, n), in the dtype of `left`."""
    if left.dtype == torch.float32 and not _has_blocks(weight):
        return (left.mT.to(weight.dtype) @ weight).to(left.dtype)
    sums = []
    for L, W in zip(left, weight, strict=True):
        blocks = _blocks(W)
        parts = zip(torch.split(L, len(blocks[0])), blocks, strict=True)
        sums.append(torch.stack([part.T @ block.to(left.dtype) for part, block in parts]).sum(0))
    return torch.stack(sums)


def _blocks(matrix: Tensor) -> Sequence[Tensor]:
    """Splits a matrix into blocks of rows if it is cast to a wider dtype block by block."""
    return torch.split(matrix, max(1, BLOCK // matrix.shape[1])) if _has_blocks(matrix) else (matrix,)


def _has_blocks(weight: Tensor) -> bool:
    """True on the CPU if a cast to a wider dtype is needed, except in a compiled graph."""
    return weight.device.type == "cpu" and weight.dtype.itemsize <= 2 and not torch.compiler.is_compiling()
