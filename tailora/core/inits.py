"""How a fresh A and B are filled. One of the two is zero, so that training starts at the base model."""

import math
from collections.abc import Callable

from torch import Tensor, nn


def kaiming(factor: Tensor, _: int) -> None:
    """U(-1/sqrt(in), 1/sqrt(in)): the reference implementation of arXiv:2106.09685."""
    nn.init.kaiming_uniform_(factor, a=math.sqrt(5))


def gaussian(factor: Tensor, r: int) -> None:
    """N(0, 1/r^2), as PEFT's "gaussian"."""
    nn.init.normal_(factor, std=1 / r)


def standard_normal(factor: Tensor, _: int) -> None:
    """N(0, 1): what an embedding's B starts from, since its A is the factor that is zero."""
    nn.init.normal_(factor)


INITS: dict[str, Callable[[Tensor, int], None]] = {"kaiming": kaiming, "gaussian": gaussian}
