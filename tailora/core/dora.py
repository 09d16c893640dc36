"""DoRA (arXiv:2402.09353): every output row of W + s B A gets a trained norm m of its own, g = m / ||W + s B A||.

The norm comes from the low-rank terms, row by row,

    ||W + s B A||^2 = ||W||^2 + 2 <W A^T, s B> + <(s B) (A A^T), s B>

so neither W + s B A nor an (in x in) product is ever formed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tailora.core.fused_layers import OutputSlice
from tailora.core.layer_types import LayerType, weight_of
from tailora.core.quantization import dense_weight, is_quantized

BLOCK = 2**18  # numbers of a 16-bit weight that are widened at a time: on a CPU they stay in the cache


def stored(weight: Tensor, layer: nn.Module, layer_type: LayerType, rows: OutputSlice | None) -> Tensor:
    """The weight as `kind.factors` has it, (groups, m, n); of a part of a fused layer its rows alone."""
    if rows is not None:
        weight = rows.take(weight) if layer_type.columns(layer) else rows.take(weight.mT).mT
    if layer_type.stacked:
        return weight.reshape(-1, *weight.shape[-2:])
    groups = layer_type.groups(layer)
    return weight.reshape(groups, len(weight) // groups, -1)


def row_squares(weight: Tensor, columns: bool, dtype: torch.dtype) -> Tensor:
    """||W||^2 of every output row of W (groups, m, n), where that is a column of n if `columns`: (out,), in `dtype`."""
    if len(weight) == 1 and columns:
        return torch.stack([part.to(dtype).square().sum(0) for part in _parts(weight[0])]).sum(0)
    dim = 0 if columns else 1
    if len(weight) == 1:
        return torch.cat([part.to(dtype).square().sum(dim) for part in _parts(weight[0])])
    return torch.cat([part.to(dtype).square().sum(dim + 1) for part in _parts(weight)]).flatten()


def row_norms(weight: Tensor, columns: bool, squares: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """||W + L R|| of every output row: (out,), in the dtype of `squares`, ||W||^2.

    W (groups, m, n), L (groups, m, r), R (groups, r, n).
    """
    left, right = left.to(squares.dtype), right.to(squares.dtype)
    if columns:
        cross = (_left_product(left, weight) * right).sum(1)
        inner = ((left.mT @ left) @ right * right).sum(1)
    else:
        cross = (_product(weight, right.mT) * left).sum(2)
        inner = (left @ (right @ right.mT) * left).sum(2)
    return (squares + (2 * cross + inner).flatten()).clamp(min=0).sqrt()


class Kept(NamedTuple):
    """Norms, and copies of the factors that they were computed from."""

    A: Tensor
    B: Tensor
    norms: Tensor

    def still(self, A: Tensor, B: Tensor) -> bool:
        """By value: an optimiser that writes to `.data` leaves no other trace."""
        usable = torch.is_inference_mode_enabled() or not self.norms.is_inference()
        alike = A.dtype == self.A.dtype and A.device == self.A.device
        return usable and alike and torch.equal(A, self.A) and torch.equal(B, self.B)


class RowNorms:
    """||W + B A|| of every output row of one layer, in float32 at least; nothing is computed twice for nothing.

    ||W|| is measured once, and again when the weight is another, as far as torch tells. On a CPU the norms are kept
    for the next token or the next part of a batch, since comparing the factors is cheap beside a product with W.
    """

    squares: Tensor  # ||W||^2 (out,)

    def __init__(
        self, layer: nn.Module, layer_type: LayerType, dtype: torch.dtype, rows: OutputSlice | None = None
    ) -> None:
        self.layer_type, self.rows, self.dtype = layer_type, rows, torch.promote_types(dtype, torch.float32)
        self._weight: object = None
        self._kept: Kept | None = None
        self.refresh(layer)

    def __getstate__(self) -> dict[str, object]:  # of copies and pickles
        return {**self.__dict__, "_kept": None}

    @torch.no_grad()
    def refresh(self, layer: nn.Module) -> None:
        weight = weight_of(layer, self.layer_type.weight)
        version = None if weight.is_inference() else weight._version
        identity = id(weight), version, weight.dtype, weight.device
        if self._weight != identity:
            self._packed = self.layer_type.weight == "weight" and is_quantized(
                layer
            )  # here: the compiler cannot find it out
            self.squares = row_squares(self._stored(layer), self.layer_type.columns(layer), self.dtype)
            self._weight, self._kept = identity, None

    @torch.no_grad()
    def __call__(self, layer: nn.Module, A: Tensor, B: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self._computed(layer, A, B)
        self.refresh(layer)
        if A.device.type != "cpu":  # comparing would wait for the device
            return self._computed(layer, A, B)
        if self._kept is None or not self._kept.still(A, B):
            self._kept = Kept(A.clone(), B.clone(), self._computed(layer, A, B))
        return self._kept.norms

    def _computed(self, layer: nn.Module, A: Tensor, B: Tensor) -> Tensor:
        left, right = self.layer_type.factors(layer, A, B)
        return row_norms(self._stored(layer), self.layer_type.columns(layer), self.squares, left, right)

    @torch.no_grad()
    def exact(self, layer: nn.Module, A: Tensor, B: Tensor) -> Tensor:
        """The same anew and in float64, where the device has it."""
        dtype = torch.float32 if A.device.type == "mps" else torch.float64
        weight, columns = self._stored(layer), self.layer_type.columns(layer)
        return row_norms(weight, columns, row_squares(weight, columns, dtype), *self.layer_type.factors(layer, A, B))

    def _stored(self, layer: nn.Module) -> Tensor:
        name = self.layer_type.weight
        weight = dense_weight(layer, name) if self._packed else weight_of(layer, name).detach()
        return stored(weight, layer, self.layer_type, self.rows)


def gain(magnitude: Tensor, norms: Tensor) -> Tensor:
    """g = m / ||W + s B A|| (out,). A row of norm 0 has no direction: 1 there."""
    nothing = norms == 0
    return torch.where(nothing, 1.0, magnitude / torch.where(nothing, 1.0, norms))


def _product(weight: Tensor, right: Tensor) -> Tensor:
    """weight (groups, m, n) @ right (groups, n, r), in the dtype of `right`."""
    if len(weight) == 1:
        return torch.cat([part.to(right.dtype) @ right[0] for part in _parts(weight[0])])[None]
    parts = _parts(weight)
    return torch.cat([part.to(right.dtype) @ each for part, each in zip(parts, _alike(right, parts), strict=True)])


def _left_product(left: Tensor, weight: Tensor) -> Tensor:
    """left^T (groups, r, m) @ weight (groups, m, n), in the dtype of `left`."""
    if len(weight) > 1:
        parts = _parts(weight)
        return torch.cat([each.mT @ part.to(left.dtype) for part, each in zip(parts, _alike(left, parts), strict=True)])
    parts = _parts(weight[0])
    sums = [each.T @ part.to(left.dtype) for part, each in zip(parts, _alike(left[0], parts), strict=True)]
    return (sums[0] if len(sums) == 1 else torch.stack(sums).sum(0))[None]


def _alike(factor: Tensor, parts: Sequence[Tensor]) -> Sequence[Tensor]:
    """Cut along its first dimension as the parts of the weight are."""
    return torch.split(factor, len(parts[0]))


def _parts(weight: Tensor) -> Sequence[Tensor]:
    """Blocks along the first dimension; the whole on a device, in the compiler, and where nothing has to be widened."""
    whole = weight.device.type != "cpu" or weight.dtype.itemsize > 2 or torch.compiler.is_compiling()
    return (weight,) if whole else torch.split(weight, max(1, BLOCK // weight[0].numel()))
