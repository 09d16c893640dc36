"""Folds the scale of an adapter into B at export, and extracts a learned scale from B again.

    y = W x + s B A x      A (r, in), B (out, r)

    format        its readers multiply B A by     B in the file
    peft          alpha / r, or alpha / sqrt(r)   B s / that scale: `peft.layer_to_peft`
    all others    1                               B s: `fold_scale`

s is the full scale: alpha / r, rsLoRA, patterns, a learned scale, the strength dial. `fold_scale` also puts a frozen
start (PiSSA, OLoRA) into the factors: s (B A - B0 A0) is a product of rank 2r.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tailora.core.adapter import Adapter
from tailora.core.layer import LoRALayer
from tailora.core.layer_types import LayerType, layer_path_of
from tailora.errors import FormatError, listing

MERGED = 'export to "merged", which adds it to the weights'


@dataclass(frozen=True)
class ExportSource:
    """The adapter to export, and its base model. `tokenizer` is saved with a merged model."""

    adapter: Adapter
    base_model: nn.Module
    tokenizer: Any = None


def low_rank_problems(source: ExportSource, layer_types: Sequence[LayerType]) -> list[str]:
    """Returns a message for each part of the adapter that two factors per layer of these types cannot represent."""
    adapter = source.adapter
    layers = adapter.low_rank.values()
    problems = []
    if any(layer.lora_magnitude_vector is not None for layer in layers):
        problems.append("the magnitudes of DoRA (use_dora) are not low-rank")
    if any(layer.lora_bias is not None or layer.bias is not None for layer in layers):
        problems.append("trained biases are not supported")
    if adapter.extras:
        problems.append(f"trained biases and token rows are not supported ({', '.join(adapter.extras)})")
    if adapter.saved:
        problems.append(f"modules_to_save: fully trained modules are not supported ({', '.join(adapter.saved)})")
    for path, layer in adapter.low_rank.items():
        if layer.layer_type not in layer_types:
            problems.append(f"{path}: layers of type {layer.layer_type.name} are not supported")
    return [f"{problem}; {MERGED}" for problem in problems]


def unfold_learned_scales(scales: Mapping[str, float], layers: Mapping[str, LoRALayer]) -> None:
    """Extracts each learned scale, by path, from B and its bias, where PEFT expects it; makes it a Parameter again."""
    for path, value in scales.items():
        layer = layers[path]
        scale = value or layer.configured_scaling  # a scale of 0 has erased B: use the configured one
        ratio = layer.configured_scaling / scale
        layer.lora_B.data = layer.lora_B.data * ratio  # not in place: it may be the file's
        for tensor in (layer.lora_bias, layer.start_B):
            if tensor is not None:
                tensor.data.mul_(ratio)
        layer.scaling = nn.Parameter(torch.full_like(layer.scaling, scale))


@torch.no_grad()
def fold_scale(source: ExportSource) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns path of a module -> A (r, in) and B (out, r), with the scale folded into B; float32, on the CPU.

    For layer types whose A and B are matrices. The parts of a fused layer become one product; its rank is the sum.
    """
    result: dict[str, tuple[Tensor, Tensor]] = {}
    for path, layer in source.adapter.low_rank.items():
        A, B = layer.update_factors()
        B = B if layer.output_slice is None else layer.output_slice.spread(B.mT).mT
        A, B = A.detach().float().cpu(), B.detach().float().cpu().contiguous()
        module_path = layer_path_of(source.base_model, path)
        if module_path in result:
            previous_A, previous_B = result[module_path]
            A, B = torch.cat([previous_A, A]), torch.cat([previous_B, B], 1)
        result[module_path] = A, B
    return result


def exported_layer_types(source: ExportSource) -> dict[str, LayerType]:
    """Returns path of a module -> the type of the layer that is adapted in it."""
    low_rank = source.adapter.low_rank.items()
    return {layer_path_of(source.base_model, path): layer.layer_type for path, layer in low_rank}


def pad_ranks(
    factors: Mapping[str, tuple[Tensor, Tensor]], r: int
) -> tuple[dict[str, tuple[Tensor, Tensor]], list[str]]:
    """Returns the same products, padded with zeros to rank r, and a message about it."""
    padded = {
        path: (torch.cat([A, A.new_zeros(r - len(A), *A.shape[1:])]), F.pad(B, (0, r - len(A))))
        for path, (A, B) in factors.items()
    }
    lower = sum(len(A) < r for A, _ in factors.values())
    return padded, [f"{lower} of {len(factors)} layers are padded with zeros to rank {r}"] if lower else []


def fold_changes(source: ExportSource) -> list[str]:
    layers = source.adapter.low_rank.values()
    changes = ["the scale is already in the weights; keep it at 1 when you load the file"]
    if starts := sum(layer.has_start for layer in layers):
        changes.append(f"the frozen starts of {starts} layers are included in their factors, which doubles the rank")
    if parts := sum(layer.output_slice is not None for layer in layers):
        changes.append(f"{parts} parts of fused layers become factors of the full layer; their ranks are added")
    return changes


def raise_problems(source: str, problems: Sequence[str]) -> None:
    if problems:
        raise FormatError(f"{source}: {listing(list(problems))}")
