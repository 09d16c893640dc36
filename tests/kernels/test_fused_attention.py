import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tailora.kernels import fused_attention
from tailora.kernels.fused_attention import BLOCKS_ONLY, FLASH_ONLY, FlashThresholds

CPU = torch.device("cpu")


def by_torch(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], window: int | None) -> Tensor:
    """torch's attention of each document, with a mask: (tokens, heads, width)."""
    outputs = []
    for parts in zip(*(tensor.split(lengths) for tensor in (q, k, v)), strict=True):
        place = torch.arange(len(parts[0]))
        back = place[:, None] - place
        seen = (back >= 0) & (back < (window or len(place)))
        heads = (part.transpose(0, 1)[None] for part in parts)
        outputs.append(F.scaled_dot_product_attention(*heads, attn_mask=seen, enable_gqa=True, scale=0.3)[0])
    return torch.cat([output.transpose(0, 1) for output in outputs])


@pytest.mark.parametrize(
    ("lengths", "window"),
    [
        ((5, 70, 33, 300), None),
        ((1,), None),
        ((128, 129, 127), None),
        ((5, 70, 33, 300), 20),
        ((300, 12), 128),
        ((129, 128, 1), 3),
    ],
)
@pytest.mark.parametrize(
    "thresholds",
    [
        BLOCKS_ONLY,
        FLASH_ONLY,
        FlashThresholds(64, sys.maxsize),
        FlashThresholds(32, 128),
    ],
)
def test_flash_and_blocks_give_torchs_attention_and_gradients(
    lengths: tuple[int, ...], window: int | None, thresholds: FlashThresholds
) -> None:
    torch.manual_seed(0)
    tokens = sum(lengths)
    q, k, v = (torch.randn(tokens, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (6, 2, 2))
    expected = by_torch(q, k, v, lengths, window)
    gradient = torch.randn_like(expected)
    expected.backward(gradient)
    documents = fused_attention.group_documents(lengths, CPU)
    with torch.no_grad():
        output, kept = fused_attention.attention_forward(q, k, v, documents, 0.3, window, thresholds)
        with_padding = torch.cat([gradient, torch.zeros(1, 6, 8, dtype=torch.float64)])
        gradients = fused_attention.attention_backward(with_padding, output, kept, documents, 0.3, window)
    torch.testing.assert_close(output, expected.detach(), rtol=0, atol=1e-12)
    for found, tensor in zip(gradients, (q, k, v), strict=True):
        torch.testing.assert_close(found, tensor.grad, rtol=0, atol=1e-12)
