"""The adapter folder of mlx-lm: adapters.safetensors, adapter_config.json.

    y = W x + scale * (x lora_a) lora_b      lora_a = A^T (in, r), lora_b = B^T (r, out); scale is not divided by r

One rank and one scale for all layers, so what is written has scale 1 and the whole scale in lora_b. `keys` are names
within a block, or whole paths; a layer that they name and the file lacks gets a lora_b of zeros, which changes nothing.
"""

import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from tailora.core.layer_types import EMBEDDING, LINEAR
from tailora.errors import FormatError
from tailora.formats.io import read as read_tensors
from tailora.formats.io import to_bytes
from tailora.formats.low_rank_export import MERGED, Source, factors, hosts, limits, padded, refuse, scale_notes, stored
from tailora.formats.peft import StoredAdapter
from tailora.formats.peft_config import read_settings

WEIGHTS, SETTINGS = "adapters.safetensors", "adapter_config.json"
# transformers' model_type whose layers have the same paths in mlx-lm
SAME_PATHS = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
    "granite",
    "smollm3",
    "olmo2",
    "starcoder2",
    "stablelm",
    "cohere",
)
BLOCK = re.compile(r"model\.layers\.\d+\.(.+)")


def problems(source: Source) -> list[str]:
    found = limits(source, (LINEAR, EMBEDDING))
    config: Any = getattr(source.base_model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind not in SAME_PATHS:
        found.append(f"model_type {kind!r}: its layers' names in mlx-lm are not known; known: {', '.join(SAME_PATHS)}")
    tied = [path for path, kind in hosts(source).items() if kind is EMBEDDING or path == "lm_head"]
    if tied and getattr(config, "tie_word_embeddings", False):
        found.append(f"{', '.join(tied)}: tied, and mlx-lm would adapt input and output at once; {MERGED}")
    return found


def write(folder: Path, source: Source) -> list[str]:
    """Fill `folder`; returns what differs from the adapter as trained, in words."""
    plain = factors(source)
    r = max(each.r for each in plain.values())
    tensors: dict[str, Tensor] = {}
    for path, each in plain.items():
        wide = padded(each, r)
        tensors |= {f"{path}.lora_a": wide.A.T, f"{path}.lora_b": wide.B.T}
    config: Any = source.base_model.config
    settings = {
        "fine_tune_type": "lora",
        "model": getattr(config, "_name_or_path", "") or None,
        "num_layers": config.num_hidden_layers,
        "lora_parameters": {"rank": r, "scale": 1.0, "dropout": 0.0, "keys": sorted({_key(path) for path in plain})},
    }
    (folder / WEIGHTS).write_bytes(to_bytes(tensors, {"format": "mlx"}))
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    below = sum(each.r < r for each in plain.values())
    padding = [f"{below} layers are filled up with zeros to rank {r}"] if below else []
    return [*scale_notes(source), *padding, *_theta_notes(config)]


def _theta_notes(config: Any) -> list[str]:
    """mlx-lm takes a rope_theta of 10,000 in silence where config.json says it within rope_parameters alone."""
    file = Path(getattr(config, "_name_or_path", "")) / "config.json"
    settings = read_settings(file) if file.is_file() else {}
    theta = (settings.get("rope_parameters") or {}).get("rope_theta")
    if theta is None or "rope_theta" in settings:
        return []
    return [f'mlx-lm needs "rope_theta": {theta} at the top of {file}, or it computes something else']


def _key(path: str) -> str:
    within = BLOCK.fullmatch(path)
    return within[1] if within else path


def read(folder: Path) -> StoredAdapter:
    """What mlx-lm trained, as a PEFT folder would hold it. Raises FormatError."""
    settings = read_settings(folder / SETTINGS)
    tensors, _ = read_tensors(folder / WEIGHTS)
    kind = settings.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise FormatError(f"{folder}: fine_tune_type = {kind!r} holds whole weights; fuse it with mlx-lm")
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        path, _, leaf = key.rpartition(".")
        pairs.setdefault(path, {})[leaf] = tensor
    refuse(str(folder), _strange(pairs, kind))
    scale = _scale(folder, settings)
    found = {path: (pair["lora_a"].T, pair["lora_b"].T) for path, pair in pairs.items()}
    adapter = stored(folder, found, dict.fromkeys(found, scale), use_dora=kind == "dora", **_base(settings))
    adapter.tensors.update({f"{path}.lora_magnitude_vector": pair["m"] for path, pair in pairs.items() if "m" in pair})
    return adapter


def _strange(pairs: dict[str, dict[str, Tensor]], kind: str) -> list[str]:
    leaves = {"lora_a", "lora_b", *(["m"] if kind == "dora" else [])}
    said = []
    for path, pair in pairs.items():
        if set(pair) != leaves:
            said.append(f"{path} has {', '.join(sorted(pair))}; a {kind} layer has {', '.join(sorted(leaves))}")
        elif pair["lora_a"].ndim != 2 or pair["lora_b"].ndim != 2:
            said.append(f"{path}: factors of shape {tuple(pair['lora_a'].shape)}, one per expert, are not read")
    return said


def _scale(folder: Path, settings: dict[str, Any]) -> float:
    parameters = settings.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not scale > 0:
        raise FormatError(f"{folder / SETTINGS}: lora_parameters.scale is {scale!r}; it must be a number above 0")
    return float(scale)


def _base(settings: dict[str, Any]) -> dict[str, Any]:
    return {"base_model_name_or_path": settings["model"]} if isinstance(settings.get("model"), str) else {}
