"""A PEFT folder that servers read right: one rank that vLLM allows, alpha = r, nothing that one of them passes over.

vLLM knows no rank or alpha patterns, SGLang and LMDeploy no rsLoRA; here the scale is 1 and lives in B.
"""

import json
from pathlib import Path

from torch import Tensor

from tailora.core.layer_types import CONV1D, EMBEDDING, LINEAR, host_of
from tailora.formats.factors import EMBEDDING_SUFFIXES, SUFFIXES
from tailora.formats.fingerprint import fingerprint
from tailora.formats.low_rank_export import Source, factors, hosts, limits, padded, scale_notes
from tailora.formats.metadata import KEY, Notes
from tailora.formats.peft import CARD, PREFIX, SETTINGS, WEIGHTS
from tailora.formats.peft_config import to_peft
from tailora.formats.peft_paths import stems
from tailora.formats.tensors import to_bytes

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's --max-lora-rank
CARD_TEXT = """\
---
library_name: peft
{base}tags:
- lora
- tailora
---

Plain LoRA adapter of {layers} layers, r = alpha = {r}: the scale is in B.
For PEFT, and for servers that read r and alpha alone: vLLM, SGLang, LMDeploy.
"""


def problems(source: Source) -> list[str]:
    found = limits(source, (LINEAR, CONV1D, EMBEDDING))
    return found or _rank_problems(source)


def _rank_problems(source: Source) -> list[str]:
    plain = factors(source)
    highest = max(each.r for each in plain.values())
    if highest > RANKS[-1]:
        return [f"rank {highest} is above {RANKS[-1]}, the highest that vLLM takes; export to 'gguf' or 'merged'"]
    r = next(rank for rank in RANKS if rank >= highest)
    narrow = [path for path, each in plain.items() if min(each.A.shape[1], each.B.shape[0]) < r]
    why = f"the one rank for all layers, {r}, is above its width; export to 'gguf' or 'merged'"
    return [f"{path}: {why}" for path in narrow]


def write(folder: Path, source: Source) -> list[str]:
    """Fill `folder`; returns what differs from the adapter as trained, in words."""
    plain = factors(source)
    highest = max(each.r for each in plain.values())
    r = next(rank for rank in RANKS if rank >= highest)
    tensors: dict[str, Tensor] = {}
    kinds = hosts(source)
    for path, each in plain.items():
        keys, wide = EMBEDDING_SUFFIXES if kinds[path] is EMBEDDING else SUFFIXES, padded(each, r)
        tensors |= {f"{PREFIX}{path}{keys['A']}": wide.A, f"{PREFIX}{path}{keys['B']}": wide.B}
    places = {path: (host_of(source.base_model, path), "weight") for path in plain}
    notes = Notes(base=fingerprint(places))
    config = source.adapter.config.replaced(
        r=r,
        lora_alpha=r,
        lora_dropout=0,
        rank_pattern={},
        alpha_pattern={},
        use_rslora=False,
        init_lora_weights="kaiming",
    )
    settings = to_peft(config, stems(source.base_model, source.adapter.low_rank).values(), source.base_model)
    base = settings["base_model_name_or_path"]
    (folder / WEIGHTS).write_bytes(to_bytes(tensors, {"format": "pt", KEY: notes.model_dump_json()}))
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    card = CARD_TEXT.format(base=f"base_model: {base}\n" if base else "", layers=len(plain), r=r)
    (folder / CARD).write_text(card, encoding="utf-8")
    below = sum(each.r < r for each in plain.values())
    padding = [f"{below} of {len(plain)} layers are filled up with zeros to rank {r}"] if below else []
    return [*scale_notes(source), *padding]
