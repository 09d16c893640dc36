"""LoRA in one safetensors file, as written by Kohya's tools, diffusers and related tools.

    Kohya            lora_unet_down_blocks_0_..._to_q.lora_down.weight, .lora_up.weight, .alpha: dots are underscores
    diffusers        transformer.blocks.0.attn.to_q.lora_A.weight, .lora_B.weight; settings as JSON in the metadata
    diffusers, old   unet.down_blocks.0...processor.to_q_lora.down.weight, .to_q.lora.down.weight

lora_down is A, lora_up is B, and the scale is alpha / r; without an alpha it is 1. A file may contain layers of several
models ("components"), each under a prefix; only the given model's are read.

Files are written in diffusers' format with one component, with scale 1 and the full scale in B.
"""

import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tailora.core.layer_types import CONVOLUTION, LINEAR, layer_type_of, qualified_name
from tailora.errors import FormatError, TailoraWarning, nearest
from tailora.formats import fold_scale
from tailora.formats.fold_scale import ExportSource
from tailora.formats.io import read_safetensors, safetensors_bytes
from tailora.formats.peft import StoredAdapter, as_stored_adapter
from tailora.formats.peft_keys import KEY_PREFIX
from tailora.formats.run_folder import DIFFUSERS_WEIGHTS

SUFFIXES = {
    "A": (".lora_A", ".lora_down", ".lora.down", ".lora_linear_layer.down", "_lora.down"),
    "B": (".lora_B", ".lora_up", ".lora.up", ".lora_linear_layer.up", "_lora.up"),
}
METADATA_KEY = "lora_adapter_metadata"
KOHYA_NAME = re.compile(r"(lora_[a-z]+\d*)_(.+)")


def read(file: Path, base_model: nn.Module) -> StoredAdapter:
    """Raises FormatError with all keys that are not LoRA or match no layer. Warns about layers of other models."""
    tensors, metadata = read_safetensors(file)
    if others := [key for key in tensors if not _split_key(key)[1]]:
        raise FormatError(
            f"{file} has keys that are not plain LoRA: {', '.join(others[:3])} ({len(others)} of {len(tensors)} keys); "
            "use the tool that wrote it to merge it into the base model"
        )
    paths = _paths_by_name(base_model)
    layers: dict[str, dict[str, Tensor]] = {}  # path -> A, B or alpha -> tensor
    components: set[str] = set()  # of this model
    unknown: dict[str, list[str]] = {}  # component -> names of layers that this model lacks
    for key, tensor in tensors.items():
        name, slot = _split_key(key)
        component, path = _find_layer(name, paths)
        if path is None:
            unknown.setdefault(component, []).append(name)
        else:
            components.add(component)
            layers.setdefault(path, {})[slot] = tensor
    problems = _unknown_layers(unknown, components, paths)
    for path, layer in layers.items():
        if missing := [slot for slot in "AB" if slot not in layer]:
            problems.append(f"{path}: missing factor {' and '.join(missing)}")
        if flat := [slot for slot in "AB" if slot in layer and (layer[slot].ndim < 2 or not layer[slot].numel())]:
            problems.append(f"{path}: expected a matrix as factor {' and '.join(flat)}")
        if "alpha" in layer and layer["alpha"].numel() != 1:
            problems.append(f"{path}: expected a single number as alpha, got {layer['alpha'].numel()}")
    fold_scale.raise_problems(str(file), problems)
    if unknown:
        counts = ", ".join(f"{component} ({len(set(names))} layers)" for component, names in unknown.items())
        warnings.warn(f"{file}: ignoring the layers of other models: {counts}", TailoraWarning, stacklevel=2)
    scales = {}
    for path, layer in layers.items():
        alpha = float(layer["alpha"]) if "alpha" in layer else 0.0  # 0 means none in Kohya's tools, too
        scales[path] = alpha / layer["A"].shape[0] if alpha else 1.0
    factors = {path: (layer["A"], layer["B"]) for path, layer in layers.items()}
    settings = _diffusers_settings(metadata.get(METADATA_KEY), components, file)
    return as_stored_adapter(file, factors, scales, **settings)


# ---- Writing


