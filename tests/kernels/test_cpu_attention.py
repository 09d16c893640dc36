import itertools
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tailora.kernels import cpu_attention
from tailora.kernels.cpu_attention import BLOCKS_ONLY, FLASH_ONLY, FlashThresholds

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
    "thresholds", [BLOCKS_ONLY, FLASH_ONLY, FlashThresholds(64, sys.maxsize), FlashThresholds(32, 128)]
)
def test_flash_and_blocks_give_torchs_attention_and_gradients(
    monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...], window: int | None, thresholds: FlashThresholds
) -> None:
    torch.manual_seed(0)
    tokens = sum(lengths)
    q, k, v = (torch.randn(tokens, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (6, 2, 2))
    expected = by_torch(q, k, v, lengths, window)
    gradient = torch.randn_like(expected)
    expected.backward(gradient)
    ends = torch.tensor([0, *itertools.accumulate(lengths)])
    monkeypatch.setattr(cpu_attention, "flash_thresholds", lambda _: thresholds)
    with torch.no_grad():
        output, log_sums = cpu_attention.forward(q, k, v, ends, 0.3, window)
        gradients = cpu_attention.backward(gradient, q, k, v, output, log_sums, ends, 0.3, window)
    torch.testing.assert_close(output, expected.detach(), rtol=0, atol=1e-12)
    for found, tensor in zip(gradients, (q, k, v), strict=True):
        torch.testing.assert_close(found, tensor.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [None, 3])
def test_torchs_checks_of_operators_pass(window: int | None) -> None:
    q, k, v = (torch.randn(12, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    ends = torch.tensor([0, 4, 12], dtype=torch.int32)
    torch.library.opcheck(torch.ops.tailora.packed_attention.default, (q, k, v, ends, 0.3, window))


def test_the_backward_keeps_heads_and_output_and_no_probabilities() -> None:
    kept: list[Tensor] = []
    q, k, v = (torch.randn(512, heads, 8, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        output = cpu_attention.attention(q, k, v, torch.tensor([0, 512]), 0.3, None)
    sizes = sorted(x.numel() for x in kept)
    assert sizes == sorted([2, 512 * 4, *(x.numel() for x in (q, k, v, output))])
