"""An adapter as plain low-rank factors, the one thing that every consumer understands, and back.

    y = W x + B A x      A (r, in), B (out, r) with the whole scale in it: alpha/r, rsLoRA, patterns, a learned scale

A start that is not zero (PiSSA, OLoRA) is in the factors too: s (B A - B0 A0) is a product of rank 2 r.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tailora.core.adapter import Adapter
from tailora.core.layer import LoRALayer
from tailora.core.layer_types import LayerType, host_path
from tailora.errors import FormatError, listing
from tailora.formats.metadata import Notes
from tailora.formats.peft import SUFFIXES, StoredAdapter

MERGED = 'export to "merged", which puts it into the weights'


@dataclass(frozen=True)
class Source:
    """What is exported. `tokenizer` goes with a merged model."""

    adapter: Adapter
    base_model: nn.Module
    tokenizer: Any = None


@dataclass(frozen=True)
class Factors:
    A: Tensor  # (r, in), float32, on the CPU
    B: Tensor  # (out, r)

    @property
    def r(self) -> int:
        return self.A.shape[0]


def limits(source: Source, layer_types: Sequence[LayerType]) -> list[str]:
    """What of the adapter two factors per layer cannot hold, each with what to do instead."""
    adapter = source.adapter
    problems = []
    if any(layer.lora_magnitude_vector is not None for layer in adapter.low_rank.values()):
        problems.append(f"use_dora: a magnitude per output is not low-rank; {MERGED}")
    if any(layer.lora_bias is not None or layer.bias is not None for layer in adapter.low_rank.values()):
        problems.append(f"trained biases have no place there; {MERGED}")
    if adapter.extras:
        problems.append(f"trained biases and token rows have no place there ({', '.join(adapter.extras)}); {MERGED}")
    if adapter.saved:
        problems.append(f"modules_to_save: {', '.join(adapter.saved)} were trained whole; {MERGED}")
    unfit = {path: layer.layer_type for path, layer in adapter.low_rank.items() if layer.layer_type not in layer_types}
    problems += [f"{path}: a {layer_type.name} has no place there; {MERGED}" for path, layer_type in unfit.items()]
    return problems


@torch.no_grad()
def factors(source: Source) -> dict[str, Factors]:
    """Path of a module -> factors, for kinds whose A and B are matrices. Parts of a fused layer are one product."""
    found: dict[str, Factors] = {}
    for path, layer in source.adapter.low_rank.items():
        host, own = host_path(source.base_model, path), _factors(layer)
        before = found.get(host)
        found[host] = own if before is None else Factors(torch.cat([before.A, own.A]), torch.cat([before.B, own.B], 1))
    return found


def _factors(layer: LoRALayer) -> Factors:
    A, B = layer.update_factors()
    whole = B if layer.rows is None else layer.rows.spread(B.mT).mT
    return Factors(A.detach().float().cpu(), whole.detach().float().cpu().contiguous())


def hosts(source: Source) -> dict[str, LayerType]:
    """Path of a module -> kind of what is adapted in it."""
    low_rank = source.adapter.low_rank.items()
    return {host_path(source.base_model, path): layer.layer_type for path, layer in low_rank}


def padded(factors: Factors, r: int) -> Factors:
    """The same product at a higher rank: zeros."""
    more = r - factors.r
    if more == 0:
        return factors
    return Factors(nn.functional.pad(factors.A, (0, 0, 0, more)), nn.functional.pad(factors.B, (0, more)))


def stored(
    source: Path, found: Mapping[str, tuple[Tensor, Tensor]], scales: Mapping[str, float], **settings: Any
) -> StoredAdapter:
    """A, B and scale of every path as what a PEFT folder would hold."""
    ranks = {path: A.shape[0] for path, (A, _) in found.items()}
    alphas = {path: scales[path] * r for path, r in ranks.items()}
    r, alpha = _most(ranks.values(), 1), _most(alphas.values(), 1.0)
    plain = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "target_modules": list(found),
        "rank_pattern": {re.escape(path): each for path, each in ranks.items() if each != r},
        "alpha_pattern": {re.escape(path): each for path, each in alphas.items() if each != alpha},
    }
    tensors = {
        f"{path}{SUFFIXES[slot]}": tensor
        for path, pair in found.items()
        for slot, tensor in zip("AB", pair, strict=True)
    }
    return StoredAdapter(source, {**plain, **settings}, tensors, Notes())


def _most(values: Any, default: Any) -> Any:
    common = Counter(values).most_common(1)
    return common[0][0] if common else default


def refuse(source: str, problems: Sequence[str]) -> None:
    """Raises FormatError with all problems, if there are any."""
    if problems:
        raise FormatError(f"{source}: {listing(list(problems))}")


def scale_notes(source: Source) -> list[str]:
    """What folding the scale into B changed, in words."""
    config = source.adapter.config
    asked = {
        "rsLoRA's scale alpha/sqrt(r)": config.use_rslora,
        "alpha_pattern": bool(config.alpha_pattern),
        "rank_pattern": bool(config.rank_pattern),
        "learned scales": any(layer.learns_scaling for layer in source.adapter.low_rank.values()),
        "the strength dial": any(float(layer.strength) != 1 for layer in source.adapter.low_rank.values()),
    }
    said = [name for name, there in asked.items() if there]
    notes = ["the scale is multiplied into B" + (f" ({', '.join(said)})" if said else "")]
    layers = source.adapter.low_rank.values()
    if started := sum(layer.has_start for layer in layers):
        notes.append(f"{started} layers' frozen starts are part of their factors, at twice the rank")
    if parts := sum(layer.rows is not None for layer in layers):
        notes.append(
            f"{parts} parts of fused layers are written as factors of the whole layer, at the sum of their ranks"
        )
    return notes
