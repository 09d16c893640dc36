"""Products of two thin factors: their singular values without the dense matrix, and the nearest of a lower rank.

A grouped convolution has one product per group, so everything here is batched: B (groups, m, r), A (groups, r, n),
where m and n are the outputs and the inputs (times the kernel) of a group. Other kinds are one group.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# ---- Leading singular triplets of matrices, exactly where they are small, by random subspace iteration where not.


EXACT = 256  # rows or columns; above, a few products cost less than the whole decomposition (.01 s here)
EXTRA = 16  # directions carried along beside those wanted
ITERATIONS = 16  # a weight's spectrum falls slowly


class Spectrum(NamedTuple):
    """U (..., m, k), S (..., k) falling, V (..., k, n): M is U diag(S) V and what is smaller than S[k]."""

    U: Tensor
    S: Tensor
    V: Tensor


def leading(M: Tensor, k: int) -> Spectrum:
    """The k leading triplets of M (..., m, n), in its precision; the same every time.

    Subspace iteration: Halko, Martinsson, Tropp (arXiv:0909.4061), alg. 4.4 and 5.1.
    """
    size = min(M.shape[-2:])
    if size <= EXACT or 2 * (k + EXTRA) >= size:
        return _cut(Spectrum(*torch.linalg.svd(M, full_matrices=False)), k)
    Q = orthonormal(M @ gaussian((*M.shape[:-2], M.shape[-1], k + EXTRA), M))
    for _ in range(ITERATIONS):
        Q = orthonormal(M @ orthonormal(M.mT @ Q))
    return _cut(within(Q, Q.mT @ M), k)


def within(Q: Tensor, rows: Tensor) -> Spectrum:
    """The triplets of Q rows, for orthonormal columns Q (..., m, k) and rows (..., k, n)."""
    U, S, V = torch.linalg.svd(rows, full_matrices=False)
    return Spectrum(Q @ U, S, V)


def orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis of the columns (..., m, k); k <= m."""
    basis: Tensor = torch.linalg.qr(columns).Q
    return basis


def gaussian(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """N(0, 1), always the same numbers, whatever the device; the random state is left alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like)


def _cut(found: Spectrum, k: int) -> Spectrum:
    return Spectrum(found.U[..., :k], found.S[..., :k], found.V[..., :k, :])


# ----


FIRST = 32  # singular values looked at first, where an energy says how many


@dataclass(frozen=True)
class Factors:
    """The update is B A: B (groups, m, r), A (groups, r, n)."""

    B: Tensor
    A: Tensor

    @property
    def is_finite(self) -> bool:
        return bool(self.A.isfinite().all() and self.B.isfinite().all())

    @property
    def dense(self) -> Tensor:
        """(groups, m, n)."""
        return self.B @ self.A


def zeros(like: Factors) -> Factors:
    return Factors(torch.zeros_like(like.B), torch.zeros_like(like.A))


def concatenated(parts: list[Factors]) -> Factors:
    """The exact sum: ranks add up."""
    return Factors(torch.cat([part.B for part in parts], dim=2), torch.cat([part.A for part in parts], dim=1))


def product_spectrum(factors: Factors) -> Spectrum:
    """All singular values of B A: QR of either factor, SVD of the small core, in float64 on the CPU."""
    Q_B, R_B = torch.linalg.qr(factors.B.cpu().double())  # (groups, m, q), (groups, q, r)
    Q_A, R_A = torch.linalg.qr(factors.A.mT.cpu().double())
    U, S, V = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    return Spectrum(Q_B @ U, S, V @ Q_A.mT)


def truncated(spectrum: Spectrum, k: int) -> Factors:
    """The nearest of rank k (Eckart and Young), the singular values shared evenly between the factors."""
    U, S, V = spectrum
    root = S[:, :k].sqrt()
    return Factors(U[..., :k] * root[:, None], root[..., None] * V[:, :k])


def tail(S: Tensor, k: int) -> float:
    """||dW - (dW)_k|| / ||dW|| in the Frobenius norm, of all singular values (groups, k); 0 where dW is 0."""
    total = float(S.norm())
    return float(S[:, k:].norm()) / total if total else 0.0


def rank_for_energy(S: Tensor, energy: float, total: float | None = None) -> int:
    """The smallest rank (per group, at least 1) that keeps this share of the squared singular values (groups, k)."""
    reached = S.double().square().sum(0).cumsum(0)  # over the groups, which share one rank
    wanted = energy * (float(reached[-1]) if total is None else total)
    return 1 + int((reached[:-1] < wanted).sum())


def low_rank(matrix: Tensor, k: int) -> tuple[Factors, float]:
    """The nearest to (groups, m, n) of which every group has rank k at most, and its relative error."""
    k = min(k, *matrix.shape[1:])
    factors = truncated(leading(matrix, k), k)
    return factors, residual(matrix, factors)


def for_energy(matrix: Tensor, energy: float) -> tuple[Factors, float]:
    """The nearest of the lowest rank that keeps this share of the energy of (groups, m, n), and its relative error."""
    total, shorter = float(matrix.norm()) ** 2, min(matrix.shape[1:])
    k = min(FIRST, shorter)
    found = leading(matrix, k)
    while k < shorter and (energy == 1 or float(found.S.double().square().sum()) < energy * total):
        k = min(4 * k, shorter)
        found = leading(matrix, k)
    factors = truncated(found, rank_for_energy(found.S, energy, None if k == shorter else total))
    return factors, residual(matrix, factors)


def residual(matrix: Tensor, factors: Factors) -> float:
    """||dW - B A|| / ||dW|| in the Frobenius norm, computed; 0 where dW is 0."""
    total = float(matrix.norm())
    rest = torch.baddbmm(matrix, factors.B.to(matrix), factors.A.to(matrix), alpha=-1)
    return float(rest.norm()) / total if total else 0.0
