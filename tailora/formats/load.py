"""From a stored adapter to one that fits this base model, or to an error that lists all that does not."""

from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from tailora.core.adapter import Adapter, low_rank_layer, tie, trained_copy
from tailora.core.config import LoRAConfig
from tailora.core.layer import LoRALayer
from tailora.core.layer_types import host_of, layer_type_of, obstacle
from tailora.core.quantization import base_obstacle, quantized_layers
from tailora.core.targets import (
    Target,
    chosen_places,
    extra_targets,
    quantized_whole,
    saved_modules,
    target_at,
    target_of,
)
from tailora.errors import BaseMismatchError, ConfigError, FormatError, PatternError, TargetError, listing
from tailora.formats import gguf, kohya_diffusers, mlx
from tailora.formats.fingerprint import Held, differences
from tailora.formats.peft import (
    SLOT_OF,
    WEIGHTS,
    StoredAdapter,
    extra_keys,
    file_shapes,
    fill,
    filled_extras,
    of_the_base,
    read_adapter,
)
from tailora.formats.peft_config import SHARED, adds_twice, check_patterns, doubled, from_peft, with_patterns
from tailora.formats.peft_paths import Stem, stems

Modules = Mapping[str, nn.Module]


@dataclass
class Parts:
    """The file's tensors by what they belong to, and all that is wrong so far."""

    factors: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # path -> slot -> tensor
    saved: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # path -> name in the module -> tensor
    extras: dict[str, Tensor] = field(default_factory=dict)  # path -> a trained bias, or rows of an embedding
    problems: list[str] = field(default_factory=list)
    finite: bool = True


def restore(stored: StoredAdapter, base_model: nn.Module, *, allow_base_mismatch: bool = False) -> Adapter:
    """Build the adapter for `base_model` without touching it.

    Raises FormatError with all missing, unexpected, misshapen and non-finite tensors, or for a pattern that takes for
    ever, and BaseMismatchError when the adapter was made for other weights and `allow_base_mismatch` is not set.
    """
    try:
        return _restored(stored, base_model, allow_base_mismatch)
    except PatternError as error:
        raise FormatError(f"{stored.folder}: {error}") from None


def settings_of(stored: StoredAdapter, base_model: nn.Module) -> LoRAConfig:
    """What the adapter was made with, without its tensors. Raises FormatError."""
    told = _told(stored, dict(base_model.named_modules()))
    return _config(stored, stored.notes.lora(stored.folder), told)


def _restored(stored: StoredAdapter, base_model: nn.Module, allow_base_mismatch: bool) -> Adapter:
    modules = dict(base_model.named_modules())
    own, told = stored.notes.lora(stored.folder), _told(stored, modules)
    config = _config(stored, own, told)
    wanted = _wanted(base_model, modules, config)
    empty = _empty(wanted, config)
    wrappers = stems(base_model, empty)
    if config is not told:
        _check_told(stored, with_patterns(config, wrappers.values()), told)
        hosts = {target.host for target in wanted.values()}
        others = {path: each for path, each in _wanted(base_model, modules, told).items() if each.host not in hosts}
        if others:
            wanted, empty = {**wanted, **others}, {**empty, **_empty(others, config)}
            wrappers = stems(base_model, empty)
    named = {*wanted, *_paths(stored, modules)}
    extra, problems = extra_targets(base_model, modules, config, named, saved_modules(modules, config))
    parts = _sort(stored, modules, config, wrappers, extra_keys(extra))
    parts.problems += problems
    parts.problems += _missing(parts, modules, config, wanted, empty, stored.notes.start)
    low_rank = {path: _low_rank(path, base_model, config, parts, empty, stored.notes.start) for path in parts.factors}
    parts.problems += [quantized_whole(path) for path in parts.saved if quantized_layers(modules[path])]
    copies = {path: _copy(path, modules, parts) for path in parts.saved if not quantized_layers(modules[path])}
    extras, problems = filled_extras(extra, modules, parts.extras)
    parts.problems += problems
    if parts.problems:
        raise FormatError(f"{stored.folder} does not fit this model: {listing(parts.problems)}")
    layers = {path: layer for path, layer in low_rank.items() if layer is not None}
    places = {path: (host_of(base_model, path), layer.layer_type.weight) for path, layer in layers.items()}
    _check_base(stored, places, allow_base_mismatch)
    _learn_again(stored, layers)
    tie({path: modules[path] for path in copies}, copies)
    return Adapter(own or config, layers, copies, extras)


