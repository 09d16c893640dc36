"""Leading singular triplets of matrices, exactly where they are small, by random subspace iteration where not."""

from typing import NamedTuple

import torch
from torch import Tensor

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
