"""What a real forward keeps for its backward, for tests of estimates."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from tailora.core.quantization import inner_tensors, stored_tensors
from tailora.kernels.recompute import Recomputing


def kept_bytes(forward: Callable[[], Tensor], model: PreTrainedModel, recomputing: Recomputing | None = None) -> int:
    """Returns the bytes that autograd, or `recomputing`, keeps after the forward, without the model's weights."""
    known = {part.untyped_storage().data_ptr() for tensor in stored_tensors(model) for part in inner_tensors(tensor)}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        for part in inner_tensors(tensor):
            storage = part.untyped_storage()
            if storage.data_ptr() not in known:
                kept[storage._cdata] = storage
        return tensor.detach()  # the tensor itself would keep its own graph alive for ever

    hooks = saved_tensors_hooks(keep, lambda tensor: tensor) if recomputing is None else nullcontext()
    with hooks, torch.enable_grad():
        loss = forward()  # kept alive while sizes are added up, so that no address is used by two tensors
    if recomputing is not None:
        kept = {key: storage for key, storage in recomputing.storages() if storage.data_ptr() not in known}
    total = sum(storage.nbytes() for storage in kept.values())
    del loss
    return total
