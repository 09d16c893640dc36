"""Loads an adapter: recognizes its format, and restores it for a base model, or raises an error with all problems.

load                a path, or a repository of the Hub -> Adapter; by the two steps below
read_any_format     files -> StoredAdapter
restore             StoredAdapter + base model -> Adapter: finds the layers in the settings, sorts the file's tensors
                    by layer, fills the layers, checks the base
"""

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor, nn

from tailora.core.adapter import Adapter, extra_parts, low_rank_layer, share_parameters, trained_copy
from tailora.core.config import LoRAConfig
from tailora.core.extras import ExtraTargets, extra_targets, input_embedding
from tailora.core.layer import LoRALayer
from tailora.core.layer_types import EMBEDDING, Shape, layer_of, layer_type_of
from tailora.core.quantization import quantized_layers
from tailora.core.targets import (
    Target,
    missing_pooler,
    obstacle_to_adapting,
    quantized_saved_module,
    saved_modules,
    selected_candidates,
    target_at,
    target_of,
)
from tailora.errors import BaseMismatchError, ConfigError, FormatError, TargetError, listing
from tailora.formats import kohya_diffusers, mlx, peft, peft_config, peft_keys
from tailora.formats.fingerprint import LayerFingerprint, fingerprint, fingerprint_differences
from tailora.formats.fold_scale import unfold_learned_scales
from tailora.formats.hub import local_folder
from tailora.formats.peft_keys import EMBEDDING_SUFFIXES, SUFFIXES, PeftLayer, peft_layers
from tailora.formats.run_folder import ADAPTER_WEIGHTS, DIFFUSERS_WEIGHTS, GGUF_WEIGHTS, MLX_WEIGHTS

Modules = Mapping[str, nn.Module]

# ---- A path or a repository -> Adapter


class LoadOptions(TypedDict, total=False):
    """Keyword arguments of `load`."""

    revision: str | None  # branch, tag or commit of the Hub's repository
    token: str | bool | None  # for a private repository
    subfolder: str | None  # the adapter's folder in the repository
    is_trainable: bool  # False freezes its parameters
    allow_base_mismatch: bool  # loads an adapter that was made for a different base


def load(
    source: str | Path,
    base_model: nn.Module,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    subfolder: str | None = None,
    is_trainable: bool = True,
    allow_base_mismatch: bool = False,
) -> Adapter:
    """Returns the adapter in a file or folder, or otherwise in the Hub's repository "owner/name". See `LoadOptions`.

    Raises FetchError, FormatError and BaseMismatchError. The base does not change.
    """
    path = local_folder(source, revision=revision, token=token, subfolder=subfolder)
    adapter = restore(read_any_format(path, base_model), base_model, allow_base_mismatch=allow_base_mismatch)
    for part in adapter.parts.values() if not is_trainable else ():
        part.requires_grad_(False)
    return adapter


# ---- Files of any tool -> StoredAdapter


def read_any_format(path: Path, base_model: nn.Module) -> peft.StoredAdapter:
    """Reads a folder of PEFT, mlx-lm or GGUF, or a safetensors file of Kohya or diffusers. Raises FormatError."""
    if path.is_file():
        return kohya_diffusers.read(path, base_model)
    if os.path.lexists(path / ADAPTER_WEIGHTS) or not path.is_dir():
        return peft.read_peft_folder(path)
    if (path / MLX_WEIGHTS).is_file():
        return mlx.read(path)
    if (path / GGUF_WEIGHTS).is_file():
        from tailora.formats import gguf  # loaded here, since most imports of tailora read none

        return gguf.read(path, base_model)
    if (path / DIFFUSERS_WEIGHTS).is_file():
        return kohya_diffusers.read(path / DIFFUSERS_WEIGHTS, base_model)
    files = sorted(path.glob("*.safetensors"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:5])
        raise FormatError(f"{path} contains several files, but no {ADAPTER_WEIGHTS}; use one of these files: {names}")
    return kohya_diffusers.read(files[0], base_model) if files else peft.read_peft_folder(path)


