"""Linear layers that share an input, with their updates: forward and backward, by large products.

For the layers i that read x (tokens, in), with noise n for dropout and B scaled:

    x_low = x * n               XA = x_low A^T, A of all i stacked: one product
    y_i   = x W_i^T + b_i + XA_i B_i^T
    G_i   = gradient of y_i     GB_i = G_i B_i
    d x   = sum G_i W_i + n * (GB A)
    d A   = GB^T x_low          d B_i = G_i^T XA_i
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tailora.kernels.products import add_product, product


@dataclass(frozen=True)
class Projection:
    """One linear layer, frozen, and the factors of its update in the layer's precision, if it has one."""

    weight: Tensor  # (out, in)
    bias: Tensor | None  # (out,)
    A: Tensor | None = None  # (r, in)
    B: Tensor | None = None  # (out, r), scaled

    @property
    def r(self) -> int:
        return 0 if self.A is None else self.A.shape[0]


Pairs = list[tuple[Tensor, Tensor] | None]


def forward(
    x: Tensor, projections: Sequence[Projection], noise: Tensor | None = None, residual: Tensor | None = None
) -> tuple[list[Tensor], Tensor | None]:
    """Every layer's output (tokens, out), and XA (tokens, sum of r). `residual` is added to the output."""
    low = _low(x, projections, noise)
    outputs = []
    for projection, rows in zip(projections, _columns(low, projections), strict=True):
        y = product(x, projection.weight.t(), residual)
        if projection.bias is not None:
            y.add_(projection.bias)
        if projection.B is not None:
            y.addmm_(rows, projection.B.t())
        outputs.append(y)
    return outputs, low


def backward_low(gradients: Sequence[Tensor], projections: Sequence[Projection]) -> Tensor | None:
    """GB (tokens, sum of r); None where nothing is adapted."""
    adapted = [(g, p.B) for g, p in zip(gradients, projections, strict=True) if p.B is not None]
    if not adapted:
        return None
    return torch.cat([torch.mm(gradient, B) for gradient, B in adapted], dim=1)


def backward_input(
    gradients: Sequence[Tensor],
    projections: Sequence[Projection],
    low: Tensor | None,
    noise: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Gradient of x (tokens, in), from GB; into `out` where given."""
    first, *others = zip(gradients, projections, strict=True)
    dx = product(first[0], first[1].weight, out=out)
    for gradient, projection in others:
        add_product(dx, gradient, projection.weight)
    if low is not None:
        A = _stacked(projections)
        dx = dx.addmm_(low, A) if noise is None else dx.addcmul_(torch.mm(low, A), noise)
    return dx


def backward_factors(
    x: Tensor,
    gradients: Sequence[Tensor],
    projections: Sequence[Projection],
    forward_low: Tensor | None,
    low: Tensor | None,
    noise: Tensor | None = None,
) -> Pairs:
    """Gradients of A and B of every layer, None where it has none; from XA and GB."""
    if forward_low is None or low is None:
        return [None] * len(projections)
    dA = torch.mm(low.t(), x if noise is None else x * noise)  # (sum of r, in)
    rows = torch.split(dA, [projection.r for projection in projections])
    parts = zip(projections, gradients, rows, _columns(forward_low, projections), strict=True)
    return [(own, torch.mm(gradient.t(), low_own)) if p.r else None for p, gradient, own, low_own in parts]


def _low(x: Tensor, projections: Sequence[Projection], noise: Tensor | None) -> Tensor | None:
    if not any(projection.r for projection in projections):
        return None
    return torch.mm(x if noise is None else x * noise, _stacked(projections).t())


def _columns(low: Tensor | None, projections: Sequence[Projection]) -> Sequence[Tensor]:
    """Each layer's part of XA; of width 0 where it is not adapted."""
    if low is None:
        return [projection.weight for projection in projections]  # never read
    return torch.split(low, [projection.r for projection in projections], dim=1)


def _stacked(projections: Sequence[Projection]) -> Tensor:
    factors = [projection.A for projection in projections if projection.A is not None]
    return factors[0] if len(factors) == 1 else torch.cat(factors)
