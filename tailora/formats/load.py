"""Loads an adapter: recognises what tool wrote it, and restores it for a base model, or raises with all that is wrong.

read_any_format     files -> StoredAdapter
restore             StoredAdapter + base model -> Adapter: find the layers that the settings name, sort the file's
                    tensors by layer, fill them in, check the base
"""

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from tailora.core.adapter import Adapter, low_rank_layer, share_parameters, trained_copy
from tailora.core.config import LoRAConfig
from tailora.core.layer import LoRALayer
from tailora.core.layer_types import LayerType, layer_of, layer_type_of, obstacle
from tailora.core.quantization import quantized_layers, storage_obstacle
from tailora.core.targets import (
    Target,
    extra_targets,
    quantized_whole,
    saved_modules,
    selected_candidates,
    target_at,
    target_of,
)
from tailora.errors import BaseMismatchError, ConfigError, FormatError, PatternError, TargetError, listing
from tailora.formats import gguf, kohya_diffusers, mlx, peft, peft_config
from tailora.formats.fingerprint import fingerprint_differences
from tailora.formats.peft_paths import PeftLayer, peft_layers

DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
SLOT_NAMES = {"A": "lora_A", "B": "lora_B", "magnitude": "lora_magnitude_vector"}  # of others: the slot itself
WITHOUT_SLOT = {
    "magnitude": "use_dora is off",
    "lora_bias": "lora_bias is off",
    "bias": "the layer's bias is not trained",
}

Modules = Mapping[str, nn.Module]

# ---- Files of any tool -> StoredAdapter


def read_any_format(path: Path, base_model: nn.Module) -> peft.StoredAdapter:
    """Reads a folder of PEFT, of mlx-lm or of `export` to GGUF, or one safetensors file of Kohya's tools or diffusers.

    Raises FormatError if it is none of them or holds something other than LoRA.
    """
    if path.is_file():
        return kohya_diffusers.read(path, base_model)
    if (path / peft.WEIGHTS).exists() or not path.is_dir():
        return peft.read_peft_folder(path)
    if (path / mlx.WEIGHTS).is_file():
        return mlx.read(path)
    if (path / gguf.WEIGHTS).is_file():
        return gguf.read(path, base_model)
    if (path / DIFFUSERS_WEIGHTS).is_file():
        return kohya_diffusers.read(path / DIFFUSERS_WEIGHTS, base_model)
    files = sorted(path.glob("*.safetensors"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:5])
        raise FormatError(f"{path} holds several files and none called {peft.WEIGHTS}; give one of them: {names}")
    return kohya_diffusers.read(files[0], base_model) if files else peft.read_peft_folder(path)


# ---- StoredAdapter -> Adapter


@dataclass
class SortedTensors:
    """The file's tensors by what they belong to, and all problems so far.

    low_rank: path -> slot -> tensor.
    saved: path of a module of modules_to_save -> name in it -> tensor.
    extras: path -> a trained bias, or trained rows of an embedding.
    """

    low_rank: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    saved: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    extras: dict[str, Tensor] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    all_finite: bool = True


def restore(stored: peft.StoredAdapter, base_model: nn.Module, *, allow_base_mismatch: bool = False) -> Adapter:
    """Builds the adapter for `base_model` without changing the model.

    Raises FormatError with all missing, unexpected, misshapen and non-finite tensors, or for a pattern that takes too
    long, and BaseMismatchError if the adapter was made for other weights and `allow_base_mismatch` is not set.
    """
    try:
        return _restore(stored, base_model, allow_base_mismatch)
    except PatternError as error:
        raise FormatError(f"{stored.folder}: {error}") from None


