"""The PEFT adapter folder: adapter_model.safetensors, adapter_config.json, README.md.

peft_keys.py has the keys of the tensors. Fields that PEFT lacks (learned scales, our config, the fingerprint of the
base) are in the safetensors metadata, which other readers ignore.
"""

import json
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mode
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError
from torch import Tensor, nn

from tailora.core.adapter import Adapter
from tailora.core.config import LoRAConfig
from tailora.core.layer import LoRALayer, concatenate_ranks
from tailora.core.layer_types import EMBEDDING, Shape
from tailora.core.patterns import exactly
from tailora.core.targets import task_heads
from tailora.errors import DivergedError, FormatError, TailoraWarning
from tailora.formats.fingerprint import LayerFingerprint, fingerprint, vocabulary_size
from tailora.formats.hub import model_card
from tailora.formats.io import (
    read_json_object,
    read_safetensors,
    replace_folder,
    safetensors_bytes,
    wrap_os_error,
    write_file,
)
from tailora.formats.peft_config import (
    CONFIG_ERRORS,
    as_peft_computes,
    base_model_name,
    to_peft_config,
    with_double_rank,
)
from tailora.formats.peft_keys import (
    EMBEDDING_SUFFIXES,
    EXTRA_SUFFIXES,
    KEY_PREFIX,
    SUFFIXES,
    PeftLayer,
    peft_layers,
)
from tailora.formats.run_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CARD, METADATA_KEY

# ---- Our own fields: JSON under METADATA_KEY in the metadata of the safetensors file, which other readers ignore


class AdapterMetadata(BaseModel):
    """The fields that PEFT lacks; empty for files of other tools."""

    model_config = ConfigDict(frozen=True)

    version: int = 1
    config: dict[str, Any] | None = None  # the settings of LoRAConfig
    scaling: dict[str, FiniteFloat] = {}  # learned scales by path; the file's B has them folded in
    start: bool = False  # whether the second half of the ranks is the frozen start, with B negated
    zero_updates: list[str] = []  # paths of layers whose update is zero, because they were not trained, or pruned
    base: dict[str, LayerFingerprint] = {}  # fingerprint of the base model by path
    vocabulary: int | None = None  # rows of the base model's input embedding, if it has one
    saved_modules: list[str] | None = None  # paths of the modules that were trained in full
    base_folder: str | None = None  # absolute path of a base model whose name in adapter_config.json is a relative path
    label_names: list[str] | None = None  # of the base model's classification head, as in its config
    problem_type: str | None = None

    def to_json(self) -> str:
        """Returns the same text for the same adapter: one read from a file has its layers in a different order."""
        in_order = {"base": dict(sorted(self.base.items())), "scaling": dict(sorted(self.scaling.items()))}
        return self.model_copy(update=in_order).model_dump_json()

    def lora_config(self, source: object) -> LoRAConfig | None:
        """Returns the config that the adapter was trained with; None if it is not stored. Raises FormatError."""
        try:
            return None if self.config is None else LoRAConfig(**self.config)
        except CONFIG_ERRORS as error:
            raise FormatError(f"{source}: its tailora metadata: {error}") from None


# ---- The folder


@dataclass(frozen=True)
class StoredAdapter:
    """The content of an adapter folder, not yet checked against a base model."""

    folder: Path
    settings: dict[str, Any] | None  # of adapter_config.json; None if it is missing and the metadata has them
    tensors: dict[str, Tensor]  # by key, without KEY_PREFIX; they share no memory, so adapters may use them
    metadata: AdapterMetadata

    @cached_property
    def largest_size(self) -> int:
        """The largest size of a tensor's dimension, which no rank exceeds."""
        return max((size for tensor in self.tensors.values() for size in tensor.shape), default=0)


def base_fingerprint(adapter: Adapter, base_model: nn.Module) -> dict[str, LayerFingerprint]:
    """Returns the fingerprint of the adapted weights. With a sharded base, all ranks must call it."""
    return fingerprint(base_model, {path: layer.layer_type for path, layer in adapter.low_rank.items()})


