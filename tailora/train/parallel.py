"""Several processes that train one adapter: each has a whole copy of it, and they add up their gradients.

The gradients of an adapter lie in a few flat buffers, so that one collective per buffer and step sums them, after the
last micro-batch. Unlike DDP this needs no wrapper around the model, and a parameter that the examples of a rank do not
use has a gradient of zero there.
"""

from collections.abc import Sequence

import torch.distributed as dist
from torch import nn

from tailora.kernels.flat_parameters import FlatBuffer


def has_other_ranks() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def sum_over_ranks(buffers: Sequence[FlatBuffer]) -> None:
    """Adds up the gradients of all ranks; every rank gets the sum."""
    if has_other_ranks():
        for buffer in buffers:
            dist.all_reduce(buffer.gradient)


def send_from_first_rank(buffers: Sequence[FlatBuffer], module: nn.Module) -> None:
    """Gives every rank the trained parameters of the first, and what else `module` saves, such as a frozen start.

    They are the same already where they were computed from the same numbers in the same order. The kernels of a GPU
    do not promise that, for a start from weights or data.
    """
    if has_other_ranks():
        saved = module.state_dict().keys()
        frozen = [tensor for name, tensor in module.named_buffers() if name in saved]
        for tensor in (*(buffer.parameter.detach() for buffer in buffers), *frozen):
            dist.broadcast(tensor, src=0)