# ---- StoredAdapter -> Adapter


@dataclass(frozen=True)
class Selected:
    """What the settings select in the base model."""

    config: LoRAConfig
    targets: list[str]  # paths of the low-rank layers
    empty: dict[str, LoRALayer]  # path -> layer; an impossible rank has none
    wrappers: dict[str, PeftLayer]  # by key prefix
    saved: list[str]  # paths of modules_to_save
    extras: ExtraTargets  # trained biases, and embeddings with trained rows


@dataclass(frozen=True)
class SortedTensors:
    """The file's tensors."""

    low_rank: dict[str, dict[str, Tensor]]  # path -> slot -> tensor
    saved: dict[str, dict[str, Tensor]]  # path of a module of modules_to_save -> name in it -> tensor
    extras: dict[str, Tensor]  # by key


def restore(
    stored: peft.StoredAdapter,
    base_model: nn.Module,
    *,
    allow_base_mismatch: bool = False,
    known_base: dict[str, LayerFingerprint] | None = None,
) -> Adapter:
    """Builds the adapter for `base_model` without changing the model.

    The adapter may use tensors of `stored` without a copy, so training changes them.
    known_base: a cache for the fingerprint of a base that does not change; missing entries are added.
    Raises FormatError with all missing, unexpected, misshapen and non-finite tensors, or for a pattern that takes too
    long, and BaseMismatchError if the adapter was made for different weights, unless `allow_base_mismatch` is set.
    """
    modules, problems = dict(base_model.named_modules()), list[str]()  # each step adds its problems
    if not allow_base_mismatch:
        _check_vocabulary(stored, base_model)
    selected = _select(stored, base_model, modules, problems)
    tensors = _sort_tensors(stored, modules, selected, problems)
    problems += _missing_modules(selected, tensors, base_model)
    low_rank = _low_rank_layers(stored, base_model, selected, tensors, problems)
    copies = _saved_modules(modules, tensors, problems)
    extras = _extras(modules, selected, tensors, problems)
    if problems:
        raise FormatError(f"{stored.folder} does not fit this model: {listing(problems)}")
    if not allow_base_mismatch:
        _check_base(stored, base_model, low_rank, {} if known_base is None else known_base)
    if unknown := stored.metadata.scaling.keys() - low_rank.keys():
        raise FormatError(f"{stored.folder} contains learned scales of unknown layers: {', '.join(sorted(unknown))}")
    unfold_learned_scales(stored.metadata.scaling, low_rank)
    share_parameters({path: modules[path] for path in copies}, copies)
    adapter = Adapter(selected.config, low_rank, copies, extras)
    _check_computed(adapter, stored)
    return adapter


def _select(stored: peft.StoredAdapter, base_model: nn.Module, modules: Modules, problems: list[str]) -> Selected:
    paths_in_file = _paths_with_factors(stored, modules)
    config, file_config = stored_configs(stored, paths_in_file)
    candidates = selected_candidates(base_model, modules, config)
    targets = {path: target_of(candidate, config) for path, candidate in candidates.items()}
    empty: dict[str, LoRALayer] = {}
    for path, target in targets.items():
        with suppress(ConfigError, TargetError):  # an impossible rank, which `_low_rank_layers` reports
            empty[path] = _empty_layer(target, config, stored)
    wrappers = peft_layers(base_model, empty)
    if config is not file_config:
        _check_same_settings(stored, peft_config.as_peft_computes(config, wrappers.values()), file_config)
        adapted = {*paths_in_file, *(target.layer_path for target in targets.values())}
        problems += [
            f"missing the factors of {path}, a target in adapter_config.json; save the adapter again"
            for path, candidate in selected_candidates(base_model, modules, file_config).items()
            if candidate.layer_path not in adapted
        ]
    saved = list(saved_modules(modules, config))
    if stored.metadata.saved_modules is not None:
        saved = [path for path in saved if path in stored.metadata.saved_modules]
    extras, extra_problems = extra_targets(base_model, modules, config, {*targets, *paths_in_file}, saved)
    problems += extra_problems
    return Selected(config, list(targets), empty, wrappers, saved, extras)


