"""Several processes that train one adapter: each has a whole copy of it, and they add up their gradients.

The gradients lie in a few flat buffers, so that one collective per buffer and step sums them. Unlike DDP this needs no
wrapper around the model, and a parameter that the examples of a rank do not use has a gradient of zero there.

With `Sharding` each holds only a part of the base model (FSDP2): decoder layers, which are nearly all of it, are
gathered while a forward or backward runs through them. In full fine-tuning each rank trains its part of them, and FSDP2
adds up their gradients.
"""

import atexit
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from tailora.core.device import wide_dtype
from tailora.errors import ConfigError
from tailora.kernels.compiled_layers import decoder_layers
from tailora.kernels.flat_parameters import FlatBuffer, gradient_norm

T = TypeVar("T")


def has_other_ranks() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def is_first_rank() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


@contextmanager
def own_process_group(*, until_exit: bool = False) -> Iterator[None]:
    """Ends the process group that is started within the block, because an open one of gloo can abort Python's exit.

    until_exit: only when Python ends, since a sharded model needs it for every call, and since with torchrun a process
    can start a group only once. Also after an error: NCCL may wait for other ranks, and the error is not shown yet.
    """
    if dist.is_initialized():
        yield
        return
    try:
        yield
    except BaseException:
        until_exit = True
        raise
    finally:
        if until_exit:
            atexit.register(_end_process_group)
        else:
            _end_process_group()


def _end_process_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def first_of_ranks(value: T | None) -> T | None:
    """Returns the value of the first rank that has one, so that all choose the same. All ranks must call it."""
    if not has_other_ranks():
        return value
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return next((item for item in values if item is not None), None)


def sum_over_ranks(buffers: Sequence[FlatBuffer]) -> None:
    """Adds up the gradients of all ranks; every rank gets the sum. FSDP2 has done it for sharded parameters."""
    if has_other_ranks():
        for buffer in buffers:
            if not buffer.sharded:
                dist.all_reduce(buffer.gradient)


def gradient_norm_over_ranks(buffers: Sequence[FlatBuffer]) -> Tensor:
    """Returns the Euclidean norm of all gradients, of sharded ones over all ranks, 0-dimensional, in a wide dtype."""
    dtype = wide_dtype(buffers[0].gradient.device)
    sharded = [buffer for buffer in buffers if buffer.sharded]
    if not sharded:
        return gradient_norm(buffers).to(dtype)
    whole = [buffer for buffer in buffers if not buffer.sharded]
    square = gradient_norm(sharded).to(dtype).square()
    dist.all_reduce(square)
    return (gradient_norm(whole).to(dtype).square() + square).sqrt()


def send_from_first_rank(buffers: Sequence[FlatBuffer], module: nn.Module) -> None:
    """Gives every rank the first one's trained parameters and frozen starts, which may differ by rounding on a GPU."""
    if has_other_ranks():
        saved = module.state_dict().keys()
        frozen = [tensor for name, tensor in module.named_buffers() if name in saved]
        for tensor in (*(buffer.parameter.detach() for buffer in buffers if not buffer.sharded), *frozen):
            dist.broadcast(tensor, src=0)


# ---- Sharding the base


@dataclass(frozen=True)
class Sharding:
    """Leaves on each rank its part of every decoder layer's weights, rows i n/ranks to (i + 1) n/ranks of each.

    From then on every forward, and every read of a weight's numbers (`whole_tensor`), needs all ranks.
    """

    device: torch.device  # of this rank

    def shard(self, base: PreTrainedModel) -> None:
        """Shards a base on `device`, or on meta before its weights are loaded. Raises ConfigError."""
        root = _root(base)
        layers = decoder_layers(root)
        if not layers:
            raise ConfigError(
                f"--fsdp shards decoder layers, but {type(base).__name__} has no list of layers; remove --fsdp"
            )
        check_every_rank_has_experts(layers, dist.get_world_size())
        mesh = init_device_mesh(self.device.type, (dist.get_world_size(),))
        for layer in layers:
            fully_shard(
                layer,
                mesh=mesh,
                mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32),
                ignored_params={parameter for parameter in layer.parameters() if parameter.ndim == 0},
            )
            sharded = cast(FSDPModule, layer)
            sharded.set_gradient_divide_factor(1.0)  # gradients are the sum over all ranks, not their mean
            sharded.set_force_sum_reduction_for_comms(True)  # gloo has no factor in its sum
        root.register_forward_hook(_copy_views)  # before FSDP2's own
        # without weights, it lets the layers prefetch each other and ends a forward and a backward pass
        fully_shard(root, mesh=mesh, ignored_params={p for p in root.parameters() if not isinstance(p, DTensor)})


def check_every_rank_has_experts(layers: Iterable[nn.Module], ranks: int) -> None:
    """Raises ConfigError if a rank would get no expert of a layer, which transformers' loader does not support."""
    for layer in layers:
        for name, parameter in layer.named_parameters():
            experts = len(parameter) if parameter.ndim == 3 else 0
            if experts and len(torch.empty(experts).chunk(ranks)) < ranks:
                raise ConfigError(
                    f"--fsdp cannot give each of {ranks} processes a share of the {experts} experts of {name}; use a "
                    f"number of processes that divides {experts}, or remove --fsdp"
                )


def _copy_views(_root: nn.Module, _inputs: Any, output: Any) -> Any:
    """Returns the output without views, such as GPT-2's: in-place changes of them would lose FSDP2's hooks."""
    return tree_map_only(Tensor, lambda tensor: tensor.clone() if tensor._is_view() else tensor, output)


def _root(base: PreTrainedModel) -> nn.Module:
    """Returns what every forward calls: the decoder, because the loss calls it without the head."""
    decoder: nn.Module | None = base.get_decoder() if hasattr(base, "get_decoder") else None
    return base if decoder is None or not decoder_layers(decoder) else decoder


def local_tensor(tensor: Tensor) -> Tensor:
    """Returns this rank's part of a sharded tensor (shared memory), or the tensor if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_shard(whole: Tensor, sharded: DTensor) -> Tensor:
    """Returns the part of a whole tensor that this rank has of `sharded`, which has the same shape."""
    rank, parts = sharded.device_mesh.get_local_rank(), whole.chunk(sharded.device_mesh.size())
    return parts[rank] if rank < len(parts) else whole[:0]


def free_gathered(model: nn.Module) -> None:
    """Frees weights that a forward has gathered and kept: the next one gathers them again, with what has changed."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(module, FSDPModule) for module in model.modules())


def forget_forward(model: nn.Module) -> None:
    """Lets a sharded model run again after a forward that raised an error. For others it does nothing."""
    root = next((module for module in model.modules() if isinstance(module, FSDPModule)), None)
    if root is not None:
        root.reset_iter_state()
