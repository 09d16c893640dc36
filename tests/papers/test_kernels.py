"""The kernels of tailora/kernels against the equations that they cite, in float64."""

import math

import pytest
import torch
from torch import Tensor

from tailora.kernels import cpu_attention as attention
from tailora.kernels.llama import inverse_rms, rms_norm, rotate, swiglu


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def test_rms_norm_divides_by_the_root_mean_square() -> None:
    """a_i / RMS(a) g_i with RMS(a) = sqrt(1/n sum a_i^2) (arXiv:1910.07467, eq. 4)."""
    torch.manual_seed(0)
    a, g = normal(7, 12), normal(12)
    expected = a / (a.square().sum(-1, keepdim=True) / 12).sqrt() * g
    torch.testing.assert_close(rms_norm(a, g, inverse_rms(a, 0.0)), expected, rtol=1e-12, atol=1e-12)


def test_rotary_positions_turn_pairs_by_m_theta() -> None:
    """x cos(m theta) + (-x2, x1, -x4, x3, ...) sin(m theta) (RoFormer, arXiv:2104.09864, eq. 34).

    The paper pairs neighbours, Llama's layout i with i + d/2. And by eq. 16 only the distance m - n is left in q k.
    """
    torch.manual_seed(0)
    d, positions = 8, torch.arange(20, dtype=torch.float64)
    theta = 10000.0 ** (-2 * torch.arange(d // 2, dtype=torch.float64) / d)
    angles = positions[:, None] * theta  # (tokens, d / 2)
    q, k = normal(3, d), normal(3, d)

    def turned(heads: Tensor) -> Tensor:
        """(tokens, heads, width): the same vector at every position."""
        return rotate(heads.expand(20, 3, d), angles.cos()[:, None], angles.sin()[:, None])

    neighbours = q.view(3, 2, d // 2).transpose(1, 2).reshape(3, d)  # x1, x2 = i, i + d/2
    swapped = torch.stack([-neighbours[:, 1::2], neighbours[:, ::2]], -1).flatten(1)
    wide = angles.repeat_interleave(2, dim=1)[:, None]
    expected = neighbours * wide.cos() + swapped * wide.sin()
    found = turned(q).view(20, 3, 2, d // 2).transpose(2, 3).reshape(20, 3, d)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    scores = torch.einsum("mhd,nhd->hmn", turned(q), turned(k))
    torch.testing.assert_close(scores[:, 5:, 5:], scores[:, :-5, :-5], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(scores[:, 5, 0], scores[:, 0, 5])


def test_swiglu_gates_by_swish() -> None:
    """Swish_1(x W) * x V with Swish_1(x) = x sigmoid(x) (arXiv:2002.05202, eq. 6)."""
    torch.manual_seed(0)
    gate, up = normal(5, 6), normal(5, 6)
    torch.testing.assert_close(swiglu(gate, up), gate * up / (1 + (-gate).exp()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("torchs", [True, False])
def test_attention_s_backward_computes_the_probabilities_again(monkeypatch: pytest.MonkeyPatch, torchs: bool) -> None:
    """FlashAttention (arXiv:2205.14135): Y = P V; dV = P^T dY, dS = P (dP - D), D = rowsum(dY Y) (alg. 4, app. B.2)."""
    torch.manual_seed(0)
    lengths, heads, width = (5, 3, 40), 2, 16
    q, k, v, dY = (normal(sum(lengths), heads, width) for _ in range(4))
    thresholds = attention.FLASH_ONLY if torchs else attention.BLOCKS_ONLY
    monkeypatch.setattr(attention, "flash_thresholds", lambda _: thresholds)
    ends, scale = torch.tensor([0, *lengths]).cumsum(0), 1 / math.sqrt(width)
    Y, log_sums = attention.forward(q, k, v, ends, scale, None)
    found = (Y, *attention.backward(dY, q, k, v, Y, log_sums, ends, scale, None))
    expected = [torch.cat(parts) for parts in zip(*_by_document(q, k, v, dY, lengths, scale), strict=True)]
    for ours, papers in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, papers, rtol=1e-10, atol=1e-10)


def _by_document(
    q: Tensor, k: Tensor, v: Tensor, dY: Tensor, lengths: tuple[int, ...], scale: float
) -> list[list[Tensor]]:
    """Y, dQ, dK, dV of each document, (tokens, heads, width)."""
    found = []
    for Q, K, V, G in zip(*(each.transpose(0, 1).split(lengths, dim=1) for each in (q, k, v, dY)), strict=True):
        hidden = torch.ones(Q.shape[1], Q.shape[1]).triu(1).bool()
        S = (scale * Q @ K.mT).masked_fill(hidden, -math.inf)
        P = S.exp() / S.exp().sum(-1, keepdim=True)
        Y = P @ V
        dS = P * (G @ V.mT - (G * Y).sum(-1, keepdim=True))
        found.append([each.transpose(0, 1) for each in (Y, scale * dS @ K, scale * dS.mT @ Q, P.mT @ G)])
    return found