# ---- The config, and its layers


def lora_config_of(stored: peft.StoredAdapter, base_model: nn.Module) -> LoRAConfig:
    """Returns the config that the adapter was created with. Raises FormatError."""
    return stored_configs(stored, _paths_with_factors(stored, dict(base_model.named_modules())))[0]


def stored_configs(stored: peft.StoredAdapter, paths: list[str]) -> tuple[LoRAConfig, LoRAConfig]:
    """Returns the configs of the weights' metadata and of adapter_config.json. paths: targets if that has none."""
    saved = stored.metadata.lora_config(stored.folder)
    if saved is None and stored.metadata.start:
        raise FormatError(
            f"{stored.folder}: its tailora metadata has a frozen start but no settings; save or copy the adapter again"
        )
    if saved is not None and stored.settings is None:
        file_config = saved
    else:
        file_config = peft_config.from_peft_config(stored.settings or {}, paths, stored.folder)
    configs = saved or file_config, file_config
    for config in configs:
        peft_config.check_patterns(config, stored.folder)
    return configs


def _check_same_settings(stored: peft.StoredAdapter, saved: LoRAConfig, in_file: LoRAConfig) -> None:
    """Raises FormatError if the weights were saved with settings that differ from adapter_config.json."""
    saved = peft_config.with_double_rank(saved) if stored.metadata.start else saved
    if different := [name for name in peft_config.SHARED_SETTINGS if getattr(saved, name) != getattr(in_file, name)]:
        pairs = (f"{name} = {getattr(in_file, name)!r}, not {getattr(saved, name)!r}" for name in different)
        raise FormatError(
            f"{stored.folder}: adapter_config.json differs from the settings that the weights were saved with: "
            f"{'; '.join(pairs)}. Save the adapter again, or delete adapter_config.json to use the weights' settings"
        )


def _empty_layer(target: Target, config: LoRAConfig, stored: peft.StoredAdapter) -> LoRALayer:
    """Raises ConfigError for a rank that no tensor in the file can have, since it could exhaust the memory."""
    if target.r > stored.largest_size:
        most = f"{stored.largest_size}, the largest dimension of any tensor in the file"
        raise ConfigError(f"r = {target.r} in the settings exceeds {most}; correct it, or save the adapter again")
    return low_rank_layer(target, config, fresh=False)


def _paths_with_factors(stored: peft.StoredAdapter, modules: Modules) -> list[str]:
    """Returns the paths of the modules that have low-rank tensors in the file, in the model's order."""
    in_file = {path for key in stored.tensors for path, slot in [peft_keys.path_and_slot(key)] if slot}
    return [path for path in modules if path in in_file]


# ---- The file's tensors


def _sort_tensors(
    stored: peft.StoredAdapter, modules: Modules, selected: Selected, problems: list[str]
) -> SortedTensors:
    doubled_out_proj = peft_config.adds_out_proj_twice(stored.settings or {})
    low_rank, saved = defaultdict[str, dict[str, Tensor]](dict), defaultdict[str, dict[str, Tensor]](dict)
    extras, extra_keys = dict[str, Tensor](), peft_keys.extra_keys(selected.extras)
    problems += [f"not finite: {key} {tuple(stored.tensors[key].shape)}" for key in not_finite(stored.tensors)]
    for key, tensor in peft_keys.without_second_copies(stored.tensors).items():
        path, slot = peft_keys.path_and_slot(key)
        saved_path = peft_keys.saved_path_of(key, selected.saved, modules)
        if slot and path in selected.wrappers:
            wrapper = selected.wrappers[path]
            if slot == "B" and path.endswith("base_layer.out_proj") and doubled_out_proj:
                tensor = 2 * tensor
            parts = wrapper.split(slot, tensor, 2 if stored.metadata.start else 1)
            if parts is None:
                names = ", ".join(part_path.rpartition(".")[2] for part_path in wrapper.layers)
                problems.append(f"wrong shape of {key}: {tuple(tensor.shape)} cannot be split into {names}")
                parts = dict.fromkeys(wrapper.layers, tensor)
            for part_path, part in parts.items():
                low_rank[part_path][slot] = part
        elif slot and path in modules and layer_type_of(modules[path]):
            low_rank[path][slot] = tensor
        elif saved_path is not None:
            saved[saved_path][key.removeprefix(f"{saved_path}.")] = tensor
        elif key in extra_keys:
            extras[key] = tensor
        elif (base_weight := peft_keys.base_weight_of(key, modules)) is not None:
            if problem := peft_keys.base_weight_problem(key, tensor, *base_weight):
                problems.append(problem)
        else:
            problems.append(
                f"unexpected {key} {tuple(tensor.shape)}: the model has no module for it, or the settings exclude it"
            )
        if saved_path is None and not tensor.is_floating_point():
            problems.append(f"expected floats in {key} {tuple(tensor.shape)}, got {tensor.dtype}")
    return SortedTensors(low_rank, saved, extras)


