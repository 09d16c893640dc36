"""LoRA in one safetensors file, as Kohya's tools, diffusers and those around them write it.

    Kohya        lora_unet_down_blocks_0_..._to_q.lora_down.weight, .lora_up.weight, .alpha: dots are underscores
    diffusers    transformer.blocks.0.attn.to_q.lora_A.weight, .lora_B.weight; settings as JSON in the metadata
    diffusers, old     unet.down_blocks.0...processor.to_q_lora.down.weight, .to_q.lora.down.weight

lora_down is A, lora_up is B, and the scale is alpha / r; without an alpha it is 1. A file may hold layers of
several models, each under a prefix; those of the given model are read.
"""

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tailora.core.layer_types import layer_type_of
from tailora.errors import FormatError, nearest
from tailora.formats.io import read as read_tensors
from tailora.formats.low_rank_export import refuse, stored
from tailora.formats.peft import PREFIX, StoredAdapter

LEAVES = {  # what ends a key -> what it is
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_down.weight": "A",
    ".lora_up.weight": "B",
    ".lora.down.weight": "A",
    ".lora.up.weight": "B",
    ".lora_linear_layer.down.weight": "A",
    ".lora_linear_layer.up.weight": "B",
    "_lora.down.weight": "A",
    "_lora.up.weight": "B",
    ".alpha": "alpha",
}
OTHERS = {  # what other methods' keys hold
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "lora_mid": "a LoRA of three factors (Tucker)",
    "dora_scale": "DoRA",
    "lora_magnitude": "DoRA",
    "oft_": "OFT",
    ".diff": "whole weights",
}
METADATA = "lora_adapter_metadata"
FLAT = re.compile(r"(lora_[a-z]+\d*)_(.+)")
PROCESSOR = re.compile(r"\.processor\.")


@dataclass
class Layer:
    """`component`: which of several models it belongs to; '' where the key does not say."""

    component: str
    slots: dict[str, Tensor] = field(default_factory=dict)


def read(file: Path, base_model: nn.Module) -> StoredAdapter:
    """What the file has for this model, as a PEFT folder would hold it.

    Raises FormatError with all keys that are not LoRA or fit no layer; warns of the layers of other models.
    """
    tensors, metadata = read_tensors(file)
    refuse(str(file), _foreign(tensors))
    names = _names(base_model)
    found: dict[str, Layer] = {}
    lost: dict[str, list[str]] = {}
    for key, tensor in tensors.items():
        stem, slot = _split(key)
        component, path = _place(stem, names)
        if path is None:
            lost.setdefault(component, []).append(stem)
        else:
            found.setdefault(path, Layer(component)).slots[slot] = tensor
    components = {layer.component for layer in found.values()}
    refuse(str(file), [*_unplaced(lost, components, names), *_incomplete(found)])
    others = {component: len(set(stems)) for component, stems in lost.items()}
    if others:
        said = ", ".join(f"{component} ({count} layers)" for component, count in others.items())
        warnings.warn(f"{file} also holds layers of other models, which are left out: {said}", stacklevel=2)
    pairs = {path: (layer.slots["A"], layer.slots["B"]) for path, layer in found.items()}
    return stored(file, pairs, _scales(found), **_settings(metadata.get(METADATA), components, file))


def _foreign(tensors: Mapping[str, Tensor]) -> list[str]:
    if not tensors:
        return ["no tensors"]
    other = {name for key in tensors for mark, name in OTHERS.items() if mark in key}
    if other:
        return [f"holds {', '.join(sorted(other))}, not plain LoRA; merge it with the tool that wrote it"]
    strange = [key for key in tensors if _split(key)[1] == ""]
    whole = f" ({len(strange)} of {len(tensors)} keys)" if strange else ""
    return [f"not LoRA: {', '.join(strange[:3])}{whole}; give the file of an adapter"] if strange else []


def _split(key: str) -> tuple[str, str]:
    """The layer's name, and A, B or alpha; '' for another key."""
    for leaf, slot in LEAVES.items():
        if key.endswith(leaf):
            return key.removesuffix(leaf), slot
    return key, ""


def _names(base_model: nn.Module) -> dict[str, str]:
    """Path, and path with underscores for dots where only one layer has it -> path, of what can be adapted."""
    paths = [path for path, module in base_model.named_modules() if path and layer_type_of(module)]
    flat: dict[str, list[str]] = {}
    for path in paths:
        flat.setdefault(path.replace(".", "_"), []).append(path)
    return {name: each[0] for name, each in flat.items() if len(each) == 1} | {path: path for path in paths}


def _place(stem: str, names: Mapping[str, str]) -> tuple[str, str | None]:
    """The component that the key names, and the path of the layer in this model, if it has it."""
    stem = PROCESSOR.sub(".", stem.removeprefix(PREFIX))
    for component, name in (("", stem), _component(stem)):
        for ending in ("", ".0"):  # diffusers' to_out is a list
            if f"{name}{ending}" in names:
                return component, names[f"{name}{ending}"]
    return _component(stem)[0], None


def _component(stem: str) -> tuple[str, str]:
    """Prefix of the model that the layer belongs to, and the layer's name in it."""
    if match := FLAT.fullmatch(stem):
        return match[1], match[2]
    component, _, rest = stem.partition(".")
    return component, rest


def _unplaced(lost: Mapping[str, list[str]], components: set[str], names: Mapping[str, str]) -> list[str]:
    """Layers under a prefix of this model that it lacks; under another prefix they are another model's."""
    if not components:
        stems = sorted({stem for each in lost.values() for stem in each})
        hint = nearest(stems[0], names) if stems else ""
        return [f"none of its {len(stems)} layers is in this model; the first is {stems[0] if stems else '-'}{hint}"]
    own = sorted({stem for component in components for stem in lost.get(component, [])})
    return [f"{stem}: the model has no such layer" for stem in own]


def _incomplete(found: Mapping[str, Layer]) -> list[str]:
    lacking = {path: [slot for slot in "AB" if slot not in layer.slots] for path, layer in found.items()}
    problems = [f"{path}: factor {' and '.join(slots)} is missing" for path, slots in lacking.items() if slots]
    alphas = {path: layer.slots["alpha"] for path, layer in found.items() if "alpha" in layer.slots}
    return problems + [
        f"{path}: alpha has {alpha.numel()} numbers, not one" for path, alpha in alphas.items() if alpha.numel() != 1
    ]


def _scales(found: Mapping[str, Layer]) -> dict[str, float]:
    """alpha / r; 1 without an alpha, or where it is 0, which Kohya's tools take for none."""
    scales = {}
    for path, layer in found.items():
        alpha = float(layer.slots["alpha"]) if "alpha" in layer.slots else 0.0
        scales[path] = alpha / layer.slots["A"].shape[0] if alpha else 1.0
    return scales


def _settings(text: str | None, components: set[str], file: Path) -> dict[str, Any]:
    """diffusers' metadata: PEFT's settings, with the component before each. {} where there is none."""
    if text is None:
        return {}
    try:
        written = json.loads(text)
        own = {key.partition(".")[::2]: value for key, value in written.items()}
    except (ValueError, AttributeError, RecursionError):
        raise FormatError(f"{file}: its metadata {METADATA} is not a JSON object") from None
    return {key: value for (component, key), value in own.items() if component in components}