def problems(source: ExportSource) -> list[str]:
    if _component(source.base_model) is None:
        return [f"{type(source.base_model).__name__} is not a diffusers model"]
    return fold_scale.low_rank_problems(source, (LINEAR, CONVOLUTION))


def write(folder: Path, source: ExportSource) -> list[str]:
    """Writes one rank for all layers, because earlier versions of diffusers read alpha from a single layer's rank."""
    component, factors = _component(source.base_model), fold_scale.fold_scale(source)
    factors, padding = fold_scale.pad_ranks(factors, max(len(A) for A, _ in factors.values()))
    tensors: dict[str, Tensor] = {}
    for path, (A, B) in factors.items():
        tensors[f"{component}.{path}.lora_A.weight"] = A
        tensors[f"{component}.{path}.lora_B.weight"] = B[(..., *[None] * (A.ndim - 2))]  # convolutions have a kernel
    (folder / DIFFUSERS_WEIGHTS).write_bytes(safetensors_bytes(tensors, {"format": "pt"}))
    return [*fold_scale.fold_changes(source), *padding]


def _component(model: nn.Module) -> str | None:
    """Returns the name of the pipeline's part that this model is; None if it is not of diffusers."""
    names = [qualified_name(base) for base in type(model).__mro__]
    if not any(name.startswith("diffusers.") for name in names):
        return None
    return "unet" if any("UNet" in name for name in names) else "transformer"


# ---- Keys and layers


def _split_key(key: str) -> tuple[str, str]:
    """Returns the layer's name, and A, B or alpha; '' for a key that is not LoRA."""
    if key.endswith(".alpha"):
        return key.removesuffix(".alpha"), "alpha"
    for slot, suffixes in SUFFIXES.items():
        for suffix in suffixes:
            if key.endswith(f"{suffix}.weight"):
                return key.removesuffix(f"{suffix}.weight"), slot
    return key, ""


def _paths_by_name(base_model: nn.Module) -> dict[str, str]:
    """Returns name -> path of all layers. Names are paths, and paths with underscores if only one layer has them."""
    paths = [path for path, module in base_model.named_modules() if path and layer_type_of(module)]
    kohya_names: dict[str, list[str]] = {}
    for path in paths:
        kohya_names.setdefault(path.replace(".", "_"), []).append(path)
    return {name: named[0] for name, named in kohya_names.items() if len(named) == 1} | {path: path for path in paths}


def _find_layer(name: str, paths: Mapping[str, str]) -> tuple[str, str | None]:
    """Returns the component in the name ('' if there is none), and the layer's path if this model has it."""
    name = name.removeprefix(KEY_PREFIX).replace(".processor.", ".")
    match = KOHYA_NAME.fullmatch(name)
    prefix, rest = (match[1], match[2]) if match else name.partition(".")[::2]
    for component, layer_name in (("", name), (prefix, rest)):
        for ending in ("", ".0"):  # diffusers' to_out is a list
            if f"{layer_name}{ending}" in paths:
                return component, paths[f"{layer_name}{ending}"]
    return prefix, None


# ---- Problems


def _unknown_layers(unknown: Mapping[str, list[str]], components: set[str], paths: Mapping[str, str]) -> list[str]:
    """Returns messages for layers that this model lacks. Other prefixes belong to other models."""
    if not components:
        names = sorted({name for component_names in unknown.values() for name in component_names})
        example = f", such as {names[0]}{nearest(names[0], paths)}" if names else ""
        return [f"the model has none of the layers in the file{example}"]
    missing = sorted({name for component in components for name in unknown.get(component, [])})
    return [f"{name}: the model has no such layer" for name in missing]


def _diffusers_settings(text: str | None, components: set[str], file: Path) -> dict[str, Any]:
    """Returns PEFT's settings from diffusers' metadata, whose keys start with the component; {} if there are none."""
    if text is None:
        return {}
    try:
        settings = {key.partition(".")[::2]: value for key, value in json.loads(text).items()}
    except (ValueError, AttributeError, RecursionError):
        raise FormatError(f"{file}: expected a JSON object as the metadata {METADATA_KEY}") from None
    return {key: value for (component, key), value in settings.items() if component in components}
