"""Nonzero initial values of A and B, computed from the weight.

W is never changed. Instead, the frozen product B0 A0 of the initial values is subtracted at run time, so that training
starts at the base model. Shapes by group: W (groups, m, n), A (groups, r, n), B (groups, m, r).
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from tailora.core.layer import LoRALayer
from tailora.core.low_rank import leading_triplets
from tailora.core.targets import Target
from tailora.errors import TargetError, listing

InitialFactors = tuple[Tensor, Tensor]  # A, B


def pissa(W: Tensor, r: int, scaling: float) -> InitialFactors:
    """s B A = the r leading singular triplets of W: B = U sqrt(S/s), A = sqrt(S/s) V (arXiv:2404.02948, eq. 2, 3)."""
    U, S, V = leading_triplets(W, r)
    root = (S / scaling).sqrt()
    return root[..., None] * V, U * root[..., None, :]


def olora(W: Tensor, r: int, _: float) -> InitialFactors:
    """W = Q R: B = Q[:, :r], A = R[:r] (arXiv:2406.01775, sec. 3). Needs only the first r columns of Q."""
    Q = torch.linalg.qr(W[..., :r]).Q
    return Q.mT @ W, Q


# Values of init_lora_weights. "eva" fills A with principal directions of the inputs, see `core.data_init`.
WEIGHT_INITS: Mapping[str, Callable[[Tensor, int, float], InitialFactors]] = {"pissa": pissa, "olora": olora}


def check_init(targets: Iterable[Target], init: str) -> None:
    """Raises TargetError with all layers that do not support this initialization, and the reasons."""
    if init not in (*WEIGHT_INITS, "eva"):
        return
    if problems := [f"{target.path}: {reason}" for target in targets if (reason := _obstacle(target, init))]:
        raise TargetError(f"init_lora_weights = {init!r}: {listing(problems)}")


def _obstacle(target: Target, init: str) -> str | None:
    layer_type = target.layer_type
    if not layer_type.has_matrix:
        return f"not supported for a {layer_type.name}; use 'kaiming'"
    if init in WEIGHT_INITS:
        return None
    if layer_type.zero_factor == "A":
        return "not supported for embeddings, whose ids have no variance; use 'kaiming', or exclude the layer"
    if layer_type.groups(target.layer) > 1:
        return "not supported for groups, which share their ranks; use 'kaiming', or exclude the layer"
    if target.output_slice or layer_type.replaces_forward:
        return "not supported for parts of fused layers or projections of attention; use 'pissa' or 'kaiming'"
    return None


@torch.no_grad()
def init_from_weight(layer: LoRALayer, target: Target, init: str) -> None:
    matrix = target.matrix(target.weight)
    assert matrix is not None  # `check_init` rejects such layers
    W = matrix.to(layer.lora_A.dtype)
    A, B = WEIGHT_INITS[init](W, layer.lora_B.shape[1], layer.configured_scaling)
    layer.start_from(A.reshape(layer.lora_A.shape), B.reshape(layer.lora_B.shape))