def _wanted(base_model: nn.Module, modules: Modules, config: LoRAConfig) -> dict[str, Target]:
    """What the settings name, by path."""
    return {path: target_of(place, config) for path, place in chosen_places(base_model, modules, config).items()}


def _empty(targets: Mapping[str, Target], config: LoRAConfig) -> dict[str, LoRALayer]:
    """Layers to be filled, without those whose rank does not fit."""
    layers = {}
    for path, target in targets.items():
        with suppress(ConfigError, TargetError):
            layers[path] = low_rank_layer(target, config, fresh=False)
    return layers


def _told(stored: StoredAdapter, modules: Modules) -> LoRAConfig:
    """What adapter_config.json says, or the weights' own settings where it is not there."""
    own = stored.notes.lora(stored.folder)
    if stored.settings is None and own is not None:
        config = own
    else:
        config = from_peft(stored.settings or {}, _paths(stored, modules), stored.folder)
    check_patterns(config, stored.folder)
    return config


def _config(stored: StoredAdapter, own: LoRAConfig | None, told: LoRAConfig) -> LoRAConfig:
    """The settings to go by: those that the weights were saved with, else those that the file tells."""
    if own is None:
        if stored.notes.start:
            raise FormatError(f"{stored.folder}: its tailora metadata tells of a frozen start, but not of its settings")
        return told
    check_patterns(own, stored.folder)
    return own


def _check_told(stored: StoredAdapter, written: LoRAConfig, told: LoRAConfig) -> None:
    """Raises FormatError where the weights were saved with other settings than the file tells."""
    written = doubled(written) if stored.notes.start else written
    if other := [name for name in SHARED if getattr(written, name) != getattr(told, name)]:
        pairs = (f"{name} = {getattr(told, name)!r} here, {getattr(written, name)!r} there" for name in other)
        raise FormatError(
            f"{stored.folder}: adapter_config.json and the settings that the weights were saved with differ: "
            f"{', '.join(pairs)}. Save the adapter again, or delete adapter_config.json to use the weights' own"
        )


def _paths(stored: StoredAdapter, modules: Modules) -> list[str]:
    """Modules that have a factor in the file, in the model's order."""
    there = {path for key in stored.tensors for path, factor in [_factor(key)] if factor}
    return [path for path in modules if path in there]


def _sort(
    stored: StoredAdapter, modules: Modules, config: LoRAConfig, wrappers: Mapping[str, Stem], extras: Mapping[str, str]
) -> Parts:
    whole = saved_modules(modules, config)
    parts = Parts()
    for key, tensor in stored.tensors.items():
        name, factor = _factor(key)
        owner = next((path for path in whole if key.startswith(f"{path}.")), None)
        if factor and name in wrappers:
            if factor == "B" and name.endswith("base_layer.out_proj") and adds_twice(stored.settings or {}):
                tensor = 2 * tensor
            _split(wrappers[name], factor, tensor, parts, 2 if stored.notes.start else 1)
        elif factor and name in modules and layer_type_of(modules[name]):
            parts.factors.setdefault(name, {})[factor] = tensor
        elif owner is not None:
            parts.saved.setdefault(owner, {})[key.removeprefix(f"{owner}.")] = tensor
        elif key in extras:
            parts.extras[extras[key]] = tensor
        elif (base := of_the_base(key, tensor, modules))[0]:
            parts.problems += [base[1]] if base[1] else []
        else:
            parts.problems.append(f"unexpected {key} {tuple(tensor.shape)}: {_why_unexpected(name, factor, modules)}")
        if not tensor.isfinite().all():
            parts.problems.append(f"not finite: {key} {tuple(tensor.shape)}")
            parts.finite = False
    return parts


