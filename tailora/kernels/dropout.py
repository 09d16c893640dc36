"""Dropout noise as a function of a seed: drawn in the forward, drawn again in the backward, never kept.

torch draws one double-precision number per element. Sixteen bits decide as well: one 64-bit draw serves four elements,
and p is met to within 1 in 65,536.
"""

import math

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

LEVELS = 2**16


def new_seed() -> int:
    """From torch's random state. In a plan, whose tensors hold no numbers, any will do."""
    drawn = torch.randint(2**62, ())
    return 0 if isinstance(drawn, FakeTensor) else int(drawn)


def noise(seed: int, like: Tensor, p: float) -> Tensor:
    """0 with probability p, else 1 / (1 - p): the shape, dtype and device of `like`."""
    dropped = round(p * LEVELS)
    generator = torch.Generator(like.device).manual_seed(seed)
    words = torch.empty(math.ceil(like.numel() / 4), dtype=torch.int64, device=like.device)
    words.random_(-(2**63), None, generator=generator)  # all 64 bits
    kept = words.view(torch.int16)[: like.numel()].view(like.shape) >= dropped - LEVELS // 2
    return kept.to(like.dtype).mul_(LEVELS / (LEVELS - dropped))
