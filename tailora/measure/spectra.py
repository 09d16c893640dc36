"""What the singular values of an update say: how many directions it uses, and how it lies to another one.

An update comes as two factors by group (`core.lowrank.Factors`), so nothing here forms the dense matrix. Groups (of a
convolution, or experts) are blocks that do not meet: the singular values of all together are those of each.
"""

import math

import torch
from torch import Tensor

from tailora.core.lowrank import Factors
from tailora.core.spectra import Spectrum

NEGLIGIBLE = 1e-6  # of the largest singular value: below it, rounding of factors in float32


def effective_rank(S: Tensor) -> float:
    """exp of the entropy of the singular values' shares, sigma / sum sigma: 1 for one, r for r equal ones.

    S: any shape. 0 where all are 0. Roy and Vetterli, "The effective rank" (EUSIPCO 2007), def. 1.
    """
    values = S.double().flatten()
    total = float(values.sum())
    if total == 0:
        return 0.0
    shares = values[values > 0] / total
    return math.exp(-float((shares * shares.log()).sum()))


def stable_rank(S: Tensor) -> float:
    """||.||_F^2 / sigma_1^2; 0 where all are 0. Rudelson and Vershynin (arXiv:math/0503442), sec. 1."""
    values = S.double().flatten()
    largest = float(values.max()) if values.numel() else 0.0
    return float((values / largest).square().sum()) if largest else 0.0


def numerical_rank(S: Tensor) -> int:
    """How many of S (k,), falling, are more than rounding."""
    return int((S[:1] * NEGLIGIBLE < S).sum()) if S.numel() and float(S[0]) > 0 else 0


def directions(spectrum: Spectrum) -> tuple[Tensor, Tensor]:
    """What an update of one group writes to and reads from: orthonormal (m, k) and (n, k)."""
    k = numerical_rank(spectrum.S[0])
    return spectrum.U[0, :, :k], spectrum.V[0, :k].mT


def subspace_overlap(first: Tensor, second: Tensor) -> float:
    """||U1^T U2||_F^2 / min(k1, k2): 1 where one subspace lies in the other, 0 where they are orthogonal.

    first (m, k1), second (m, k2): orthonormal columns. 0 where one is empty. LoRA (arXiv:2106.09685), eq. 4.
    """
    smaller = min(first.shape[1], second.shape[1])
    return float((first.mT @ second).square().sum()) / smaller if smaller else 0.0


def chance_overlap(first: Tensor, second: Tensor) -> float:
    """The expected overlap of random subspaces of these sizes: max(k1, k2) / m."""
    return max(first.shape[1], second.shape[1]) / first.shape[0]


def inner(first: Factors, second: Factors) -> float:
    """<dW1, dW2> = tr((B1^T B2) (A2 A1^T)), summed over the groups, in float64."""
    left = first.B.double().mT @ second.B.double()  # (groups, r1, r2)
    right = first.A.double() @ second.A.double().mT
    return float((left * right).sum())


def largest_first(S: Tensor) -> Tensor:
    """Singular values (groups, k) as one falling row (k,): the root of their mean square over the groups."""
    return torch.sqrt(S.double().square().mean(0))
