"""A of a grouped convolution: one block per group in memory, all channels with zeros between the groups in a file.

PEFT lets A read all channels, which no grouped weight can hold; blocks keep the update mergeable and are, with
the zeros written out, the same function in PEFT.
"""

import torch
from torch import Tensor


def join_groups(A: Tensor, groups: int) -> Tensor:
    """(r, in/groups, *kernel) -> (r, in, *kernel)."""
    if groups == 1:
        return A
    r, per_group, *kernel = A.shape
    dense = A.new_zeros(groups, r // groups, groups, per_group, *kernel)
    each = torch.arange(groups, device=A.device)
    dense[each, :, each] = A.view(groups, r // groups, per_group, *kernel)
    return dense.view(r, groups * per_group, *kernel)


def split_groups(A: Tensor, groups: int) -> Tensor | None:
    """(r, in, *kernel) -> (r, in/groups, *kernel); None where A mixes channels of different groups."""
    if groups == 1:
        return A
    r, channels, *kernel = A.shape
    each = torch.arange(groups, device=A.device)
    dense = A.view(groups, r // groups, groups, channels // groups, *kernel)
    blocks = dense[each, :, each].reshape(r, channels // groups, *kernel)
    return blocks if torch.equal(join_groups(blocks, groups), A) else None
