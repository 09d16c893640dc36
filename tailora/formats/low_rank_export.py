"""Converts an adapter to two plain factors per layer, which every consumer understands, and back.

    y = W x + B A x      A (r, in), B (out, r)

The whole scale (alpha/r, rsLoRA, patterns, a learned scale, the strength dial) is folded into B. A frozen start (PiSSA,
OLoRA) is in the factors too: s (B A - B0 A0) is a product of rank 2r. All of this happens in `fold_scale`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mode
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tailora.core.adapter import Adapter
from tailora.core.layer_types import LayerType, layer_path_of
from tailora.errors import FormatError, listing
from tailora.formats.metadata import AdapterMetadata
from tailora.formats.peft import SUFFIXES, StoredAdapter

MERGED = 'export to "merged", which puts it into the weights'


@dataclass(frozen=True)
class ExportSource:
    """What is exported. `tokenizer` is saved with a merged model."""

    adapter: Adapter
    base_model: nn.Module
    tokenizer: Any = None


def low_rank_problems(source: ExportSource, layer_types: Sequence[LayerType]) -> list[str]:
    """Returns a message for each part of the adapter that two factors per layer cannot hold, and what to do.

    layer_types: those that the format supports.
    """
    adapter = source.adapter
    layers = adapter.low_rank.values()
    problems = []
    if any(layer.lora_magnitude_vector is not None for layer in layers):
        problems.append("use_dora: a magnitude per output is not low-rank")
    if any(layer.lora_bias is not None or layer.bias is not None for layer in layers):
        problems.append("trained biases have no place there")
    if adapter.extras:
        problems.append(f"trained biases and token rows have no place there ({', '.join(adapter.extras)})")
    if adapter.saved:
        problems.append(f"modules_to_save: {', '.join(adapter.saved)} were trained in full")
    for path, layer in adapter.low_rank.items():
        if layer.layer_type not in layer_types:
            problems.append(f"{path}: a {layer.layer_type.name} has no place there")
    return [f"{problem}; {MERGED}" for problem in problems]


@torch.no_grad()
def fold_scale(source: ExportSource) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns path of a module -> A (r, in) and B (out, r), with the scale folded into B; float32, on the CPU.

    For layer types whose A and B are matrices. The parts of a fused layer become one product of the sum of their ranks.
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
    """Returns messages about what `fold_scale` changes."""
    config, layers = source.adapter.config, source.adapter.low_rank.values()
    folded = {
        "rsLoRA's scale alpha/sqrt(r)": config.use_rslora,
        "alpha_pattern": bool(config.alpha_pattern),
        "rank_pattern": bool(config.rank_pattern),
        "learned scales": any(layer.learns_scaling for layer in layers),
        "the strength dial": any(layer.strength != 1 for layer in layers),
    }
    names = ", ".join(name for name, is_used in folded.items() if is_used)
    changes = [f"the scale ({names or 'alpha / r'}) is already in the file; leave it at 1 where the file is loaded"]
    if starts := sum(layer.has_start for layer in layers):
        changes.append(f"{starts} layers' frozen starts are part of their factors, at twice the rank")
    if parts := sum(layer.output_slice is not None for layer in layers):
        changes.append(
            f"{parts} parts of fused layers are written as factors of the whole layer, at the sum of their ranks"
        )
    return changes


# ---- Factors of another format, as a PEFT folder would hold them


def as_stored_adapter(
    source: Path, factors: Mapping[str, tuple[Tensor, Tensor]], scales: Mapping[str, float], **settings: Any
) -> StoredAdapter:
    """Returns the StoredAdapter for A, B and scale of every path. `settings` are added to those of PEFT's file."""
    ranks = {path: A.shape[0] for path, (A, _) in factors.items()}
    alphas = {path: scales[path] * r for path, r in ranks.items()}
    r, alpha = mode([*ranks.values()] or [1]), mode([*alphas.values()] or [1.0])
    peft_settings = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "target_modules": list(factors),
        "rank_pattern": {re.escape(path): rank for path, rank in ranks.items() if rank != r},
        "alpha_pattern": {re.escape(path): value for path, value in alphas.items() if value != alpha},
    }
    tensors = {
        f"{path}{SUFFIXES[slot]}": tensor
        for path, pair in factors.items()
        for slot, tensor in zip("AB", pair, strict=True)
    }
    return StoredAdapter(source, {**peft_settings, **settings}, tensors, AdapterMetadata())


def raise_problems(source: str, problems: Sequence[str]) -> None:
    """Raises FormatError with all problems, if there are any."""
    if problems:
        raise FormatError(f"{source}: {listing(list(problems))}")