def _missing_modules(selected: Selected, tensors: SortedTensors, base_model: nn.Module) -> list[str]:
    in_settings = [path for path in selected.saved if path not in tensors.saved]
    in_neither = [path for path in missing_pooler(base_model) if path not in {*tensors.saved, *selected.saved}]
    return [f"missing {path}, which is in modules_to_save; save the adapter again" for path in in_settings] + [
        f"missing {path}, which the base model's files lack as well, so its weights are random; use the base model "
        "that the adapter was trained on"
        for path in in_neither
    ]


# ---- The parts, filled with the tensors


def _low_rank_layers(
    stored: peft.StoredAdapter, base_model: nn.Module, selected: Selected, tensors: SortedTensors, problems: list[str]
) -> dict[str, LoRALayer]:
    layers = {}
    for path in dict.fromkeys((*tensors.low_rank, *selected.targets)):
        try:
            if reason := obstacle_to_adapting(layer_of(base_model, path)):
                raise TargetError(reason)
            layer = selected.empty.get(path)
            layer = layer or _empty_layer(target_at(base_model, path, selected.config), selected.config, stored)
            problems += _fill_layer(path, layer, tensors.low_rank.get(path, {}), with_start=stored.metadata.start)
            layers[path] = layer
        except (ConfigError, TargetError, FormatError) as error:
            problems.append(f"{path}: {error}")
    return layers


def _fill_layer(path: str, layer: LoRALayer, slots: Mapping[str, Tensor], *, with_start: bool) -> list[str]:
    """Returns the problems of tensors that do not fit. Raises FormatError if no weight can represent them."""
    suffixes = EMBEDDING_SUFFIXES if layer.layer_type is EMBEDDING else SUFFIXES
    needed = {path + suffixes[slot]: shape for slot, shape in peft.slot_shapes(layer, with_start).items()}
    problems = _shape_problems({path + suffixes[slot]: tensor for slot, tensor in slots.items()}, needed)
    if not problems:
        peft.load_layer(layer, slots, with_start)
    return problems


def _saved_modules(modules: Modules, tensors: SortedTensors, problems: list[str]) -> dict[str, nn.Module]:
    """Returns copies of modules_to_save with the file's tensors."""
    quantized = [path for path in tensors.saved if quantized_layers(modules[path])]
    problems += [quantized_saved_module(path) for path in quantized]
    copies = {path: trained_copy(modules[path]) for path in tensors.saved if path not in quantized}
    for path, module in copies.items():
        needed = {f"{path}.{name}": tensor.shape for name, tensor in module.state_dict().items()}
        wrong = _shape_problems({f"{path}.{name}": tensor for name, tensor in tensors.saved[path].items()}, needed)
        problems += wrong
        if not wrong:
            module.load_state_dict(tensors.saved[path])
    return copies


