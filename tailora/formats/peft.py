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

import torch
from torch import Tensor, nn

from tailora.core.adapter import Adapter, extra_parts
from tailora.core.layer import LoRALayer, beside
from tailora.core.layer_types import EMBEDDING, host_of
from tailora.core.targets import ExtraTargets
from tailora.errors import DivergedError, FormatError
from tailora.formats.fingerprint import fingerprint
from tailora.formats.io import read, replace_folder, to_bytes, write_file, writing
from tailora.formats.metadata import KEY, Notes, parse
from tailora.formats.peft_config import doubled, read_settings, to_peft, with_patterns
from tailora.formats.peft_paths import stems

# ---- Trained biases and token rows in PEFT's file, and what a file holds of the base itself.


BIAS, ROWS = ".bias", ".token_adapter.trainable_tokens_delta"
BASE_WEIGHTS = (".token_adapter.base_layer.weight", ".base_layer.weight", ".weight")
TOLERANCE = 2.0**-7  # rounding to bfloat16, once on either side

Modules = Mapping[str, nn.Module]


def extra_tensors(extras: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Key without prefix -> tensor as the file holds it."""
    suffixes = {"bias": BIAS, "trainable_tokens_delta": ROWS}
    return {
        path + suffixes[name]: parameter.detach()
        for path, part in extras.items()
        for name, parameter in part.named_parameters()
    }


def extra_keys(wanted: ExtraTargets) -> dict[str, str]:
    """Key without prefix -> path, of what the settings name."""
    return {path + BIAS: path for path in wanted.biases} | {path + ROWS: path for path in wanted.tokens}


@torch.no_grad()
def filled_extras(
    wanted: ExtraTargets, modules: Modules, found: Mapping[str, Tensor]
) -> tuple[dict[str, nn.Module], list[str]]:
    """The parts with the file's tensors, `found` by path; and what is missing or misshapen."""
    parts, problems = extra_parts(wanted, modules), []
    for key, path in extra_keys(wanted).items():
        (parameter,) = parts[path].parameters()
        if path not in found:
            problems.append(f"missing {key} {tuple(parameter.shape)}")
        elif found[path].shape != parameter.shape:
            shape = tuple(found[path].shape)
            problems.append(f"misshapen {key}: the file has {shape}, the model needs {tuple(parameter.shape)}")
        else:
            parameter.copy_(found[path])
    return parts, problems


def of_the_base(key: str, tensor: Tensor, modules: Modules) -> tuple[bool, str | None]:
    """Whether this is a weight of the base, which PEFT saves with adapted or resized embeddings; and why it cannot be
    passed over: the base here has another.
    """
    path = next((key.removesuffix(end) for end in BASE_WEIGHTS if key.endswith(end)), None)
    weight = getattr(modules.get(path or ""), "weight", None)
    if path is None or not isinstance(weight, Tensor):
        return False, None
    if weight.shape != tensor.shape:
        resize = f"; resize_token_embeddings({len(tensor)}) comes first" if weight.shape[1:] == tensor.shape[1:] else ""
        return True, f"the file's {path}.weight is {tuple(tensor.shape)}, the model's {tuple(weight.shape)}{resize}"
    apart = ~torch.isclose(weight.detach().float().cpu(), tensor.float(), rtol=TOLERANCE, atol=1e-6)
    rows = apart.flatten(1).any(1).nonzero()[:, 0].tolist() if apart.ndim > 1 else []
    if not rows:
        return True, None
    return True, (
        f"the file has other values in {len(rows)} rows of {path}.weight ({rows[0]}..{rows[-1]}) than this base, "
        f"which is never changed here; copy the file's {key} into the base's {path}.weight, then load the adapter"
    )


# ---- A of a grouped convolution: one block per group in memory, all channels with zeros between the groups in a file.
#
# PEFT lets A read all channels, which no grouped weight can hold; blocks keep the update mergeable and are, with
# the zeros written out, the same function in PEFT.


def join_groups(A: Tensor, groups: int) -> Tensor:
    """(r, in/groups, *kernel) -> (r, in, *kernel)."""
    if groups == 1:
        return A
    r, per_group, *kernel = A.shape
    dense = A.new_zeros(groups, r // groups, groups, per_group, *kernel)
    each = torch.arange(groups, device=A.device)
    dense[each, :, each] = A.view(groups, r // groups, per_group, *kernel)
    return dense.view(r, groups * per_group, *kernel)


def split_groups(A: Tensor, groups: int) -> Tensor | None:
    """(r, in, *kernel) -> (r, in/groups, *kernel); None where A mixes channels of different groups."""
    if groups == 1:
        return A
    r, channels, *kernel = A.shape
    each = torch.arange(groups, device=A.device)
    dense = A.view(groups, r // groups, groups, channels // groups, *kernel)
    blocks = dense[each, :, each].reshape(r, channels // groups, *kernel)
    return blocks if torch.equal(join_groups(blocks, groups), A) else None


# ---- One layer's tensors in PEFT's file: which keys and shapes, and both ways between the file and the layer.
#
# Of stacked experts A (E r, in) has rows e r + k, and B (out, E r) columns k E + e.
# With a frozen start the file holds [A, A0] and [B, -B0], of rank 2r: for PEFT a plain adapter.


Shape = tuple[int, ...]

OTHERS = {"magnitude": ".lora_magnitude_vector", "lora_bias": ".lora_B.bias", "bias": ".base_layer.bias"}
SUFFIXES = {"A": ".lora_A.weight", "B": ".lora_B.weight", **OTHERS}
EMBEDDING_SUFFIXES = {"A": ".lora_embedding_A", "B": ".lora_embedding_B", **OTHERS}
SLOT_OF = {suffix: slot for table in (SUFFIXES, EMBEDDING_SUFFIXES) for slot, suffix in table.items()}


def suffixes(layer: LoRALayer) -> dict[str, str]:
    """Slot -> what follows the layer's path in its key."""
    return EMBEDDING_SUFFIXES if layer.layer_type is EMBEDDING else SUFFIXES


def to_file(layer: LoRALayer, start: bool) -> dict[str, Tensor]:
    """Slot -> tensor as the file holds it. What the scale differs from alpha/r is folded into B and its bias.

    start: the ranks are doubled, with zeros where this layer has no frozen start.
    """
    ratio = (layer.scaling / layer.configured_scaling).reshape(())
    A, B = _with_start(layer) if start else (layer.lora_A, layer.lora_B)
    if layer.layer_type.stacked:
        tensors = {"A": A, "B": _columns(B * ratio, layer.groups)}
    else:
        tensors = {"A": join_groups(A, layer.groups), "B": (B * ratio)[(..., *_ones(layer))]}
    if layer.lora_magnitude_vector is not None:
        tensors["magnitude"] = layer.lora_magnitude_vector.view(_magnitude_shape(layer))
    if layer.lora_bias is not None:
        tensors["lora_bias"] = layer.lora_bias * ratio
    if layer.bias is not None:
        tensors["bias"] = layer.bias
    return {slot: tensor.detach() for slot, tensor in tensors.items()}


def file_shapes(layer: LoRALayer, start: bool) -> dict[str, Shape]:
    """Slot -> shape, of the slots that the layer has: all channels in A, a trailing 1 per kernel dimension in B."""
    r, per_group, *kernel = layer.lora_A.shape
    out, per_rank = layer.lora_B.shape
    times = 2 if start else 1
    shapes: dict[str, Shape]
    if layer.layer_type.stacked:
        shapes = {"A": (times * r, per_group), "B": (out // layer.groups, times * per_rank * layer.groups)}
    else:
        shapes = {"A": (times * r, per_group * layer.groups, *kernel), "B": (out, times * per_rank, *[1] * len(kernel))}
    if layer.lora_magnitude_vector is not None:
        shapes["magnitude"] = _magnitude_shape(layer)
    return shapes | {name: (out,) for name in ("lora_bias", "bias") if getattr(layer, name) is not None}


@torch.no_grad()
def fill(layer: LoRALayer, found: Mapping[str, Tensor], start: bool) -> None:
    """Put the file's tensors, of these shapes, into the layer. Raises FormatError where no weight can hold them."""
    _fill_factors(layer, found, start)
    for slot, own in (("magnitude", "lora_magnitude_vector"), ("lora_bias", "lora_bias"), ("bias", "bias")):
        if slot in found:
            getattr(layer, own).copy_(found[slot].flatten())


def _fill_factors(layer: LoRALayer, found: Mapping[str, Tensor], start: bool) -> None:
    A, B = found["A"].to(layer.lora_A), found["B"].to(layer.lora_B).view(found["B"].shape[:2])
    if layer.layer_type.stacked:
        B = _experts(B, layer.groups)
    blocks = A if layer.layer_type.stacked else split_groups(A, layer.groups)
    if blocks is None:  # PEFT trains an A that reads all channels of a grouped convolution
        if layer.lora_magnitude_vector is not None:
            raise FormatError("its A mixes the channels of different groups, so the rows of its weight have no norm")
        blocks, layer.groups = A, 1
    if not start:
        layer.lora_A = nn.Parameter(blocks) if blocks.shape != layer.lora_A.shape else layer.lora_A
        layer.lora_A.copy_(blocks)
        layer.lora_B.copy_(B)
        return
    by_group = blocks.view(layer.groups, -1, *blocks.shape[1:])
    (A, A0), (B, B0) = (half.flatten(0, 1) for half in by_group.chunk(2, 1)), B.chunk(2, 1)
    layer.start_from(A0, -B0)
    layer.lora_A.copy_(A)
    layer.lora_B.copy_(B)


def _columns(B: Tensor, experts: int) -> Tensor:
    """(E out, r), row e out + i -> (out, E r), column k E + e."""
    return B.reshape(experts, -1, B.shape[1]).permute(1, 2, 0).flatten(1)


def _experts(B: Tensor, experts: int) -> Tensor:
    """The inverse of `_columns`."""
    return B.reshape(len(B), -1, experts).permute(2, 0, 1).flatten(0, 1)


def _with_start(layer: LoRALayer) -> tuple[Tensor, Tensor]:
    A0 = torch.zeros_like(layer.lora_A) if layer.start_A is None else layer.start_A
    B0 = torch.zeros_like(layer.lora_B) if layer.start_B is None else layer.start_B
    return beside(layer.lora_A, A0, layer.groups), torch.cat([layer.lora_B, -B0], 1)


def _magnitude_shape(layer: LoRALayer) -> Shape:
    return (1, len(layer.lora_B), *[1] * (layer.lora_A.ndim - 2)) if layer.lora_A.ndim > 2 else (len(layer.lora_B),)


def _ones(layer: LoRALayer) -> list[None]:
    """One new dimension per dimension of the kernel."""
    return [None] * (layer.lora_A.ndim - 2)


# ----


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
            {path: (host_of(base_model, path), layer.layer_type.weight) for path, layer in adapter.low_rank.items()}
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
    return [path for path, layer in layers if layer.layer_type.forward and layer.lora_magnitude_vector is not None]


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
