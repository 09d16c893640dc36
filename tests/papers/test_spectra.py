"""Leading singular triplets by random subspace iteration, with the accuracy that its analysis promises."""

import math

import pytest
import torch
from torch import Tensor, nn

from tailora import LoRAConfig, LoRAModel
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


@pytest.mark.slow
def test_probes_of_low_rank_iterate_towards_the_gradient_s_triplets() -> None:
    """Alg. 4.4 with G A^T and B^T G for the products: the start is the gradient's leading part (arXiv:0909.4061)."""
    torch.manual_seed(0)
    S = 0.1 * torch.logspace(0, -1, 300, dtype=torch.float64)
    S[:4] = torch.tensor([1, 0.9, 0.8, 0.7])
    G = matrix(300, 320, S)
    base = nn.Sequential(nn.Linear(320, 300, bias=False, dtype=torch.float64))
    model = LoRAModel(base, LoRAConfig(r=4, lora_alpha=4, init_lora_weights="lora_one"))
    model.start_from_data([torch.eye(320, dtype=torch.float64)], lambda model, x: (model(x) * G.T).sum())
    U, S, V = torch.linalg.svd(G, full_matrices=False)
    expected = -(U[:, :4] * S[:4]) @ V[:4] / S[0] / 128
    apart = (model.lora_layers["0"].delta_weight().detach() - expected).norm() / expected.norm()
    assert apart < 0.01  # (.1 / .7)^3 = .003 by its analysis; .14 after one product