def write_peft_folder(
    folder: Path, adapter: Adapter, base_model: nn.Module, base: Mapping[str, LayerFingerprint] | None = None
) -> None:
    """Writes a new folder completely or not at all; in an existing one the files are replaced, the weights first.

    The weights contain their settings, so that a crash between two files is detected when reading. The same adapter
    gives the same bytes. A frozen start doubles the ranks. Raises DivergedError and WriteError.
    base: `base_fingerprint`, if it is known; by default it is read from the base.
    """
    layers = list(peft_layers(base_model, adapter.low_rank).values())
    tensors = adapter_to_peft(adapter, layers)
    if broken := [key for key, tensor in tensors.items() if not tensor.isfinite().all()]:
        names = f"{', '.join(broken[:5])}{', ...' * (len(broken) > 5)}"
        raise DivergedError(f"adapter not saved: {len(broken)} tensors contain NaN or infinity ({names})")
    low_rank = adapter.low_rank.items()
    fingerprints = base_fingerprint(adapter, base_model) if base is None else base
    metadata = AdapterMetadata(
        config=adapter.config.model_dump(),
        scaling={path: layer.scaling.item() for path, layer in low_rank if layer.learns_scaling},
        start=adapter.has_start,
        zero_updates=sorted(path for path, layer in low_rank if layer.is_zero),
        base={path: fingerprints[path] for path in adapter.low_rank},
        vocabulary=vocabulary_size(base_model),
        saved_modules=sorted(adapter.saved),
        base_folder=relative_base_folder(base_model),
        **head_labels(base_model),
    )
    config = as_peft_computes(adapter.config, layers)
    settings = to_peft_config(with_double_rank(config) if adapter.has_start else config, layers, base_model)
    unknown = unreadable_by_peft(layers)
    about = (
        f"LoRA adapter of {len(low_rank)} layers, r = {settings['r']}, alpha = {settings['lora_alpha']:g}. "
        f"{about_zero_updates(metadata.zero_updates)}Loads with {'tailora' if unknown else 'tailora and PEFT'}."
    )
    if unknown:
        about += f" PEFT cannot load the adapter: {unknown}."
        message = f"{folder}: only tailora can load this adapter, not PEFT: {unknown}"
        warnings.warn(message, TailoraWarning, stacklevel=2)
    elif config.lora_dropout != adapter.config.lora_dropout:
        about += f" Trained with lora_dropout = {adapter.config.lora_dropout:g}, which PEFT does not support here."
    write_files(folder, tensors, metadata, settings, about)


def about_zero_updates(paths: Sequence[str]) -> str:
    """Returns a sentence for the card, with a space at its end; "" without such layers."""
    if not paths:
        return ""
    names = f"{', '.join(paths[:5])}{', ...' * (len(paths) > 5)}"
    return f"{len(paths)} of its layers ({names}) have an update of zero, because they were not trained, or pruned. "


def write_files(
    folder: Path, tensors: Mapping[str, Tensor], metadata: AdapterMetadata, settings: Mapping[str, Any], about: str
) -> None:
    """Writes weights, adapter_config.json and card. tensors: by key, without KEY_PREFIX. about: text for the card."""
    in_file = {f"{KEY_PREFIX}{key}": tensor for key, tensor in tensors.items()}
    files = {
        ADAPTER_WEIGHTS: safetensors_bytes(in_file, {"format": "pt", METADATA_KEY: metadata.to_json()}),
        ADAPTER_CONFIG: (json.dumps(settings, indent=2) + "\n").encode(),
        CARD: model_card(settings, about).encode(),
    }
    with wrap_os_error(folder):
        if folder.exists():
            for name, content in files.items():
                write_file(folder / name, content)
            return
        with replace_folder(folder) as temporary:
            for name, content in files.items():
                (temporary / name).write_bytes(content)


