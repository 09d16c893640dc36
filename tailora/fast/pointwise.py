"""The parts of a layer that are not products: RMSNorm, rotary positions, SwiGLU. Forward, and backward from the input.

Nothing that can be computed again from the layer's input is kept. Norms are computed in float32 at least, as
transformers does.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

silu_backward = torch.ops.aten.silu_backward


def standardised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms(x) and 1 / rms(x) over the last dimension, in float32 or wider: (..., width), (..., 1)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
    inverse = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return wide.mul_(inverse), inverse


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm, arXiv:1910.07467, eq. 4: weight * x / rms(x)."""
    return standardised(x, eps)[0].to(x.dtype).mul_(weight)


def rms_norm_backward(gradient: Tensor, weight: Tensor, hat: Tensor, inverse: Tensor) -> Tensor:
    """Gradient of the input, in float32 or wider, from that of the output; `hat` is overwritten.

    d x = (g - hat mean(g hat)) / rms(x) with g = gradient * weight.
    """
    g = (gradient * weight).to(hat.dtype)
    mean = (g * hat).mean(dim=-1, keepdim=True)
    return hat.mul_(mean).neg_().add_(g).mul_(inverse)


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
    return F.silu(gate).mul_(up)


def swiglu_backward(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The output again, and the gradients of gate and up; `gradient` is overwritten."""
    activated = F.silu(gate)
    up_gradient = gradient * activated
    return activated.mul_(up), silu_backward(gradient.mul_(up), gate), up_gradient
