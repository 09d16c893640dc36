"""Leading singular triplets by random subspace iteration, with the accuracy that its analysis promises."""

import math

import pytest
import torch
from torch import Tensor

from tailora.core.low_rank import EXTRA, ITERATIONS, leading_triplets


def matrix(rows: int, columns: int, S: Tensor) -> Tensor:
    left, right = (torch.linalg.qr(torch.randn(size, len(S), dtype=torch.float64))[0] for size in (rows, columns))
    return left * S @ right.T


@pytest.mark.slow
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_the_iteration_comes_within_its_bound_of_the_best(decay: float) -> None:
    """||M - Q Q^T M|| against sigma_{k+1}: Halko, Martinsson, Tropp (arXiv:0909.4061), alg. 4.4 and 5.1, cor. 10.10."""
    torch.manual_seed(0)
    rows, columns, k = 400, 500, 12
    S = torch.arange(1, rows + 1, dtype=torch.float64) ** -decay
    found = leading_triplets(matrix(rows, columns, S), k)
    kept = k + EXTRA  # columns of Q
    factor = 1 + math.sqrt(k / (EXTRA - 1)) + math.e * math.sqrt(kept) / EXTRA * math.sqrt(rows - k)
    bound = factor ** (1 / (2 * ITERATIONS + 1))
    assert bound < 1.12
    torch.manual_seed(0)
    M = matrix(rows, columns, S)
    left_over = torch.linalg.matrix_norm(M - found.U @ (found.U.T @ M), 2)
    assert S[k] * (1 - 1e-9) <= left_over <= bound * S[k]
    torch.testing.assert_close(found.U.T @ found.U, torch.eye(k, dtype=torch.float64))
    torch.testing.assert_close(found.V @ found.V.T, torch.eye(k, dtype=torch.float64))
    torch.testing.assert_close(found.U.T @ M @ found.V.T, torch.diag(found.S))