def _split(stem: Stem, factor: str, tensor: Tensor, parts: Parts, times: int) -> None:
    pieces = stem.split(factor, tensor, times)
    if pieces is None:
        parts.problems.append(
            f"misshapen lora_{factor} of {stem.name}: {tuple(tensor.shape)} is not made of the parts "
            f"{', '.join(path.rpartition('.')[2] for path in stem.members)}"
        )
    for path in stem.members:
        parts.factors.setdefault(path, {})[factor] = tensor if pieces is None else pieces[path]


def _factor(key: str) -> tuple[str, str | None]:
    """The path before the suffix and which factor it is; None where the key ends like no factor."""
    for suffix, factor in SLOT_OF.items():
        if f".{key}".endswith(suffix):
            return f".{key}".removesuffix(suffix).removeprefix("."), factor
    return key, None


def _why_unexpected(path: str, factor: str | None, modules: Modules) -> str:
    if factor is None:
        return "neither a low-rank factor nor part of modules_to_save, bias or trainable_token_indices"
    if path not in modules:
        return f"the model has no module {path}"
    return f"{type(modules[path]).__name__} has no low-rank form"


def _missing(
    parts: Parts,
    modules: Modules,
    config: LoRAConfig,
    wanted: Collection[str],
    empty: Mapping[str, LoRALayer],
    start: bool,
) -> list[str]:
    """What the settings name and the tensors lack, with the shape that the model would need."""
    problems = []
    for path in dict.fromkeys((*wanted, *parts.factors)):
        found = parts.factors.get(path, {})
        lacking = [factor for factor in "AB" if factor not in found]
        shapes = file_shapes(empty[path], start) if path in empty else {}
        problems += [f"missing lora_{factor} of {path} {shapes.get(factor, '')}".rstrip() for factor in lacking]
    whole = saved_modules(modules, config)
    return problems + [f"missing {path}, which modules_to_save names" for path in whole if path not in parts.saved]


def _low_rank(
    path: str, base_model: nn.Module, config: LoRAConfig, parts: Parts, empty: Mapping[str, LoRALayer], start: bool
) -> LoRALayer | None:
    """The layer with the file's factors; None, with the reasons added to the problems, where they do not fit.

    empty: layers made already, to be filled.
    """
    found = parts.factors[path]
    host = host_of(base_model, path)
    reason = obstacle(host) or base_obstacle(host)
    if reason or not {"A", "B"} <= found.keys():
        parts.problems += [f"{path}: {reason}"] if reason else []  # a missing factor is told already
        return None
    try:
        layer = empty.get(path) or low_rank_layer(target_at(base_model, path, config), config, fresh=False)
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
    if not wrong and (parts.finite or all(tensor.isfinite().all() for tensor in found.values())):  # told already
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
    return f"{switches[slot]} in the settings, or this {layer.layer_type.name} has no such slot"


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


def _check_base(stored: StoredAdapter, places: Mapping[str, Held], allow: bool) -> None:
    problems = differences(stored.notes.base, places)
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


# ---- An adapter of any tool, told by what its files hold.


LOOSE = "pytorch_lora_weights.safetensors"  # diffusers' name


def read_any(path: Path, base_model: nn.Module) -> StoredAdapter:
    """A PEFT folder, one of mlx-lm, of `export` to GGUF, or one safetensors file of Kohya's tools or diffusers.

    Raises FormatError for what is none of them, and for what they hold that is not LoRA.
    """
    if path.is_file():
        return kohya_diffusers.read(path, base_model)
    if (path / WEIGHTS).exists() or not path.is_dir():
        return read_adapter(path)
    if (path / mlx.WEIGHTS).is_file():
        return mlx.read(path)
    if (path / gguf.WEIGHTS).is_file():
        return gguf.read(path, base_model)
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1 or (path / LOOSE).is_file():
        return kohya_diffusers.read(path / LOOSE if (path / LOOSE).is_file() else files[0], base_model)
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:5])
        raise FormatError(f"{path} holds several files and none called {WEIGHTS}; give one of them: {names}")
    return read_adapter(path)