def _restore(stored: peft.StoredAdapter, base_model: nn.Module, allow_base_mismatch: bool) -> Adapter:
    modules = dict(base_model.named_modules())
    with_start = stored.metadata.start
    # Which layers the settings name
    own_config = stored.metadata.lora_config(stored.folder)
    in_file = config_in_file(stored, _paths_with_factors(stored, modules))
    config = _effective_config(stored, own_config, in_file)
    targets = _targets(base_model, modules, config)
    empty = _empty_layers(targets, config)
    wrappers = peft_layers(base_model, empty)
    if config is not in_file:
        _check_same_settings(stored, peft_config.with_layer_patterns(config, wrappers.values()), in_file)
        adapted = {target.layer_path for target in targets.values()}
        file_targets = _targets(base_model, modules, in_file)
        # Layers that only adapter_config.json names, so that their tensors are reported as missing
        if additional := {path: target for path, target in file_targets.items() if target.layer_path not in adapted}:
            targets, empty = {**targets, **additional}, {**empty, **_empty_layers(additional, config)}
            wrappers = peft_layers(base_model, empty)
    # Which tensors the file has for them
    adapted_paths = {*targets, *_paths_with_factors(stored, modules)}
    extra, extra_problems = extra_targets(base_model, modules, config, adapted_paths, saved_modules(modules, config))
    tensors = _sort_tensors(stored, modules, config, wrappers, peft.extra_keys(extra))
    problems = tensors.problems
    problems += extra_problems
    problems += _missing(tensors, modules, config, targets, empty, with_start)
    # The parts, filled with these tensors
    layers = {path: _low_rank(path, base_model, config, tensors, empty, with_start) for path in tensors.low_rank}
    quantized = [path for path in tensors.saved if quantized_layers(modules[path])]
    problems += [quantized_whole(path) for path in quantized]
    copies = {path: _saved_module(path, modules, tensors) for path in tensors.saved if path not in quantized}
    extras, extra_problems = peft.load_extras(extra, modules, tensors.extras)
    problems += extra_problems
    if problems:
        raise FormatError(f"{stored.folder} does not fit this model: {listing(problems)}")
    low_rank = {path: layer for path, layer in layers.items() if layer is not None}
    if not allow_base_mismatch:
        _check_base(stored, base_model, {path: layer.layer_type for path, layer in low_rank.items()})
    _restore_learned_scales(stored, low_rank)
    share_parameters({path: modules[path] for path in copies}, copies)
    return Adapter(own_config or config, low_rank, copies, extras)


# ---- The config, and the layers that it names


def lora_config_of(stored: peft.StoredAdapter, base_model: nn.Module) -> LoRAConfig:
    """Returns the config that the adapter was made with. Raises FormatError."""
    in_file = config_in_file(stored, _paths_with_factors(stored, dict(base_model.named_modules())))
    return _effective_config(stored, stored.metadata.lora_config(stored.folder), in_file)


def config_in_file(stored: peft.StoredAdapter, paths: list[str]) -> LoRAConfig:
    """Returns the config in adapter_config.json, or in the metadata of the weights if that file is missing.

    paths: the targets if the settings name none. Raises FormatError.
    """
    own = stored.metadata.lora_config(stored.folder)
    if stored.settings is None and own is not None:
        config = own
    else:
        config = peft_config.from_peft_config(stored.settings or {}, paths, stored.folder)
    peft_config.check_patterns(config, stored.folder)
    return config


def _effective_config(stored: peft.StoredAdapter, own: LoRAConfig | None, in_file: LoRAConfig) -> LoRAConfig:
    """The config in the metadata of the weights if there is one, else that of adapter_config.json."""
    if own is None:
        if stored.metadata.start:
            raise FormatError(f"{stored.folder}: its tailora metadata names a frozen start, but has no settings")
        return in_file
    peft_config.check_patterns(own, stored.folder)
    return own


def _check_same_settings(stored: peft.StoredAdapter, own: LoRAConfig, in_file: LoRAConfig) -> None:
    """Raises FormatError if the weights were saved with other settings than adapter_config.json has."""
    own = peft_config.with_double_rank(own) if stored.metadata.start else own
    if different := [name for name in peft_config.SHARED_SETTINGS if getattr(own, name) != getattr(in_file, name)]:
        pairs = (f"{name} = {getattr(in_file, name)!r} here, {getattr(own, name)!r} there" for name in different)
        raise FormatError(
            f"{stored.folder}: adapter_config.json and the settings that the weights were saved with differ: "
            f"{', '.join(pairs)}. Save the adapter again, or delete adapter_config.json to use the weights' own"
        )


