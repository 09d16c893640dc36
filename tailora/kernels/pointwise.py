"""The parts of a layer that are not products: RMSNorm, rotary positions, SwiGLU. Forward, and backward from the input.

Nothing that can be computed again from the layer's input is kept. Norms are computed in float32 at least, as
transformers does.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

silu_backward = torch.ops.aten.silu_backward


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / rms(x) over the last dimension, in float32 or wider: (..., 1)."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_wide(x))
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def standardised(x: Tensor, inverse: Tensor) -> Tensor:
    """x / rms(x), a new tensor in float32 or wider."""
    return x.to(_wide(x), copy=True).mul_(inverse)


def rms_norm(x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """RMSNorm, arXiv:1910.07467, eq. 4: weight * x / rms(x), rounded once."""
    return standardised(x, inverse).mul_(weight).to(x.dtype)


def rms_norm_backward(gradient: Tensor, weight: Tensor, hat: Tensor, inverse: Tensor) -> Tensor:
    """Gradient of the input from that of the output, in its dtype, for `hat` the standardised input.

    d x = (g - hat mean(g hat)) / rms(x) with g = gradient * weight.
    """
    g = gradient.to(hat.dtype, copy=True).mul_(weight)
    mean = (g * hat).mean(dim=-1, keepdim=True)
    return g.addcmul_(hat, mean, value=-1).mul_(inverse).to(gradient.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, RoFormer, arXiv:2104.09864, eq. 34: (tokens, heads, width) by (tokens, 1, width / 2).

    With -sin it is its own inverse, and so its backward.
    """
    low, high = heads.chunk(2, dim=-1)
    out = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    first, second = out.chunk(2, dim=-1)
    torch.mul(low, cos, out=first).addcmul_(high, sin, value=-1)
    torch.mul(high, cos, out=second).addcmul_(low, sin)
    return out


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up; GLU variants, arXiv:2002.05202, eq. 6."""
    return F.silu(gate) * up  # in bfloat16 a product in place takes 1.6 times as long


def swiglu_backward(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The output again, and the gradients of gate and up."""
    activated = F.silu(gate)
    return activated * up, silu_backward(gradient * up, gate), gradient * activated