def relative_base_folder(base_model: nn.Module) -> str | None:
    """Returns the base model's absolute path if its name is the relative path of a folder; None for others."""
    name = base_model_name(base_model)
    path = Path(name or "")
    return str(path.resolve()) if name and not path.is_absolute() and path.is_dir() else None


def head_labels(base_model: nn.Module) -> dict[str, Any]:
    """Returns the label names and the problem type of a classification head; {} for other models."""
    config: Any = getattr(base_model, "config", None)
    if not task_heads(base_model) or getattr(config, "id2label", None) is None:
        return {}
    names = [str(config.id2label[index]) for index in sorted(config.id2label)]
    return {"label_names": names, "problem_type": getattr(config, "problem_type", None)}


def unreadable_by_peft(layers: Iterable[PeftLayer]) -> str:
    """Returns why PEFT cannot load an adapter of these layers; "" if it can."""
    unknown = [
        path
        for peft_layer in layers
        for path, layer in peft_layer.layers.items()
        if (peft_layer.is_parameter or layer.layer_type.replaces_forward)
        and not (layer.lora_magnitude_vector is None and layer.lora_bias is None)
    ]
    if not unknown:
        return ""
    return (
        "it does not support use_dora and lora_bias on attention, experts, and layers named like projections "
        f"of experts: {', '.join(unknown[:3])} ({len(unknown)} in total)"
    )


def read_peft_folder(folder: Path) -> StoredAdapter:
    """Reads a folder written by tailora or PEFT. Raises FormatError. A pickle is never opened."""
    if not folder.is_dir():
        raise FormatError(
            f"expected an adapter folder with {ADAPTER_WEIGHTS} and {ADAPTER_CONFIG}; {folder} is not a folder"
        )
    if not os.path.lexists(folder / ADAPTER_WEIGHTS):
        hint = ""
        if (folder / "adapter_model.bin").exists():
            hint = " (adapter_model.bin is a pickle, which can run code and is not read; save it as safetensors)"
        if names := sorted(file.parent.name for file in folder.glob(f"*/{ADAPTER_WEIGHTS}")):  # of other adapters
            hint += f"; its subfolders {', '.join(names[:5])} contain adapters; use {folder / names[0]}"
        raise FormatError(f"{folder} has no {ADAPTER_WEIGHTS}{hint}")
    tensors, file_metadata = read_safetensors(folder / ADAPTER_WEIGHTS)
    if wrong := [key for key in tensors if not key.startswith(KEY_PREFIX)]:
        raise FormatError(
            f"{folder / ADAPTER_WEIGHTS}: expected keys that start with {KEY_PREFIX!r}, got {', '.join(wrong[:5])}"
        )
    try:
        metadata = AdapterMetadata.model_validate_json(file_metadata.get(METADATA_KEY, "{}"))
    except ValidationError as error:
        first = error.errors()[0]
        cause = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise FormatError(
            f"{folder / ADAPTER_WEIGHTS}: its tailora metadata is damaged ({cause}); copy the adapter again"
        ) from None
    describes_itself = metadata.config is not None and not os.path.lexists(folder / ADAPTER_CONFIG)
    settings = None if describes_itself else read_json_object(folder / ADAPTER_CONFIG)
    return StoredAdapter(
        folder, settings, {key.removeprefix(KEY_PREFIX): value for key, value in tensors.items()}, metadata
    )


def as_stored_adapter(
    source: Path, factors: Mapping[str, tuple[Tensor, Tensor]], scales: Mapping[str, float], **settings: Any
) -> StoredAdapter:
    """Converts A, B and the scale of every path to the content of a PEFT folder. settings: added to PEFT's."""
    ranks = {path: A.shape[0] for path, (A, _) in factors.items()}
    alphas = {path: scales[path] * r for path, r in ranks.items()}
    r, alpha = mode([*ranks.values()] or [1]), mode([*alphas.values()] or [1.0])
    peft_settings = {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        # names would also match the end of longer paths
        "target_modules": "|".join(map(re.escape, factors)),
        "rank_pattern": {exactly(path): rank for path, rank in ranks.items() if rank != r},
        "alpha_pattern": {exactly(path): value for path, value in alphas.items() if value != alpha},
    }
    tensors = {
        f"{path}{SUFFIXES[slot]}": tensor
        for path, pair in factors.items()
        for slot, tensor in zip("AB", pair, strict=True)
    }
    return StoredAdapter(source, {**peft_settings, **settings}, tensors, AdapterMetadata())


