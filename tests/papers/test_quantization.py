"""What a quantised weight is, number by number, from its stored bytes."""

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn

from tailora.core.quantization import dense_weight, storage_of


def quantised(quant_type: str, double: bool) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    weight = torch.randn(48, 128)
    layer = bnb.nn.Linear4bit(128, 48, bias=False, quant_type=quant_type, compress_statistics=double)
    layer.weight = bnb.nn.Params4bit(
        weight.clone(), requires_grad=False, quant_type=quant_type, compress_statistics=double, module=layer
    )
    return layer.to("cpu"), weight


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_four_bits_are_a_code_times_the_block_s_largest(quant_type: str, double: bool) -> None:
    """dequant(c, W) = code[W] c, and c1 itself = dequant(c2, c1) when double (arXiv:2305.14314, eq. 2 and 6)."""
    layer, weight = quantised(quant_type, double)
    state = layer.weight.quant_state
    packed = layer.weight.data.flatten().int()  # two codes a byte, the first in the high half
    code = state.code[torch.stack([packed >> 4, packed & 15], 1).flatten()]
    largest = state.absmax
    if double:  # blocks of 256 constants, 8 bits each, about their mean
        second = state.state2
        constants = second.absmax.repeat_interleave(second.blocksize)[: len(largest)]
        largest = second.code[largest.int()] * constants + state.offset
    else:
        torch.testing.assert_close(largest, weight.view(-1, 64).abs().amax(1))
    expected = (code.view(-1, 64) * largest[:, None]).view(48, 128)
    dense = dense_weight(layer)
    torch.testing.assert_close(dense, expected, rtol=1e-6, atol=1e-6)
    assert ((dense - weight).abs() <= storage_of(layer).spread(layer, dense) + 1e-6).all()


def test_nf4_codes_are_quantiles_of_the_normal_distribution() -> None:
    """q_i = 1/2 (Q(i / 17) + Q((i + 1) / 17)), scaled to [-1, 1] with an exact zero (arXiv:2305.14314, eq. 4).

    Zero comes from 8 quantiles on the left and 9 on the right; the paper leaves the tails' offset open, its code says
    1/2 (1/32 + 1/30).
    """
    layer, _ = quantised("nf4", double=False)
    outermost = 1 - (1 / 32 + 1 / 30) / 2
    Q = torch.distributions.Normal(0, 1).icdf
    right = Q(torch.linspace(outermost, 0.5, 9)[:-1])
    left = -Q(torch.linspace(outermost, 0.5, 8)[:-1])
    expected = torch.cat([left, torch.zeros(1), right]).sort().values / right.max()
    torch.testing.assert_close(layer.weight.quant_state.code, expected, rtol=0, atol=1e-5)


def test_eight_bits_are_a_share_of_the_row_s_largest() -> None:
    """X = c X_i8 / 127 with c the largest of the row, X_i8 = round(127 X / c) (arXiv:2208.07339, sec. 2)."""
    torch.manual_seed(0)
    weight = torch.randn(48, 32).half()
    layer = bnb.nn.Linear8bitLt(32, 48, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    layer = layer.to("cpu")
    largest = weight.float().abs().amax(1, keepdim=True)
    expected = (127 * weight.float() / largest).round() * largest / 127
    dense = dense_weight(layer)
    torch.testing.assert_close(dense, expected, rtol=0, atol=1e-6)
    assert ((dense - weight).abs() <= storage_of(layer).spread(layer, dense)).all()
