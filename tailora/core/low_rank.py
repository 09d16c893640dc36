"""Singular values and products of two thin factors.

    leading_triplets     of a matrix: exact if it is small, otherwise by random subspace iteration
    Factors              a product B A that is never formed, its spectrum, sums and truncations
    Update               what an adapter adds to one matrix: factors, scaling, type of the layer
    nearest_of_rank, nearest_for_energy
                         the nearest low-rank product to a matrix

All functions are batched, because a grouped convolution has one product per group: B (groups, m, r), A (groups, r, n),
where m and n are the outputs and the inputs (times the kernel size) of a group. Other layer types have one group.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

EXACT = 256  # rows or columns; above, a few products cost less than the full decomposition (.01 s here)
EXTRA = 16  # directions that the iteration follows in addition to the requested ones
ITERATIONS = 16  # a weight's spectrum falls slowly
FIRST = 32  # singular values to compute first, if their number depends on an energy


# ---- Leading singular triplets


class Spectrum(NamedTuple):
    """U (..., m, k), S (..., k) descending, V (..., k, n): M is U diag(S) V plus smaller triplets."""

    U: Tensor
    S: Tensor
    V: Tensor


def leading_triplets(M: Tensor, k: int) -> Spectrum:
    """Returns the k leading triplets of M (..., m, n), in its precision; deterministic.

    Subspace iteration: Halko, Martinsson, Tropp (arXiv:0909.4061), alg. 4.4 and 5.1.
    """
    size = min(M.shape[-2:])
    if size <= EXACT or 2 * (k + EXTRA) >= size:
        spectrum = Spectrum(*torch.linalg.svd(M, full_matrices=False))
    else:
        Q, _ = torch.linalg.qr(M @ gaussian((*M.shape[:-2], M.shape[-1], k + EXTRA), M))
        for _ in range(ITERATIONS):
            Q, _ = torch.linalg.qr(M @ torch.linalg.qr(M.mT @ Q).Q)
        U, S, V = torch.linalg.svd(Q.mT @ M, full_matrices=False)
        spectrum = Spectrum(Q @ U, S, V)
    return Spectrum(spectrum.U[..., :k], spectrum.S[..., :k], spectrum.V[..., :k, :])


def gaussian(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Returns N(0, 1), always the same numbers on every device; torch's random state does not change."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu").to(like)


# ---- Products of two factors


@dataclass(frozen=True)
class Factors:
    """The product B A: B (groups, m, r), A (groups, r, n)."""

    B: Tensor
    A: Tensor

    @property
    def dense(self) -> Tensor:
        """(groups, m, n)."""
        return self.B @ self.A


@dataclass(frozen=True, eq=False)
class Update:
    """What an adapter adds to one matrix, or to a stack of experts.

    factors: s (B A - B0 A0) by group, with twice the rank if the initial factors are subtracted; float32 or wider.
    weight: returns W (groups, m, n), or the weight of a stack as it is stored; None without the base model.
    dense: returns dW with DoRA's magnitudes (groups, m, n); None without DoRA or without the base model.
    """

    path: str
    layer_type: str
    r: int  # rank, as trained
    factors: Factors
    scaling: float
    configured_scaling: float
    learned_scaling: bool = False
    dora: bool = False
    stacked: bool = False  # True if the groups are experts, each of rank r; False if they are blocks of one matrix
    weight: Callable[[], Tensor] | None = None
    dense: Callable[[], Tensor] | None = None


def concatenated(products: list[Factors]) -> Factors:
    """Returns the exact sum of the products; their ranks add up."""
    return Factors(torch.cat([factors.B for factors in products], 2), torch.cat([factors.A for factors in products], 1))


def product_spectrum(factors: Factors) -> Spectrum:
    """Returns all triplets of B A: QR of both factors, then SVD of the small core, in float64 on the CPU."""
    Q_B, R_B = torch.linalg.qr(factors.B.cpu().double())  # (groups, m, q), (groups, q, r)
    Q_A, R_A = torch.linalg.qr(factors.A.mT.cpu().double())
    U, S, V = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    return Spectrum(Q_B @ U, S, V @ Q_A.mT)


def truncated(spectrum: Spectrum, k: int) -> Factors:
    """Returns the nearest product of rank k (Eckart-Young); each factor gets the roots of the singular values."""
    U, S, V = spectrum
    root = S[:, :k].sqrt()
    return Factors(U[..., :k] * root[:, None], root[..., None] * V[:, :k])


def truncation_error(S: Tensor, k: int) -> float:
    """Returns ||dW - (dW)_k|| / ||dW|| in the Frobenius norm, for all singular values S (groups, k) of dW; 0 for 0."""
    total = float(S.norm())
    return float(S[:, k:].norm()) / total if total else 0.0


def rank_for_energy(S: Tensor, energy: float, total: float | None = None) -> int:
    """Returns the smallest rank (per group, at least 1) that keeps this share of the squares of S (groups, k).

    total: the sum of all squares, if S contains only the leading values.
    """
    reached = S.cpu().double().square().sum(0).cumsum(0)  # over the groups, which share one rank
    wanted = energy * (float(reached[-1]) if total is None else total)
    return 1 + int((reached[:-1] < wanted).sum())


# ---- The nearest product to a matrix


def nearest_of_rank(matrix: Tensor, k: int) -> tuple[Factors, float]:
    """Returns the nearest product to (groups, m, n) of rank at most k in every group, and its relative error."""
    k = min(k, *matrix.shape[1:])
    factors = truncated(leading_triplets(matrix, k), k)
    return factors, relative_error(matrix, factors)


def nearest_for_energy(matrix: Tensor, energy: float) -> tuple[Factors, float]:
    """Returns the lowest-rank product that keeps this share of the matrix's squared norm, and its error."""
    total, largest_rank = float(matrix.norm()) ** 2, min(matrix.shape[1:])
    k = min(FIRST, largest_rank)
    spectrum = leading_triplets(matrix, k)
    while k < largest_rank and (energy == 1 or float(spectrum.S.cpu().double().square().sum()) < energy * total):
        k = min(4 * k, largest_rank)
        spectrum = leading_triplets(matrix, k)
    rank = rank_for_energy(spectrum.S, energy, None if k == largest_rank else total)
    factors = truncated(spectrum, rank)
    return factors, relative_error(matrix, factors)


def relative_error(matrix: Tensor, factors: Factors) -> float:
    """Returns ||dW - B A|| / ||dW|| in the Frobenius norm; 0 where dW is 0."""
    total = float(matrix.norm())
    difference = torch.baddbmm(matrix, factors.B.to(matrix), factors.A.to(matrix), alpha=-1)
    return float(difference.norm()) / total if total else 0.0
