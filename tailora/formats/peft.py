"""The adapter folder that the ecosystem shares: adapter_model.safetensors, adapter_config.json, README.md.

A tensor's key is `base_model.model.` + path of the layer + suffix of its kind; the adapter's name is not in it.
What PEFT has no field for (learned scales, our config, the base's fingerprint) is in the safetensors metadata,
which other readers pass over.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tailora.core.adapter import Adapter
from tailora.core.layer_types import host_of
from tailora.errors import DivergedError, FormatError
from tailora.formats.extras import extra_tensors
from tailora.formats.factors import suffixes, to_file
from tailora.formats.fingerprint import fingerprint
from tailora.formats.io import replace_folder, write_file, writing
from tailora.formats.metadata import KEY, Notes, parse
from tailora.formats.peft_config import doubled, read_settings, to_peft, with_patterns
from tailora.formats.peft_paths import stems
from tailora.formats.tensors import read, to_bytes

PREFIX = "base_model.model."
WEIGHTS, SETTINGS, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"


@dataclass(frozen=True)
class StoredAdapter:
    """What a folder holds, checked for form but not yet against a base model."""

    folder: Path
    settings: dict[str, Any] | None  # None where only the weights are there, which tailora's describe themselves
    tensors: dict[str, Tensor]  # keys without PREFIX
    notes: Notes


def write_adapter(folder: Path, adapter: Adapter, base_model: nn.Module) -> None:
    """Write a new folder whole or not at all; in one that exists the files are exchanged, the weights first.

    The weights carry their settings, so that death between two files is seen when reading. The same adapter gives
    the same bytes. A frozen start doubles the ranks. The effective scale is in the files: what a learned or assigned
    scale differs from alpha/r is folded into B. Raises DivergedError for weights that are not finite, WriteError where
    the folder cannot be written.
    """
    files = _contents(adapter, base_model)
    with writing(folder):
        if folder.exists():
            for name, content in files.items():
                write_file(folder / name, content)
            return
        with replace_folder(folder) as fresh:
            for name, content in files.items():
                (fresh / name).write_bytes(content)


def _contents(adapter: Adapter, base_model: nn.Module) -> dict[str, bytes]:
    tensors = {f"{PREFIX}{key}": tensor for key, tensor in file_tensors(adapter, base_model).items()}
    if broken := [key for key, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise DivergedError(f"the adapter is not saved: not finite are {', '.join(broken[:5])} ({len(broken)} in all)")
    notes = Notes(
        config=adapter.config.model_dump(),
        scaling={path: layer.scaling.item() for path, layer in adapter.low_rank.items() if layer.learns_scaling},
        start=adapter.has_start,
        base=fingerprint(
            {path: (host_of(base_model, path), layer.kind.weight) for path, layer in adapter.low_rank.items()}
        ),
    )
    wrappers = list(stems(base_model, adapter.low_rank).values())
    written = with_patterns(adapter.config, wrappers)
    settings = to_peft(doubled(written) if adapter.has_start else written, wrappers, base_model)
    return {
        WEIGHTS: to_bytes(tensors, {"format": "pt", KEY: notes.model_dump_json()}),
        SETTINGS: (json.dumps(settings, indent=2) + "\n").encode(),
        CARD: _card(settings, adapter).encode(),
    }


def read_adapter(folder: Path) -> StoredAdapter:
    """Read a folder written by tailora or PEFT. Raises FormatError; a pickle is never opened."""
    if not folder.is_dir():
        raise FormatError(f"{folder} is not a folder; an adapter is a folder with {WEIGHTS} and {SETTINGS}")
    if not (folder / WEIGHTS).is_file():
        pickled = " (adapter_model.bin is a pickle, which can run code and is not read; save it as safetensors)"
        raise FormatError(f"{folder} has no {WEIGHTS}{pickled if (folder / 'adapter_model.bin').exists() else ''}")
    tensors, metadata = read(folder / WEIGHTS)
    if strange := [key for key in tensors if not key.startswith(PREFIX)]:
        raise FormatError(f"{folder / WEIGHTS}: keys start with {PREFIX!r}; these do not: {', '.join(strange[:5])}")
    notes = parse(metadata.get(KEY), folder / WEIGHTS)
    described = notes.config is not None and not (folder / SETTINGS).exists()
    settings = None if described else read_settings(folder / SETTINGS)
    return StoredAdapter(folder, settings, {key.removeprefix(PREFIX): value for key, value in tensors.items()}, notes)


def file_tensors(adapter: Adapter, base_model: nn.Module) -> dict[str, Tensor]:
    """Key without prefix -> tensor as the file holds it."""
    tensors: dict[str, Tensor] = {}
    for stem in stems(base_model, adapter.low_rank).values():
        slots = {path: to_file(layer, adapter.has_start) for path, layer in stem.members.items()}
        for path, layer in stem.members.items():
            for slot in slots[path]:
                key = stem.name + suffixes(layer)[slot]
                tensors[key] = stem.join(slot, {other: each[slot] for other, each in slots.items()})
    for path, module in adapter.saved.items():
        tensors |= {f"{path}.{name}": tensor for name, tensor in module.state_dict().items()}
    tensors |= extra_tensors(adapter.extras)
    return {key: tensor.detach() for key, tensor in tensors.items()}


def unknown_to_peft(adapter: Adapter) -> list[str]:
    """Paths of what PEFT has no form for: magnitudes on attention, and on parameters such as stacked experts."""
    layers = adapter.low_rank.items()
    return [path for path, layer in layers if layer.kind.forward and layer.lora_magnitude_vector is not None]


def _card(settings: Mapping[str, Any], adapter: Adapter) -> str:
    base = settings["base_model_name_or_path"]
    front = [
        "---",
        "library_name: peft",
        *([f"base_model: {base}"] if base else []),
        "tags:",
        "- lora",
        "- tailora",
        "---",
    ]
    body = (
        f"LoRA adapter of {len(adapter.low_rank)} layers, r = {settings['r']}, "
        f"alpha = {settings['lora_alpha']:g}. Loads with tailora{'' if unknown_to_peft(adapter) else ' and PEFT'}."
    )
    return "\n".join([*front, "", body, ""])
