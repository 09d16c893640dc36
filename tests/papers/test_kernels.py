"""The kernels of tailora/kernels against the equations that they cite, in float64."""

import math

import pytest
import torch
from torch import Tensor

from tailora.kernels import cpu_attention as attention


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


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