def _extras(modules: Modules, selected: Selected, tensors: SortedTensors, problems: list[str]) -> dict[str, nn.Module]:
    """Returns trained biases, and trained rows of embeddings."""
    extras = extra_parts(selected.extras, modules)
    keys = peft_keys.extra_keys(selected.extras)
    parameters = {key: next(extras[path].parameters()) for key, path in keys.items()}
    wrong = _shape_problems(tensors.extras, {key: parameter.shape for key, parameter in parameters.items()})
    problems += wrong
    for key, parameter in parameters.items() if not wrong else ():
        parameter.data.copy_(tensors.extras[key])
    return extras


def _shape_problems(in_file: Mapping[str, Tensor], needed: Mapping[str, Shape]) -> list[str]:
    """Returns messages for all tensors that are missing, unexpected or misshapen."""
    result = [f"missing {name} {tuple(shape)}" for name, shape in needed.items() if name not in in_file]
    for name, tensor in in_file.items():
        shape = tuple(tensor.shape)
        if name not in needed:
            result.append(f"unexpected {name} {shape}: the settings exclude it, or the layer has none")
        elif shape != needed[name]:
            result.append(f"wrong shape of {name}: expected {tuple(needed[name])}, got {shape}")
    return result


def named_tensors(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields parameters and buffers, as `named_parameters` and `named_buffers` do, which take three times as long."""
    for path, module in part.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield f"{path}.{name}" if path else name, tensor


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Returns the names of tensors with NaN or infinity. Checks sums first, which takes a tenth of the time."""
    sums: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors.values():
        if tensor.is_floating_point() or tensor.is_complex():
            sums.setdefault(tensor.device, []).append(tensor.detach().sum())
    if all(bool(torch.stack(of_device).isfinite().all()) for of_device in sums.values()):
        return []
    return [name for name, tensor in tensors.items() if not tensor.isfinite().all()]


def _check_computed(adapter: Adapter, stored: peft.StoredAdapter) -> None:
    """Raises FormatError for tensors that became infinite in the adapter's dtype. The file's tensors were checked."""
    addresses = {tensor.data_ptr() for tensor in stored.tensors.values()}
    computed = {
        f"{name} of {path}": tensor
        for path, part in adapter.parts.items()
        for name, tensor in named_tensors(part)
        if tensor.data_ptr() not in addresses
    }
    if overflown := [f"not finite in {computed[name].dtype}: {name}" for name in not_finite(computed)]:
        raise FormatError(f"{stored.folder} does not fit this model: {listing(overflown)}")


# ---- The base in the metadata


def _check_vocabulary(stored: peft.StoredAdapter, base_model: nn.Module) -> None:
    path, embedding = input_embedding(base_model) or ("", None)
    if embedding is None:
        return
    # Files of other tools may contain the full embedding
    saved = (stored.tensors.get(f"{path}{ending}.weight") for ending in peft_keys.BASE_MODULES)
    sizes = [len(weight) for weight in saved if weight is not None and weight.ndim]
    before, now = stored.metadata.vocabulary or next(iter(sizes), None), embedding.num_embeddings
    if before not in (None, now):
        raise BaseMismatchError(
            f"{stored.folder} expects a vocabulary of {before} tokens (rows of {path}), got a base model with {now}. "
            f"Call resize_token_embeddings({before}) on it and copy the new rows from the base that the adapter was "
            "trained on, or pass allow_base_mismatch=True to load it anyway."
        )


def _check_base(
    stored: peft.StoredAdapter,
    base_model: nn.Module,
    layers: Mapping[str, LoRALayer],
    known_base: dict[str, LayerFingerprint],
) -> None:
    expected = stored.metadata.base
    layer_types = {path: layer.layer_type for path, layer in layers.items() if path in expected}
    # in the same order on every rank: the shards of a layer are gathered together
    unknown = {path: layer_type for path, layer_type in layer_types.items() if path not in known_base}
    known_base |= fingerprint(base_model, unknown)
    if problems := fingerprint_differences(expected, {path: known_base[path] for path in layer_types}):
        raise BaseMismatchError(
            f"{stored.folder} was trained on a different base model: {listing(problems, most=5)}\n"
            "Load that base model, or pass allow_base_mismatch=True to load the adapter anyway."
        )