def adapter_to_peft(adapter: Adapter, layers: Iterable[PeftLayer]) -> dict[str, Tensor]:
    """Returns key without KEY_PREFIX -> tensor as stored in the file."""
    tensors: dict[str, Tensor] = {}
    for peft_layer in layers:
        slots = {path: layer_to_peft(layer, adapter.has_start) for path, layer in peft_layer.layers.items()}
        for path, layer in peft_layer.layers.items():
            suffixes = EMBEDDING_SUFFIXES if layer.layer_type is EMBEDDING else SUFFIXES
            for slot in slots[path]:
                parts = {part: part_slots[slot] for part, part_slots in slots.items()}
                tensors[peft_layer.key_prefix + suffixes[slot]] = peft_layer.join(slot, parts)
    for path, module in adapter.saved.items():
        tensors |= {f"{path}.{name}": tensor for name, tensor in module.state_dict().items()}
    for path, part in adapter.extras.items():
        tensors |= {path + EXTRA_SUFFIXES[name]: parameter for name, parameter in part.named_parameters()}
    return {key: tensor.detach() for key, tensor in tensors.items()}


# ---- The tensors of one low-rank layer
#
# Of stacked experts, A (E r, in) has the row e r + k for expert e and rank k, and B (out, E r) the column k E + e.
# With a frozen start the file contains [A, A0] and [B, -B0], of rank 2r: for PEFT this is a plain adapter.


def layer_to_peft(layer: LoRALayer, with_start: bool) -> dict[str, Tensor]:
    """Returns slot -> tensor as stored in the file. The ratio of the scale to the configured one is folded into B.

    The strength dial is not saved, and `peft_keys.PeftLayer` handles the one scale of a fused layer.
    with_start: the ranks are doubled; with zeros if this layer has no frozen start.
    """
    ratio = (layer.scaling / layer.configured_scaling).reshape(())
    kernel_dims = [None] * (layer.lora_A.ndim - 2)  # of a convolution: trailing dimensions of 1
    A: Tensor = layer.lora_A
    B: Tensor = layer.lora_B
    if with_start:
        A0 = torch.zeros_like(A) if layer.start_A is None else layer.start_A
        B0 = torch.zeros_like(B) if layer.start_B is None else layer.start_B
        A, B = concatenate_ranks(A, A0, layer.groups), torch.cat([B, -B0], 1)
    if layer.layer_type.is_stacked:
        by_expert = (B * ratio).reshape(layer.groups, -1, B.shape[1])  # (E, out, r)
        tensors = {"A": A, "B": by_expert.permute(1, 2, 0).flatten(1)}
    else:
        tensors = {"A": groups_to_dense(A, layer.groups), "B": (B * ratio)[(..., *kernel_dims)]}
    if layer.lora_magnitude_vector is not None:
        magnitude = layer.lora_magnitude_vector
        tensors["magnitude"] = magnitude[(None, ..., *kernel_dims)] if kernel_dims else magnitude
    if layer.lora_bias is not None:
        tensors["lora_bias"] = layer.lora_bias * ratio
    if layer.bias is not None:
        tensors["bias"] = layer.bias
    return {slot: tensor.detach() for slot, tensor in tensors.items()}


