"""What the singular values of an update say: how many directions it uses, and how it lies to another one.

An update comes as two factors by group (`core.low_rank.Factors`), so nothing here forms the dense matrix. Groups (of a
convolution, or experts) are blocks that do not meet: the singular values of all together are those of each.
"""

import math

import torch
from torch import Tensor

from tailora.core.low_rank import Factors
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


def directions(spectrum: Spectrum) -> tuple[Tensor, Tensor]:
    """What an update writes to and reads from: orthonormal columns (groups, m, k) and (groups, n, k).

    Those of singular values that are no more than rounding are zero.
    """
    S = spectrum.S
    there = ((S.max() * NEGLIGIBLE < S) & (S > 0)).to(S)[:, None]  # (groups, 1, k)
    return spectrum.U * there, spectrum.V.mT * there


def subspace_overlap(first: Tensor, second: Tensor) -> float:
    """||U1^T U2||_F^2 / min(k1, k2): 1 where one subspace lies in the other, 0 where they are orthogonal.

    first (..., m, k1), second (..., m, k2): orthonormal columns; zero ones do not count. 0 where one has none. LoRA
    (arXiv:2106.09685), eq. 4.
    """
    smaller = min(_columns(first).sum(), _columns(second).sum())
    return float((first.mT @ second).square().sum() / smaller) if smaller else 0.0


def chance_overlap(first: Tensor, second: Tensor) -> float:
    """The expected overlap of random subspaces of these sizes: k1 k2 / (m min(k1, k2)) for one group."""
    one, two = _columns(first), _columns(second)
    smaller = min(one.sum(), two.sum())
    return float((one * two).sum() / first.shape[-2] / smaller) if smaller else 0.0


def _columns(basis: Tensor) -> Tensor:
    """How many are not zero, (...)."""
    return basis.square().sum((-2, -1)).round()


def inner(first: Factors, second: Factors) -> float:
    """<dW1, dW2> = tr((B1^T B2) (A2 A1^T)), summed over the groups, in float64."""
    left = first.B.double().mT @ second.B.double()  # (groups, r1, r2)
    right = first.A.double() @ second.A.double().mT
    return float((left * right).sum())


def largest_first(S: Tensor) -> Tensor:
    """Singular values (groups, k) as one falling row (k,): the root of their mean square over the groups."""
    return torch.sqrt(S.double().square().mean(0))