def _targets(base_model: nn.Module, modules: Modules, config: LoRAConfig) -> dict[str, Target]:
    return {path: target_of(place, config) for path, place in selected_candidates(base_model, modules, config).items()}


def _empty_layers(targets: Mapping[str, Target], config: LoRAConfig) -> dict[str, LoRALayer]:
    """Layers to be filled. Those whose rank does not fit are left out; `_low_rank` reports them."""
    layers = {}
    for path, target in targets.items():
        with suppress(ConfigError, TargetError):
            layers[path] = low_rank_layer(target, config, fresh=False)
    return layers


def _paths_with_factors(stored: peft.StoredAdapter, modules: Modules) -> list[str]:
    """Paths of the modules that have low-rank tensors in the file, in the model's order."""
    in_file = {path for key in stored.tensors for path, slot in [peft.path_and_slot(key)] if slot}
    return [path for path in modules if path in in_file]


# ---- The file's tensors


def _sort_tensors(
    stored: peft.StoredAdapter,
    modules: Modules,
    config: LoRAConfig,
    wrappers: Mapping[str, PeftLayer],
    extras: Mapping[str, str],
) -> SortedTensors:
    saved_paths = saved_modules(modules, config)
    doubled_out_proj = peft_config.adds_out_proj_twice(stored.settings or {})
    result = SortedTensors()
    for key, tensor in stored.tensors.items():
        path, slot = peft.path_and_slot(key)
        saved_path = next((saved for saved in saved_paths if key.startswith(f"{saved}.")), None)
        if slot and path in wrappers:
            if slot == "B" and path.endswith("base_layer.out_proj") and doubled_out_proj:
                tensor = 2 * tensor
            _split_into_parts(wrappers[path], slot, tensor, result, 2 if stored.metadata.start else 1)
        elif slot and path in modules and layer_type_of(modules[path]):
            result.low_rank.setdefault(path, {})[slot] = tensor
        elif saved_path is not None:
            result.saved.setdefault(saved_path, {})[key.removeprefix(f"{saved_path}.")] = tensor
        elif key in extras:
            result.extras[extras[key]] = tensor
        elif (base_weight := peft.base_weight_of(key, modules)) is not None:
            if problem := peft.base_weight_problem(key, tensor, *base_weight):
                result.problems.append(problem)
        else:
            result.problems.append(f"unexpected {key} {tuple(tensor.shape)}: {_why_unexpected(path, slot, modules)}")
        if not tensor.isfinite().all():
            result.problems.append(f"not finite: {key} {tuple(tensor.shape)}")
            result.all_finite = False
    return result


def _split_into_parts(wrapper: PeftLayer, slot: str, tensor: Tensor, result: SortedTensors, rank_factor: int) -> None:
    parts = wrapper.split(slot, tensor, rank_factor)
    if parts is None:
        names = ", ".join(path.rpartition(".")[2] for path in wrapper.layers)
        result.problems.append(
            f"misshapen lora_{slot} of {wrapper.key_prefix}: {tuple(tensor.shape)} is not made of the parts {names}"
        )
    for path in wrapper.layers:
        result.low_rank.setdefault(path, {})[slot] = tensor if parts is None else parts[path]


def _why_unexpected(path: str, slot: str | None, modules: Modules) -> str:
    if slot is None:
        return "neither a low-rank factor nor part of modules_to_save, bias or trainable_token_indices"
    if path not in modules:
        return f"the model has no module {path}"
    return f"{type(modules[path]).__name__} has no low-rank form"


def _missing(
    tensors: SortedTensors,
    modules: Modules,
    config: LoRAConfig,
    targets: Collection[str],
    empty: Mapping[str, LoRALayer],
    with_start: bool,
) -> list[str]:
    """What the settings name and the file lacks, with the shape that the model needs."""
    problems = []
    for path in dict.fromkeys((*targets, *tensors.low_rank)):
        shapes = peft.peft_shapes(empty[path], with_start) if path in empty else {}
        missing = [slot for slot in "AB" if slot not in tensors.low_rank.get(path, {})]
        problems += [f"missing lora_{slot} of {path} {shapes.get(slot, '')}".rstrip() for slot in missing]
    saved_paths = [path for path in saved_modules(modules, config) if path not in tensors.saved]
    return problems + [f"missing {path}, which modules_to_save names" for path in saved_paths]


