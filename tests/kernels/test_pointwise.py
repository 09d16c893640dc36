import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from tailora.kernels.llama import (
    inverse_rms,
    noise,
    rms_norm,
    rms_norm_backward,
    rotate,
    standardised,
    swiglu,
    swiglu_backward,
)

EPS = 1e-5


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def test_the_norm_and_its_gradient_are_torchs() -> None:
    x, weight = tensors((7, 12), (12,))
    expected = F.rms_norm(x, (12,), weight, EPS)
    gradient = torch.randn_like(expected)
    (dx,) = torch.autograd.grad(expected, x, gradient)
    with torch.no_grad():
        inverse = inverse_rms(x, EPS)
        torch.testing.assert_close(rms_norm(x, weight, inverse), expected, rtol=0, atol=1e-13)
        found = rms_norm_backward(gradient, weight, standardised(x, inverse), inverse)
    torch.testing.assert_close(found, dx, rtol=0, atol=1e-13)


def test_in_half_precision_the_norm_is_at_least_as_good_as_transformers() -> None:
    x, weight = (tensor.detach() for tensor in tensors((64, 96), (96,)))
    exact = F.rms_norm(x, (96,), weight, EPS)
    half = x.bfloat16()
    theirs = LlamaRMSNorm(96, EPS)
    theirs.weight.data = weight.bfloat16()
    error = (rms_norm(half, weight.bfloat16(), inverse_rms(half, EPS)) - exact).norm()
    assert error <= (theirs(half).detach() - exact).norm()


def test_rotation_is_transformers_and_is_undone_by_the_opposite() -> None:
    q, k, angles = (tensor.detach() for tensor in tensors((9, 4, 8), (9, 2, 8), (9, 4)))
    full = torch.cat([angles, angles], dim=-1)  # (tokens, width)
    expected, _ = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], full.cos(), full.sin(), 0)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    turned = rotate(q, cos, sin)
    torch.testing.assert_close(turned, expected[0].transpose(0, 1), rtol=0, atol=1e-14)
    torch.testing.assert_close(rotate(turned, cos, -sin), q, rtol=0, atol=1e-14)


def test_swiglu_and_its_gradients_are_autograds() -> None:
    gate, up = tensors((5, 6), (5, 6))
    expected = F.silu(gate) * up
    gradient = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (gate, up), gradient)
    with torch.no_grad():
        again, *gradients = swiglu_backward(gradient, gate, up)
        for output in (again, swiglu(gate, up)):
            torch.testing.assert_close(output, expected, rtol=0, atol=1e-14)
    for found, right in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-14)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.999])
def test_noise_drops_a_share_of_p_and_keeps_the_mean(p: float) -> None:
    like = torch.empty(501, 801)  # not a multiple of four
    drawn = noise(7, like, p)
    count = like.numel()
    dropped = int((drawn == 0).sum())
    assert abs(dropped - p * count) < 5 * math.sqrt(count * p * (1 - p)) + count / 2**16
    kept = drawn[drawn != 0]
    assert kept.unique().numel() == 1
    assert kept[0].item() == pytest.approx(1 / (1 - p), rel=2**-16 / (1 - p))


def test_noise_is_a_function_of_its_seed() -> None:
    like = torch.empty(40, 50)
    assert torch.equal(noise(1, like, 0.3), noise(1, like, 0.3))
    assert not torch.equal(noise(1, like, 0.3), noise(2, like, 0.3))
