"""Starts that are read off the weight or the data: factors A, B that are not zero before the first step.

W is never touched. Where a start is to compute the base all the same (`MOVED`), its frozen copy B0 A0 is taken off
again at run time. Shapes here are those of one layer in groups: A (groups, r, n), B (groups, m, r).
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from tailora.core.layer import LoRALayer
from tailora.core.low_rank import Spectrum, leading
from tailora.core.targets import Target
from tailora.errors import TargetError, listing

Factors = tuple[Tensor, Tensor]  # A, B


def pissa(W: Tensor, r: int, scaling: float) -> Factors:
    """s B A = the r leading singular triplets of W: B = U sqrt(S/s), A = sqrt(S/s) V (arXiv:2404.02948, eq. 2, 3)."""
    U, S, V = leading(W, r)
    root = (S / scaling).sqrt()
    return root[..., None] * V, U * root[..., None, :]


def olora(W: Tensor, r: int, _: float) -> Factors:
    """W = Q R: B = Q[:, :r], A = R[:r] (arXiv:2406.01775, sec. 3). Needs the first r columns of Q alone."""
    Q = torch.linalg.qr(W[..., :r]).Q
    return Q.mT @ W, Q


def lora_ga(gradient: Spectrum, r: int) -> Factors:
    """A from the directions 1..r of the gradient, B from r+1..2r, so that the first step spans 2r of them.

    Both times out^(1/4) / sqrt(gamma), gamma = 16 (arXiv:2407.05000, alg. 1). Needs 2r triplets.
    """
    size = gradient.U.shape[-2] ** 0.25 / 16**0.5
    return size * gradient.V[..., :r, :], size * gradient.U[..., r : 2 * r]


def lora_one(gradient: Spectrum, r: int) -> Factors:
    """B A = the r leading triplets of the negative gradient, as a step: sqrt(S/S1) / sqrt(gamma) on both, gamma = 128.

    arXiv:2502.01235, alg. 1. W is not offset: the start is the first step.
    """
    U, S, V = gradient
    root = (S[..., :r] / S[..., :1] / 128).sqrt()
    return root[..., None] * V[..., :r, :], -U[..., :r] * root[..., None, :]


FROM_WEIGHT: Mapping[str, Callable[[Tensor, int, float], Factors]] = {"pissa": pissa, "olora": olora}
FROM_GRADIENT: Mapping[str, Callable[[Spectrum, int], Factors]] = {"lora_ga": lora_ga, "lora_one": lora_one}
STARTS = (*FROM_WEIGHT, *FROM_GRADIENT, "eva")
DATA_STARTS = (*FROM_GRADIENT, "eva")
MOVED = ("pissa", "olora", "lora_ga")  # B0 A0 is taken off again, so that the start computes the base


def check_fits(targets: Iterable[Target], name: str) -> None:
    """Raises TargetError with every layer that cannot start so, and why."""
    if problems := [f"{target.path}: {reason}" for target in targets if (reason := _obstacle(target, name))]:
        raise TargetError(f"init_lora_weights = {name!r}: {listing(problems)}")


def _obstacle(target: Target, name: str) -> str | None:
    layer_type, groups = target.layer_type, target.layer_type.groups(target.layer)
    if name not in STARTS:
        return None
    if layer_type.matrix is None:
        return f"how a {layer_type.name} holds its matrix is not known; take 'kaiming'"
    if name == "eva" and (layer_type.zero == "A" or groups > 1):
        what = (
            "an embedding reads ids, which have no variance"
            if layer_type.zero == "A"
            else "ranks of groups go together"
        )
        return f"{what}; take 'kaiming', or exclude it"
    if name in DATA_STARTS and (target.rows or layer_type.forward):
        return (
            "what a part of a fused layer or a projection of attention reads is not probed; take 'pissa' or 'kaiming'"
        )
    size = min(target.dims) // (1 if layer_type.stacked else groups)
    if name == "lora_ga" and 2 * target.r // groups > size:
        each = " in each group" if groups > 1 else ""
        remedy = f"r up to {groups * (size // 2)}" if size > 1 else "another start"
        return f"it takes 2r directions, r = {target.r}, and there are {size}{each}; take {remedy}"
    return None


@torch.no_grad()
def start_at_weight(layer: LoRALayer, target: Target, name: str) -> None:
    """Start one layer's update from its own weight, which is left as it is."""
    matrix = target.matrix(target.weight)
    assert matrix is not None  # `check_fits` saw to it
    W = matrix.to(layer.lora_A.dtype)
    A, B = FROM_WEIGHT[name](W, layer.lora_B.shape[1], layer.configured_scaling)
    layer.start_from(A.reshape(layer.lora_A.shape), B.reshape(layer.lora_B.shape))
