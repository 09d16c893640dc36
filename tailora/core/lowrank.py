"""Products of two thin factors: their singular values without the dense matrix, and the best of a lower rank.

A grouped convolution has one product per group, so everything here is batched: B (groups, m, r), A (groups, r, n),
where m and n are the outputs and the inputs (times the kernel) of a group. Other kinds are one group.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SMALL = 512  # of the shorter side; below it all singular values cost little
OVERSAMPLE = 16
ITERATIONS = 4


@dataclass(frozen=True)
class Factors:
    """The update is B A: B (groups, m, r), A (groups, r, n)."""

    B: Tensor
    A: Tensor

    @property
    def dense(self) -> Tensor:
        """(groups, m, n)."""
        return self.B @ self.A


@dataclass(frozen=True)
class Spectrum:
    """U (groups, m, k), S (groups, k) descending, Vh (groups, k, n): the leading part of U S Vh."""

    U: Tensor
    S: Tensor
    Vh: Tensor

    def truncated(self, k: int) -> Factors:
        """The best approximation of rank k (Eckart-Young), the singular values shared evenly between the factors."""
        root = self.S[:, :k].sqrt()
        return Factors(self.U[:, :, :k] * root[:, None], root[..., None] * self.Vh[:, :k])

    def error(self, k: int) -> float:
        """||dW - (dW)_k|| / ||dW|| in the Frobenius norm; 0 where dW is 0. Of a whole spectrum."""
        total = float(self.S.norm())
        return float(self.S[:, k:].norm()) / total if total else 0.0


def concatenated(parts: list[Factors]) -> Factors:
    """The exact sum: ranks add up."""
    return Factors(torch.cat([part.B for part in parts], dim=2), torch.cat([part.A for part in parts], dim=1))


def product_spectrum(factors: Factors) -> Spectrum:
    """All singular values of B A: QR of either factor, SVD of the small core, in float64 on the CPU."""
    Q_B, R_B = torch.linalg.qr(factors.B.cpu().double())  # (groups, m, q), (groups, q, r)
    Q_A, R_A = torch.linalg.qr(factors.A.mT.cpu().double())
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    return Spectrum(Q_B @ U, S, Vh @ Q_A.mT)


def dense_spectrum(matrix: Tensor, k: int, seed: int = 0) -> Spectrum:
    """The k leading singular values of (groups, m, n), exact for small matrices or a large k.

    Else by subspace iteration (Halko et al., arXiv:0909.4061, alg. 4.4), whose start depends on the seed alone.
    """
    shorter = min(matrix.shape[1:])
    if shorter <= SMALL or 4 * k >= shorter:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        return Spectrum(U[..., :k], S[..., :k], Vh[:, :k])
    devices = [matrix.device] if matrix.device.type != "cpu" else []
    with torch.random.fork_rng(devices, device_type=matrix.device.type if devices else "cuda"):
        torch.manual_seed(seed)
        U, S, V = torch.svd_lowrank(matrix, q=min(2 * k + OVERSAMPLE, shorter), niter=ITERATIONS)
    return Spectrum(U[..., :k], S[..., :k], V[..., :k].mT)


def dense_for_energy(matrix: Tensor, energy: float) -> tuple[Spectrum, int]:
    """The leading part that holds this share of the squared singular values, and its rank (per group)."""
    total = float(matrix.norm()) ** 2
    shorter = min(matrix.shape[1:])
    k = min(32, shorter)
    while True:
        spectrum = dense_spectrum(matrix, k)
        if k == shorter:
            return spectrum, rank_for_energy(spectrum.S, energy)
        if energy < 1 and float(spectrum.S.double().square().sum()) >= energy * total:
            return spectrum, rank_for_energy(spectrum.S, energy, total)
        k = min(4 * k, shorter)


def rank_for_energy(S: Tensor, energy: float, total: float | None = None) -> int:
    """The smallest rank (per group, at least 1) that keeps this share of the squared singular values (groups, k)."""
    reached = S.double().square().sum(0).cumsum(0)  # over the groups, which share one rank
    wanted = energy * (float(reached[-1]) if total is None else total)
    return 1 + int((reached[:-1] < wanted).sum())


def low_rank(matrix: Tensor, r: int) -> tuple[Factors, float]:
    """The nearest of rank r in all (rounded up to the groups) to (groups, m, n), and its relative error."""
    k = min(math.ceil(r / len(matrix)), *matrix.shape[1:])
    factors = dense_spectrum(matrix, k).truncated(k)
    return factors, residual(matrix, factors)


def residual(matrix: Tensor, factors: Factors) -> float:
    """||dW - B A|| / ||dW|| in the Frobenius norm, computed; 0 where dW is 0."""
    total = float(matrix.norm())
    rest = torch.baddbmm(matrix, factors.B.to(matrix), factors.A.to(matrix), alpha=-1)
    return float(rest.norm()) / total if total else 0.0
