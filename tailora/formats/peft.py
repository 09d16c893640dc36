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
from tailora.core.config import LoRAConfig
from tailora.core.kinds import EMBEDDING
from tailora.errors import ConfigError, FormatError
from tailora.formats.atomic import replace_folder, write_file
from tailora.formats.fingerprint import fingerprint
from tailora.formats.grouping import join_groups
from tailora.formats.peft_config import read_settings, to_peft
from tailora.formats.tensors import read, to_bytes

PREFIX = "base_model.model."
WEIGHTS, SETTINGS, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"
SUFFIXES = (".lora_A.weight", ".lora_B.weight")
EMBEDDING_SUFFIXES = (".lora_embedding_A", ".lora_embedding_B")
FACTOR_OF = {
    suffix: factor for ends in (SUFFIXES, EMBEDDING_SUFFIXES) for suffix, factor in zip(ends, "AB", strict=True)
}
METADATA = "tailora"


@dataclass(frozen=True)
class StoredAdapter:
    """What a folder holds, checked for form but not yet against a base model."""

    folder: Path
    settings: dict[str, Any]
    tensors: dict[str, Tensor]  # keys without PREFIX
    notes: dict[str, Any]  # our metadata; {} in a folder that another tool wrote

    @property
    def config(self) -> LoRAConfig | None:
        """The config that it was trained with, where tailora wrote the folder."""
        try:
            return LoRAConfig(**self.notes["config"]) if "config" in self.notes else None
        except ConfigError as error:
            raise FormatError(f"{self.folder / WEIGHTS}: its metadata: {error}") from None


def write_adapter(folder: Path, adapter: Adapter, base_model: nn.Module) -> None:
    """Write the folder whole or not at all; the same adapter gives the same bytes.

    The effective scale is in the files: what a learned or assigned scale differs from alpha/r is folded into B.
    """
    tensors = {f"{PREFIX}{key}": tensor for key, tensor in file_tensors(adapter).items()}
    notes = {
        "version": 1,
        "config": adapter.config.model_dump(),
        "scaling": {path: layer.scaling.item() for path, layer in adapter.low_rank.items() if layer.learns_scaling},
        "base": fingerprint({path: base_model.get_submodule(path) for path in adapter.low_rank}),
    }
    settings = to_peft(adapter.config, adapter.low_rank, base_model)
    files = {
        WEIGHTS: to_bytes(tensors, {"format": "pt", METADATA: json.dumps(notes)}),
        SETTINGS: (json.dumps(settings, indent=2) + "\n").encode(),
        CARD: _card(settings, adapter).encode(),
    }
    if folder.exists() and {entry.name for entry in folder.iterdir()} - set(files):
        for name, content in files.items():  # other things live here: exchange ours one by one
            write_file(folder / name, content)
        return
    with replace_folder(folder) as fresh:
        for name, content in files.items():
            (fresh / name).write_bytes(content)


def read_adapter(folder: Path) -> StoredAdapter:
    """Read a folder written by tailora or PEFT. Raises FormatError; a pickle is never opened."""
    if not folder.is_dir():
        raise FormatError(f"{folder} is not a folder; an adapter is a folder with {WEIGHTS} and {SETTINGS}")
    settings = read_settings(folder / SETTINGS)
    if not (folder / WEIGHTS).is_file():
        pickled = " (adapter_model.bin is a pickle, which can run code and is not read; save it as safetensors)"
        raise FormatError(f"{folder} has no {WEIGHTS}{pickled if (folder / 'adapter_model.bin').exists() else ''}")
    tensors, metadata = read(folder / WEIGHTS)
    if strange := [key for key in tensors if not key.startswith(PREFIX)]:
        raise FormatError(f"{folder / WEIGHTS}: keys start with {PREFIX!r}; these do not: {', '.join(strange[:5])}")
    return StoredAdapter(
        folder,
        settings,
        {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()},
        _notes(folder, metadata),
    )


def _notes(folder: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        notes = json.loads(metadata.get(METADATA, "{}"))
    except json.JSONDecodeError as error:
        raise FormatError(f"{folder / WEIGHTS}: its tailora metadata is not JSON: {error}") from None
    if not isinstance(notes, dict):
        raise FormatError(f"{folder / WEIGHTS}: its tailora metadata is not an object")
    return notes


def file_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Key without prefix -> tensor as the file holds it."""
    tensors: dict[str, Tensor] = {}
    for path, layer in adapter.low_rank.items():
        key_A, key_B = EMBEDDING_SUFFIXES if layer.kind is EMBEDDING else SUFFIXES
        ratio = (layer.scaling / layer.configured_scaling).reshape(())
        tensors[path + key_A] = join_groups(layer.lora_A.detach(), layer.groups)
        tensors[path + key_B] = (layer.lora_B * ratio)[(..., *[None] * (layer.lora_A.ndim - 2))]
    for path, module in adapter.saved.items():
        tensors |= {f"{path}.{name}": tensor for name, tensor in module.state_dict().items()}
    return {key: tensor.detach() for key, tensor in tensors.items()}


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
        f"LoRA adapter of {len(adapter.low_rank)} layers, r = {adapter.config.r}, "
        f"alpha = {adapter.config.lora_alpha:g}. Loads with tailora and PEFT."
    )
    return "\n".join([*front, "", body, ""])
