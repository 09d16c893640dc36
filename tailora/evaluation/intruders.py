"""Intruder dimensions: directions of the tuned weight that the base's weight does not have.

Shuttleworth et al., "LoRA vs Full Fine-tuning: An Illusion of Equivalence" (arXiv:2410.21228), alg. 1: of the k
leading left singular vectors of W + dW, those whose largest |cosine| with any left singular vector of W is below a
threshold. They came with forgetting there; the same count for a random update says how many there are by chance.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from tailora.core.low_rank import Factors
from tailora.core.spectra import leading

LEADING = 10  # vectors looked at, the paper's k
THRESHOLD = 0.5  # its epsilon
FULL_SIZE, NEAR = 1024, 64  # sizes up to which all of W's vectors are looked at; of larger ones, those looked at first
TINY = 1e-6  # of the largest singular value: left vectors of smaller ones are rounding

Cosines = Callable[[Tensor], Tensor]
Counter = Callable[[Tensor], int]


def cosines_with(W: Tensor) -> Cosines:
    """A function from orthonormal u (m, k) to u's cosines with all left singular vectors of W (m, n), (min(m, n), k).

    By the smaller of W W^T and W^T W: squaring mixes vectors whose singular values are below .03% of the largest
    (float32), which no leading vector of a tuned weight is near to.
    """
    if W.shape[0] <= W.shape[1]:
        U = torch.linalg.eigh(W @ W.mT).eigenvectors
        return lambda u: U.mT @ u
    squares, V = torch.linalg.eigh(W.mT @ W)
    S = squares.clamp(min=0).sqrt()
    inverse = torch.where(S[-1] * TINY < S, 1 / S, 0.0)
    return lambda u: inverse[:, None] * (V.mT @ (W.mT @ u))


def counter(W: Tensor, k: int = LEADING, threshold: float = THRESHOLD, *, whole: int = FULL_SIZE) -> Counter:
    """A function from the tuned weight (m, n) to the number of intruders among its k leading left singular vectors.

    whole: a W that is larger is decomposed whole only for vectors that its NEAR leading ones leave undecided. Mostly
    one of those is near, or what is left of the vector is too short for any other to be.
    """
    all_of = cache(lambda: cosines_with(W))
    near_by = leading(W, NEAR).U if min(W.shape) > whole else W.new_zeros(W.shape[0], 0)

    def count(changed: Tensor) -> int:
        u = leading(changed, min(k, *changed.shape)).U
        shares = (near_by.mT @ u).square()  # (NEAR, k)
        known = (shares >= threshold**2).any(0)
        hopeless = ~known & (1 - shares.sum(0) < threshold**2)
        open_ = ~known & ~hopeless
        found = int(hopeless.sum())
        if open_.any():
            found += int((all_of()(u[:, open_]).abs().amax(0) < threshold).sum())
        return found

    return count


def random_update(m: int, n: int, r: int, norm: float, seed: int = 0) -> Factors:
    """A Gaussian product of this shape, rank and Frobenius norm: B (1, m, r), A (1, r, n). The random state is left."""
    generator = torch.Generator().manual_seed(seed)
    B, A = torch.randn(1, m, r, generator=generator), torch.randn(1, r, n, generator=generator)
    length = float(((B.mT @ B) * (A @ A.mT)).sum().sqrt())  # ||B A||_F
    return Factors(B * (norm / length), A)
