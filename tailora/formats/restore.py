"""From a stored adapter to one that fits this base model, or to an error that lists all that does not."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tailora.core.adapter import Adapter, low_rank_layer, trained_copy
from tailora.core.config import LoRAConfig
from tailora.core.kinds import kind_of, obstacle
from tailora.core.layer import LoRALayer
from tailora.core.targets import chosen_paths, saved_modules, target_at
from tailora.errors import BaseMismatchError, ConfigError, FormatError, PatternError, TargetError, listing
from tailora.formats.factors import SLOT_OF, file_shapes, fill
from tailora.formats.fingerprint import differences
from tailora.formats.peft import StoredAdapter
from tailora.formats.peft_config import SHARED, check_patterns, doubled, from_peft

Modules = Mapping[str, nn.Module]


@dataclass
class Parts:
    """The file's tensors by what they belong to, and all that is wrong so far."""

    factors: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # path -> slot -> tensor
    saved: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # path -> name in the module -> tensor
    problems: list[str] = field(default_factory=list)


def restore(stored: StoredAdapter, base_model: nn.Module, *, allow_base_mismatch: bool = False) -> Adapter:
    """Build the adapter for `base_model` without touching it.

    Raises FormatError with all missing, unexpected, misshapen and non-finite tensors, or for a pattern that takes for
    ever, and BaseMismatchError when the adapter was made for other weights and `allow_base_mismatch` is not set.
    """
    try:
        return _restored(stored, base_model, allow_base_mismatch)
    except PatternError as error:
        raise FormatError(f"{stored.folder}: {error}") from None


def _restored(stored: StoredAdapter, base_model: nn.Module, allow_base_mismatch: bool) -> Adapter:
    modules = dict(base_model.named_modules())
    own, config = stored.notes.lora(stored.folder), _config(stored, modules)
    check_patterns(config, stored.folder)
    parts = _sort(stored, modules, config)
    parts.problems += _missing(parts, base_model, modules, config, stored.notes.start)
    low_rank = {path: _low_rank(path, modules, config, parts, stored.notes.start) for path in parts.factors}
    copies = {path: _copy(path, modules, parts) for path in parts.saved}
    if parts.problems:
        raise FormatError(f"{stored.folder} does not fit this model: {listing(parts.problems)}")
    _check_base(stored, {path: modules[path] for path in low_rank}, allow_base_mismatch)
    layers = {path: layer for path, layer in low_rank.items() if layer is not None}
    _learn_again(stored, layers)
    return Adapter(own or config, layers, copies)


def _config(stored: StoredAdapter, modules: Modules) -> LoRAConfig:
    """What adapter_config.json says; raises FormatError where the weights were saved with something else."""
    own = stored.notes.lora(stored.folder)
    if stored.settings is None and own is not None:
        return own
    config = from_peft(stored.settings or {}, _paths(stored, modules), stored.folder)
    written = doubled(own) if own is not None and stored.notes.start else own
    if written is not None and (other := [name for name in SHARED if getattr(written, name) != getattr(config, name)]):
        pairs = (f"{name} = {getattr(config, name)!r} here, {getattr(written, name)!r} there" for name in other)
        raise FormatError(
            f"{stored.folder}: adapter_config.json and the settings that the weights were saved with differ: "
            f"{', '.join(pairs)}. Save the adapter again, or delete adapter_config.json to use the weights' own"
        )
    if stored.notes.start and own is None:
        raise FormatError(f"{stored.folder}: its tailora metadata tells of a frozen start, but not of its settings")
    return config.replaced(**_ranks(own)) if own is not None and stored.notes.start else config


