"""DoRA (arXiv:2402.09353): every output row of W + s B A gets a trained norm m of its own, g = m / ||W + s B A||.

The norm comes from the low-rank terms, row by row,

    ||W + s B A||^2 = ||W||^2 + 2 <W A^T, s B> + <(s B) (A A^T), s B>

so neither W + s B A nor an (in x in) product is ever formed. ||W||^2 is kept (`row_squares`).
"""

import torch
from torch import Tensor, nn

from tailora.core.kinds import Kind, weight_of

BLOCK = 2**18  # numbers of a 16-bit weight that are widened at a time: on a CPU they stay in the cache


def row_squares(layer: nn.Module, kind: Kind, dtype: torch.dtype) -> Tensor:
    """||W||^2 of every output row: (out,), in `dtype`."""
    weight = weight_of(layer).detach()
    flat = weight.reshape(len(weight), -1)
    if kind.columns:
        return torch.stack([part.to(dtype).square().sum(0) for part in _parts(flat)]).sum(0)
    return torch.cat([part.to(dtype).square().sum(1) for part in _parts(flat)])


def row_norms(layer: nn.Module, kind: Kind, squares: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """||W + B A|| of every output row: (out,), in the dtype of `squares`, ||W||^2. The scale is in B."""
    left, right = (factor.to(squares.dtype) for factor in kind.factors(layer, A, B))  # (groups, m, r), (groups, r, n)
    weight = weight_of(layer).detach().reshape(len(left), left.shape[1], right.shape[2])
    if kind.columns:
        crossed = _left_product(left[0], weight[0])[None]  # (1, r, n)
        cross = (crossed * right).sum(1)
        inner = ((left.mT @ left) @ right * right).sum(1)
    else:
        crossed = weight.to(squares.dtype) @ right.mT if len(left) > 1 else _product(weight[0], right[0].T)[None]
        cross = (crossed * left).sum(2)
        inner = (left @ (right @ right.mT) * left).sum(2)
    return (squares + (2 * cross + inner).flatten()).clamp(min=0).sqrt()


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
