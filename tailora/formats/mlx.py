"""The adapter folder of mlx-lm: adapters.safetensors, adapter_config.json.

    y = W x + scale * (x lora_a) lora_b      lora_a = A^T (in, r), lora_b = B^T (r, out); scale is not divided by r

One rank and one scale for all layers, so files are written with scale 1 and the full scale in lora_b. `keys` are names
within a block, or full paths; mlx-lm gives a layer without tensors a lora_b of zeros, which changes nothing.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from tailora.core.layer_types import EMBEDDING, LINEAR
from tailora.errors import FormatError
from tailora.formats import fold_scale
from tailora.formats.fold_scale import MERGED, ExportSource
from tailora.formats.io import read_json_object, read_safetensors, safetensors_bytes
from tailora.formats.peft import StoredAdapter, as_stored_adapter
from tailora.formats.peft_keys import OTHER_SUFFIXES
from tailora.formats.run_folder import ADAPTER_CONFIG, MLX_WEIGHTS

SAME_PATHS = (  # transformers' model_type whose layers have the same paths in mlx-lm
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "granite", "smollm3", "olmo2"),
    *("starcoder2", "stablelm", "cohere"),
)
BLOCK = re.compile(r"model\.layers\.\d+\.(.+)")

# ---- Writing


def problems(source: ExportSource) -> list[str]:
    result = fold_scale.low_rank_problems(source, (LINEAR, EMBEDDING))
    config: Any = getattr(source.base_model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type not in SAME_PATHS:
        known = ", ".join(SAME_PATHS)
        result.append(f"model_type {model_type!r} is not supported for mlx-lm; supported: {known}")
    layer_types = fold_scale.exported_layer_types(source).items()
    tied = [path for path, layer_type in layer_types if layer_type is EMBEDDING or path == "lm_head"]
    if tied and getattr(config, "tie_word_embeddings", False):
        result.append(f"{', '.join(tied)}: tied, and mlx-lm would adapt both input and output; {MERGED}")
    return result


def write(folder: Path, source: ExportSource) -> list[str]:
    factors = fold_scale.fold_scale(source)
    r = max(len(A) for A, _ in factors.values())
    factors, padding = fold_scale.pad_ranks(factors, r)
    tensors: dict[str, Tensor] = {}
    for path, (A, B) in factors.items():
        tensors |= {f"{path}.lora_a": A.T, f"{path}.lora_b": B.T}
    keys = {match[1] if (match := BLOCK.fullmatch(path)) else path for path in factors}
    config: Any = source.base_model.config
    settings = {
        "fine_tune_type": "lora",
        "model": getattr(config, "_name_or_path", "") or None,
        "num_layers": config.num_hidden_layers,
        "lora_parameters": {"rank": r, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)},
    }
    (folder / MLX_WEIGHTS).write_bytes(safetensors_bytes(tensors, {"format": "mlx"}))
    (folder / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    changes = [*fold_scale.fold_changes(source), *padding]
    # mlx-lm silently uses a rope_theta of 10,000 if config.json only has it in rope_parameters
    file = Path(getattr(config, "_name_or_path", "")) / "config.json"
    base_settings = read_json_object(file) if file.is_file() else {}
    theta = (base_settings.get("rope_parameters") or {}).get("rope_theta")
    if theta is not None and "rope_theta" not in base_settings:
        changes.append(
            f'before using mlx-lm, add "rope_theta": {theta}, at the top level of {file}, or its results will be wrong'
        )
    return changes


# ---- Reading


def read(folder: Path) -> StoredAdapter:
    """Reads an adapter of mlx-lm, and converts it to the content of a PEFT folder. Raises FormatError."""
    settings = read_json_object(folder / ADAPTER_CONFIG)
    tensors, _ = read_safetensors(folder / MLX_WEIGHTS)
    fine_tune_type = settings.get("fine_tune_type", "lora")
    if fine_tune_type not in ("lora", "dora"):
        raise FormatError(
            f"{folder}: fine_tune_type = {fine_tune_type!r} is not LoRA; merge it into the base with mlx_lm.fuse"
        )
    layers: dict[str, dict[str, Tensor]] = {}  # path -> name -> tensor
    for key, tensor in tensors.items():
        path, _, name = key.rpartition(".")
        layers.setdefault(path, {})[name] = tensor
    names = {"lora_a", "lora_b", *(["m"] if fine_tune_type == "dora" else [])}
    needed, tensor_problems = ", ".join(sorted(names)), []
    for path, layer in layers.items():
        if set(layer) != names:
            has = ", ".join(sorted(layer))
            tensor_problems.append(f"{path}: expected {needed} for {fine_tune_type}, got {has}")
        elif layer["lora_a"].ndim != 2 or layer["lora_b"].ndim != 2:
            shape = tuple(layer["lora_a"].shape)
            tensor_problems.append(f"{path}: factors of shape {shape}, one per expert, are not supported")
    fold_scale.raise_problems(str(folder), tensor_problems)
    parameters = settings.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not 0 < scale <= sys.float_info.max:
        raise FormatError(f"{folder / ADAPTER_CONFIG}: expected lora_parameters.scale above 0, got {scale!r}")
    factors = {path: (layer["lora_a"].T, layer["lora_b"].T) for path, layer in layers.items()}
    base = {"base_model_name_or_path": settings["model"]} if isinstance(settings.get("model"), str) else {}
    scales = dict.fromkeys(factors, float(scale))
    adapter = as_stored_adapter(folder, factors, scales, use_dora=fine_tune_type == "dora", **base)
    suffix = OTHER_SUFFIXES["magnitude"]
    adapter.tensors.update({f"{path}{suffix}": layer["m"] for path, layer in layers.items() if "m" in layer})
    return adapter