def _low_rank(
    path: str,
    base_model: nn.Module,
    config: LoRAConfig,
    tensors: SortedTensors,
    empty: Mapping[str, LoRALayer],
    with_start: bool,
) -> LoRALayer | None:
    """The layer with the file's tensors. If they do not fit, the reasons are added to `tensors.problems`."""
    slots, problems = tensors.low_rank[path], tensors.problems
    module = layer_of(base_model, path)
    reason = obstacle(module) or storage_obstacle(module)
    if reason or not {"A", "B"} <= slots.keys():
        problems += [f"{path}: {reason}"] if reason else []  # `_missing` reports a missing factor
        return None
    try:
        layer = empty.get(path) or low_rank_layer(target_at(base_model, path, config), config, fresh=False)
    except (ConfigError, TargetError) as error:
        problems.append(f"{path}: {error}")
        return None
    wrong = _shape_problems(
        slots,
        peft.peft_shapes(layer, with_start),
        lambda slot: f"{SLOT_NAMES.get(slot, slot)} of {path}",
        lambda slot: f": {WITHOUT_SLOT[slot]} in the settings, or this {layer.layer_type.name} has no such slot",
    )
    problems += wrong
    if not wrong and (tensors.all_finite or all(tensor.isfinite().all() for tensor in slots.values())):
        try:
            peft.load_layer(layer, slots, with_start)
        except FormatError as error:
            problems.append(f"{path}: {error}")
    return layer


def _saved_module(path: str, modules: Modules, tensors: SortedTensors) -> nn.Module:
    """A copy of the module with the file's tensors. If they do not fit, the reasons are added to `tensors.problems`."""
    module, saved = trained_copy(modules[path]), tensors.saved[path]
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    problems = _shape_problems(saved, shapes, lambda name: f"{path}.{name}")
    tensors.problems += problems
    if not problems:
        module.load_state_dict(saved)
    return module


def _shape_problems(
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, peft.Shape],
    describe: Callable[[str], str],
    why_unexpected: Callable[[str], str] = lambda _: "",
) -> list[str]:
    """All that is missing, unexpected or misshapen in the file's tensors."""
    result = [f"missing {describe(name)} {shapes[name]}" for name in shapes if name not in tensors]
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        if name not in shapes:
            result.append(f"unexpected {describe(name)} {shape}{why_unexpected(name)}")
        elif shape != shapes[name]:
            result.append(f"misshapen {describe(name)}: the file has {shape}, the model needs {shapes[name]}")
    return result


# ---- What the metadata of the weights says


def _check_base(stored: peft.StoredAdapter, base_model: nn.Module, layer_types: Mapping[str, LayerType]) -> None:
    problems = fingerprint_differences(stored.metadata.base, base_model, layer_types)
    if problems:
        shown = [*problems[:5], *([f"and {len(problems) - 5} layers more"] if len(problems) > 5 else [])]
        raise BaseMismatchError(
            f"{stored.folder} was made for another base model than this one: {listing(shown)}\n"
            "Load the base that it was trained on, or pass allow_base_mismatch=True to go on."
        )


def _restore_learned_scales(stored: peft.StoredAdapter, layers: Mapping[str, LoRALayer]) -> None:
    """Takes each learned scale out of B, where the file has it for other readers, and makes it a Parameter again."""
    if unknown := stored.metadata.scaling.keys() - layers.keys():
        raise FormatError(f"{stored.folder}: a learned scale without a layer: {', '.join(sorted(unknown))}")
    for path, value in stored.metadata.scaling.items():
        layer = layers[path]
        scale = value or layer.configured_scaling  # a scale of 0 has erased B: start again
        layer.lora_B.data.mul_(layer.configured_scaling / scale)
        if layer.start_B is not None:
            layer.start_B.mul_(layer.configured_scaling / scale)
        layer.scaling = nn.Parameter(torch.full_like(layer.scaling, scale))
