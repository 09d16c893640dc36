"""DoRA (arXiv:2402.09353): every output row of W + s B A gets a trained norm m of its own, g = m / ||W + s B A||.

The norm comes from the low-rank terms, row by row,

    ||W + s B A||^2 = ||W||^2 + 2 <W A^T, s B> + <(s B) (A A^T), s B>

so neither W + s B A nor an (in x in) product is ever formed.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tailora.core.bases import dense_weight, is_quantized
from tailora.core.kinds import Kind, weight_of

BLOCK = 2**18  # numbers of a 16-bit weight that are widened at a time: on a CPU they stay in the cache


def row_squares(layer: nn.Module, kind: Kind, dtype: torch.dtype) -> Tensor:
    """||W||^2 of every output row: (out,), in `dtype`."""
    weight = dense_weight(layer)
    flat = weight.reshape(len(weight), -1)
    if kind.columns:
        return torch.stack([part.to(dtype).square().sum(0) for part in _parts(flat)]).sum(0)
    return torch.cat([part.to(dtype).square().sum(1) for part in _parts(flat)])


def row_norms(layer: nn.Module, kind: Kind, weight: Tensor, squares: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """||W + B A|| of every output row: (out,), in the dtype of `squares`, ||W||^2. `weight` is W; the scale is in B."""
    left, right = (factor.to(squares.dtype) for factor in kind.factors(layer, A, B))  # (groups, m, r), (groups, r, n)
    weight = weight.reshape(len(left), left.shape[1], right.shape[2])
    if kind.columns:
        crossed = _left_product(left[0], weight[0])[None]  # (1, r, n)
        cross = (crossed * right).sum(1)
        inner = ((left.mT @ left) @ right * right).sum(1)
    else:
        crossed = weight.to(squares.dtype) @ right.mT if len(left) > 1 else _product(weight[0], right[0].T)[None]
        cross = (crossed * left).sum(2)
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

    def __init__(self, layer: nn.Module, kind: Kind, dtype: torch.dtype) -> None:
        self.kind, self.dtype = kind, torch.promote_types(dtype, torch.float32)
        self._weight: object = None
        self._kept: Kept | None = None
        self.refresh(layer)

    def __getstate__(self) -> dict[str, object]:  # of copies and pickles
        return {**self.__dict__, "_kept": None}

    @torch.no_grad()
    def refresh(self, layer: nn.Module) -> None:
        weight = weight_of(layer)
        version = None if weight.is_inference() else weight._version
        identity = id(weight), version, weight.dtype, weight.device
        if self._weight != identity:
            self.squares, self._weight, self._kept = row_squares(layer, self.kind, self.dtype), identity, None
            self._packed = is_quantized(layer)  # found out here: the compiler cannot

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
        weight = dense_weight(layer) if self._packed else weight_of(layer).detach()
        return row_norms(layer, self.kind, weight, self.squares, A, B)


def exact_norms(layer: nn.Module, kind: Kind, A: Tensor, B: Tensor) -> Tensor:
    """The same anew and in float64, where the device has it."""
    dtype = torch.float32 if A.device.type == "mps" else torch.float64
    return row_norms(layer, kind, dense_weight(layer), row_squares(layer, kind, dtype), A, B)


def gain(magnitude: Tensor, norms: Tensor) -> Tensor:
    """g = m / ||W + s B A|| (out,). A row of norm 0 has no direction: 1 there."""
    nothing = norms == 0
    return torch.where(nothing, 1.0, magnitude / torch.where(nothing, 1.0, norms))


def _product(weight: Tensor, right: Tensor) -> Tensor:
    """weight (m, n) @ right (n, r), in the dtype of `right`."""
    return torch.cat([part.to(right.dtype) @ right for part in _parts(weight)])


def _left_product(left: Tensor, weight: Tensor) -> Tensor:
    """left^T (r, m) @ weight (m, n), in the dtype of `left`."""
    parts = _parts(weight)
    sums = [rows.T @ part.to(left.dtype) for rows, part in zip(torch.split(left, len(parts[0])), parts, strict=True)]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)


def _parts(weight: Tensor) -> tuple[Tensor, ...]:
    """Blocks of rows; the whole on a device, within the compiler, and where nothing has to be widened."""
    whole = weight.device.type != "cpu" or weight.dtype.itemsize > 2 or torch.compiler.is_compiling()
    return (weight,) if whole else torch.split(weight, max(1, BLOCK // weight.shape[1]))