def _ranks(config: LoRAConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern")}


def _paths(stored: StoredAdapter, modules: Modules) -> list[str]:
    """Modules that have a factor in the file, in the model's order."""
    there = {path for key in stored.tensors for path, factor in [_factor(key)] if factor}
    return [path for path in modules if path in there]


def _sort(stored: StoredAdapter, modules: Modules, config: LoRAConfig) -> Parts:
    whole = saved_modules(modules, config)
    parts = Parts()
    for key, tensor in stored.tensors.items():
        path, factor = _factor(key)
        owner = next((name for name in whole if key.startswith(f"{name}.")), None)
        if factor and path in modules and kind_of(modules[path]):
            parts.factors.setdefault(path, {})[factor] = tensor
        elif owner is not None:
            parts.saved.setdefault(owner, {})[key.removeprefix(f"{owner}.")] = tensor
        else:
            parts.problems.append(f"unexpected {key} {tuple(tensor.shape)}: {_why_unexpected(path, factor, modules)}")
        if not tensor.isfinite().all():
            parts.problems.append(f"not finite: {key} {tuple(tensor.shape)}")
    return parts


def _factor(key: str) -> tuple[str, str | None]:
    """The path before the suffix and which factor it is; None where the key ends like no factor."""
    for suffix, factor in SLOT_OF.items():
        if f".{key}".endswith(suffix):
            return f".{key}".removesuffix(suffix).removeprefix("."), factor
    return key, None


def _why_unexpected(path: str, factor: str | None, modules: Modules) -> str:
    if factor is None:
        return "neither a low-rank factor nor part of modules_to_save"
    if path not in modules:
        return f"the model has no module {path}"
    return f"{type(modules[path]).__name__} has no low-rank form"


def _missing(parts: Parts, base_model: nn.Module, modules: Modules, config: LoRAConfig, start: bool) -> list[str]:
    """What the settings name and the tensors lack, with the shape that the model would need."""
    named = {*chosen_paths(base_model, modules, config), *parts.factors}
    problems = []
    for path in (path for path in modules if path in named):
        found = parts.factors.get(path, {})
        shapes = {} if {"A", "B"} <= found.keys() else _needed(path, modules, config, start)
        lacking = [factor for factor in "AB" if factor not in found]
        problems += [f"missing lora_{factor} of {path} {shapes.get(factor, '')}".rstrip() for factor in lacking]
    whole = saved_modules(modules, config)
    return problems + [f"missing {path}, which modules_to_save names" for path in whole if path not in parts.saved]


def _needed(path: str, modules: Modules, config: LoRAConfig, start: bool) -> dict[str, tuple[int, ...]]:
    """Factor -> shape; {} where the config's rank does not fit the layer."""
    try:
        layer = low_rank_layer(target_at(path, modules[path], config), config, fresh=False)
    except (ConfigError, TargetError):
        return {}
    return file_shapes(layer, start)


def _low_rank(path: str, modules: Modules, config: LoRAConfig, parts: Parts, start: bool) -> LoRALayer | None:
    """The layer with the file's factors; None, with the reasons added to the problems, where they do not fit."""
    found = parts.factors[path]
    reason = obstacle(modules[path])
    if reason or not {"A", "B"} <= found.keys():
        parts.problems += [f"{path}: {reason}"] if reason else []  # a missing factor is told already
        return None
    try:
        layer = low_rank_layer(target_at(path, modules[path], config), config, fresh=False)
    except (ConfigError, TargetError) as error:
        parts.problems.append(f"{path}: {error}")
        return None
    needed = file_shapes(layer, start)
    wrong = [
        f"misshapen {_said(slot)} of {path}: the file has {tuple(found[slot].shape)}, the model needs {shape}"
        for slot, shape in needed.items()
        if slot in found and tuple(found[slot].shape) != shape
    ]
    wrong += [f"missing {_said(slot)} of {path} {needed[slot]}" for slot in needed.keys() - found.keys()]
    wrong += [f"unexpected {_said(slot)} of {path}: {_unwanted(slot, layer)}" for slot in found.keys() - needed.keys()]
    parts.problems += wrong
    if not wrong and all(tensor.isfinite().all() for tensor in found.values()):  # what is not is told already
        try:
            fill(layer, found, start)
        except FormatError as error:
            parts.problems.append(f"{path}: {error}")
    return layer


def _said(slot: str) -> str:
    return {"A": "lora_A", "B": "lora_B", "magnitude": "lora_magnitude_vector"}.get(slot, slot)


def _unwanted(slot: str, layer: LoRALayer) -> str:
    switches = {
        "magnitude": "use_dora is off",
        "lora_bias": "lora_bias is off",
        "bias": "the layer's bias is not trained",
    }
    return f"{switches[slot]} in the settings, or this {layer.kind.name} has no such slot"


def _copy(path: str, modules: Modules, parts: Parts) -> nn.Module:
    clone, found = trained_copy(modules[path]), parts.saved[path]
    needed = clone.state_dict()
    parts.problems += [f"missing {path}.{name} {tuple(needed[name].shape)}" for name in needed.keys() - found.keys()]
    parts.problems += [f"unexpected {path}.{name} {tuple(found[name].shape)}" for name in found.keys() - needed.keys()]
    wrong = [name for name in needed.keys() & found.keys() if needed[name].shape != found[name].shape]
    parts.problems += [
        f"misshapen {path}.{name}: the file has {tuple(found[name].shape)}, the model needs {tuple(needed[name].shape)}"
        for name in wrong
    ]
    if not wrong and needed.keys() == found.keys():
        clone.load_state_dict(found)
    return clone


def _check_base(stored: StoredAdapter, layers: Modules, allow: bool) -> None:
    problems = differences(stored.notes.base, layers)
    if problems and not allow:
        shown = [*problems[:5], *([f"and {len(problems) - 5} layers more"] if len(problems) > 5 else [])]
        raise BaseMismatchError(
            f"{stored.folder} was made for another base model than this one: {listing(shown)}\n"
            "Load the base that it was trained on, or pass allow_base_mismatch=True to go on."
        )


def _learn_again(stored: StoredAdapter, layers: Mapping[str, LoRALayer]) -> None:
    """Take the learned scale, which the file folds into B for other readers, out again and make it a Parameter."""
    if strange := stored.notes.scaling.keys() - layers.keys():
        raise FormatError(f"{stored.folder}: a learned scale without a layer: {', '.join(sorted(strange))}")
    for path, value in stored.notes.scaling.items():
        layer = layers[path]
        scale = value or layer.configured_scaling  # a scale of 0 has erased B: start again
        layer.lora_B.data.mul_(layer.configured_scaling / scale)
        if layer.start_B is not None:
            layer.start_B.mul_(layer.configured_scaling / scale)
        layer.scaling = nn.Parameter(torch.full_like(layer.scaling, scale))