def slot_shapes(layer: LoRALayer, with_start: bool) -> dict[str, Shape]:
    """Returns the shapes of `layer_to_peft`, slot -> shape, without computing anything."""
    (ranks, in_features, *kernel), outputs, factor = layer.lora_A.shape, len(layer.lora_B), 2 if with_start else 1
    if layer.layer_type.is_stacked:
        shapes: dict[str, Shape] = {"B": (outputs // layer.groups, factor * ranks)}
    else:
        in_features *= layer.groups
        shapes = {"B": (outputs, factor * layer.lora_B.shape[1], *(1 for _ in kernel))}
    shapes = {"A": (factor * ranks, in_features, *kernel), **shapes}
    if layer.lora_magnitude_vector is not None:
        shapes["magnitude"] = (1, outputs, *(1 for _ in kernel)) if kernel else (outputs,)
    if layer.lora_bias is not None:
        shapes["lora_bias"] = (outputs,)
    if layer.bias is not None:
        shapes["bias"] = tuple(layer.bias.shape)
    return shapes


@torch.no_grad()
def load_layer(layer: LoRALayer, tensors: Mapping[str, Tensor], with_start: bool) -> None:
    """Fills the layer with slot -> tensor of the right shape. Raises FormatError if no weight can represent them."""
    A, B = tensors["A"].to(layer.lora_A), tensors["B"].to(layer.lora_B).view(tensors["B"].shape[:2])
    if layer.layer_type.is_stacked:
        grouped_A: Tensor | None = A
        B = B.reshape(len(B), -1, layer.groups).permute(2, 0, 1).flatten(0, 1)  # (out, E r) -> (E out, r)
    else:
        grouped_A = dense_to_groups(A, layer.groups)
    if grouped_A is None:  # PEFT trains an A that reads all channels of a grouped convolution
        if layer.lora_magnitude_vector is not None:
            raise FormatError("its A mixes the channels of different groups, for which DoRA has no row norms")
        grouped_A, layer.groups = A, 1
    if with_start:
        by_group = grouped_A.view(layer.groups, -1, *grouped_A.shape[1:])  # (groups, 2r/groups, ...)
        (A, A0), (B, B0) = (part.flatten(0, 1) for part in by_group.chunk(2, 1)), B.chunk(2, 1)
        layer.start_from(A0, -B0)
        grouped_A = A
    layer.lora_A.data, layer.lora_B.data = _own(grouped_A), _own(B)
    for slot, name in (("magnitude", "lora_magnitude_vector"), ("lora_bias", "lora_bias"), ("bias", "bias")):
        if slot in tensors:
            getattr(layer, name).copy_(tensors[slot].flatten())


def _own(tensor: Tensor) -> Tensor:
    """Returns the tensor if it is contiguous and has its memory to itself; otherwise a copy, for example of a view."""
    is_alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if is_alone else tensor.clone(memory_format=torch.contiguous_format)


# ---- A of a grouped convolution
#
# In PEFT, A reads all channels, which a grouped weight cannot represent. Here it has one block per group, so that the
# update can be merged. The file has these blocks with zeros between the groups, which is the same function in PEFT.


def groups_to_dense(A: Tensor, groups: int) -> Tensor:
    """(r, in/groups, *kernel) -> (r, in, *kernel)."""
    if groups == 1:
        return A
    r, per_group, *kernel = A.shape
    dense = A.new_zeros(groups, r // groups, groups, per_group, *kernel)
    group = torch.arange(groups, device=A.device)
    dense[group, :, group] = A.view(groups, r // groups, per_group, *kernel)
    return dense.view(r, groups * per_group, *kernel)


def dense_to_groups(A: Tensor, groups: int) -> Tensor | None:
    """(r, in, *kernel) -> (r, in/groups, *kernel); None if A mixes channels of different groups."""
    if groups == 1:
        return A
    r, channels, *kernel = A.shape
    group = torch.arange(groups, device=A.device)
    dense = A.view(groups, r // groups, groups, channels // groups, *kernel)
    blocks = dense[group, :, group].reshape(r, channels // groups, *kernel)
    return blocks if torch.allclose(groups_to_dense(blocks, groups), A, 0, 0, equal_nan=True) else None
