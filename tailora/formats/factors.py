"""One layer's tensors in PEFT's file: which keys and shapes, and both ways between the file and the layer.

Of stacked experts A (E r, in) has rows e r + k, and B (out, E r) columns k E + e.
With a frozen start the file holds [A, A0] and [B, -B0], of rank 2r: for PEFT a plain adapter.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tailora.core.layer import LoRALayer, beside
from tailora.core.layer_types import EMBEDDING
from tailora.errors import FormatError
from tailora.formats.grouping import join_groups, split_groups

Shape = tuple[int, ...]

OTHERS = {"magnitude": ".lora_magnitude_vector", "lora_bias": ".lora_B.bias", "bias": ".base_layer.bias"}
SUFFIXES = {"A": ".lora_A.weight", "B": ".lora_B.weight", **OTHERS}
EMBEDDING_SUFFIXES = {"A": ".lora_embedding_A", "B": ".lora_embedding_B", **OTHERS}
SLOT_OF = {suffix: slot for table in (SUFFIXES, EMBEDDING_SUFFIXES) for slot, suffix in table.items()}


def suffixes(layer: LoRALayer) -> dict[str, str]:
    """Slot -> what follows the layer's path in its key."""
    return EMBEDDING_SUFFIXES if layer.kind is EMBEDDING else SUFFIXES


def to_file(layer: LoRALayer, start: bool) -> dict[str, Tensor]:
    """Slot -> tensor as the file holds it. What the scale differs from alpha/r is folded into B and its bias.

    start: the ranks are doubled, with zeros where this layer has no frozen start.
    """
    ratio = (layer.scaling / layer.configured_scaling).reshape(())
    A, B = _with_start(layer) if start else (layer.lora_A, layer.lora_B)
    if layer.kind.stacked:
        tensors = {"A": A, "B": _columns(B * ratio, layer.groups)}
    else:
        tensors = {"A": join_groups(A, layer.groups), "B": (B * ratio)[(..., *_ones(layer))]}
    if layer.lora_magnitude_vector is not None:
        tensors["magnitude"] = layer.lora_magnitude_vector.view(_magnitude_shape(layer))
    if layer.lora_bias is not None:
        tensors["lora_bias"] = layer.lora_bias * ratio
    if layer.bias is not None:
        tensors["bias"] = layer.bias
    return {slot: tensor.detach() for slot, tensor in tensors.items()}


def file_shapes(layer: LoRALayer, start: bool) -> dict[str, Shape]:
    """Slot -> shape, of the slots that the layer has: all channels in A, a trailing 1 per kernel dimension in B."""
    r, per_group, *kernel = layer.lora_A.shape
    out, per_rank = layer.lora_B.shape
    times = 2 if start else 1
    shapes: dict[str, Shape]
    if layer.kind.stacked:
        shapes = {"A": (times * r, per_group), "B": (out // layer.groups, times * per_rank * layer.groups)}
    else:
        shapes = {"A": (times * r, per_group * layer.groups, *kernel), "B": (out, times * per_rank, *[1] * len(kernel))}
    if layer.lora_magnitude_vector is not None:
        shapes["magnitude"] = _magnitude_shape(layer)
    return shapes | {name: (out,) for name in ("lora_bias", "bias") if getattr(layer, name) is not None}


@torch.no_grad()
def fill(layer: LoRALayer, found: Mapping[str, Tensor], start: bool) -> None:
    """Put the file's tensors, of these shapes, into the layer. Raises FormatError where no weight can hold them."""
    _fill_factors(layer, found, start)
    for slot, own in (("magnitude", "lora_magnitude_vector"), ("lora_bias", "lora_bias"), ("bias", "bias")):
        if slot in found:
            getattr(layer, own).copy_(found[slot].flatten())


def _fill_factors(layer: LoRALayer, found: Mapping[str, Tensor], start: bool) -> None:
    A, B = found["A"].to(layer.lora_A), found["B"].to(layer.lora_B).view(found["B"].shape[:2])
    if layer.kind.stacked:
        B = _experts(B, layer.groups)
    blocks = A if layer.kind.stacked else split_groups(A, layer.groups)
    if blocks is None:  # PEFT trains an A that reads all channels of a grouped convolution
        if layer.lora_magnitude_vector is not None:
            raise FormatError("its A mixes the channels of different groups, so the rows of its weight have no norm")
        blocks, layer.groups = A, 1
    if not start:
        layer.lora_A = nn.Parameter(blocks) if blocks.shape != layer.lora_A.shape else layer.lora_A
        layer.lora_A.copy_(blocks)
        layer.lora_B.copy_(B)
        return
    by_group = blocks.view(layer.groups, -1, *blocks.shape[1:])
    (A, A0), (B, B0) = (half.flatten(0, 1) for half in by_group.chunk(2, 1)), B.chunk(2, 1)
    layer.start_from(A0, -B0)
    layer.lora_A.copy_(A)
    layer.lora_B.copy_(B)


def _columns(B: Tensor, experts: int) -> Tensor:
    """(E out, r), row e out + i -> (out, E r), column k E + e."""
    return B.reshape(experts, -1, B.shape[1]).permute(1, 2, 0).flatten(1)


def _experts(B: Tensor, experts: int) -> Tensor:
    """The inverse of `_columns`."""
    return B.reshape(len(B), -1, experts).permute(2, 0, 1).flatten(0, 1)


def _with_start(layer: LoRALayer) -> tuple[Tensor, Tensor]:
    A0 = torch.zeros_like(layer.lora_A) if layer.start_A is None else layer.start_A
    B0 = torch.zeros_like(layer.lora_B) if layer.start_B is None else layer.start_B
    return beside(layer.lora_A, A0, layer.groups), torch.cat([layer.lora_B, -B0], 1)


def _magnitude_shape(layer: LoRALayer) -> Shape:
    return (1, len(layer.lora_B), *[1] * (layer.lora_A.ndim - 2)) if layer.lora_A.ndim > 2 else (len(layer.lora_B),)


def _ones(layer: LoRALayer) -> list[None]:
    """One new dimension per dimension of the kernel."""
    return [None] * (layer.lora_A.ndim - 2)
