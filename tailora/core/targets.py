"""`select` finds the layers of a LoRAConfig. A name that matches nothing is an error; all errors are raised at once.

Fit              completes the config of a new adapter: heads to train in full, and ranks that fit
Candidates       all matrices of the model that could be adapted: layers, parts of fused layers, parameters
Selection        the result of target_modules, target_parameters, exclude_modules and layers_to_transform: Targets
                 with their rank and alpha; and the modules_to_save
Problems         messages about settings that match nothing, conflict with each other or cannot be applied
"""

import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor, nn

from tailora.core import patterns
from tailora.core.config import ALL_LAYERS, LANGUAGE_MODEL, LoRAConfig
from tailora.core.extras import ExtraTargets, Modules, extra_targets
from tailora.core.fused_layers import OutputSlice, layout_of, output_slices
from tailora.core.layer_calls import Use, last_names, use_of
from tailora.core.layer_types import EMBEDDING, LayerType, forward_obstacle, layer_path_of, layer_type_of, obstacle
from tailora.core.model_parts import language_model_path
from tailora.core.parameters import parameter_layer_type, projections
from tailora.core.quantization import (
    dense_weight,
    gradient_problems,
    is_quantized,
    packed_layers,
    quantized_layers,
    storage_obstacle,
)
from tailora.errors import ConfigError, TailoraWarning, TargetError, listing, nearest


@dataclass(frozen=True)
class TargetCandidate:
    """One matrix of the model that could be adapted.

    layer, layer_path: the module that uses the matrix, and its path.
    parameter_path: for a layer selected by `target_parameters`, the path of its weight, for names and patterns.
    """

    path: str  # of the matrix: the layer's own, or one name longer for a part of it (`c_attn.q`, `experts.down_proj`)
    layer_path: str
    layer: nn.Module
    layer_type: LayerType
    output_slice: OutputSlice | None = None  # outputs of a part of a fused layer
    parameter_path: str | None = None
    use: Use = "called"  # whether the parent module calls the layer, or only reads its weight

    @property
    def pattern_names(self) -> tuple[str, ...]:
        """The paths for patterns of rank or alpha. For a part of a layer, also the layer's path."""
        if self.layer_type.is_stacked or self.parameter_path:
            return (self.parameter_path or self.path,)
        return tuple(dict.fromkeys((self.path, self.layer_path)))

    @property
    def names(self) -> tuple[str, ...]:
        """The paths that select it. An attention's path also selects its projections, as in PEFT."""
        return (self.path,) if self.output_slice else self.pattern_names

    @property
    def last_name(self) -> str:
        """The last name of its path; the last two for a part of a layer."""
        return ".".join(self.path.split(".")[-1 if self.path == self.layer_path else -2 :])

    @property
    def dims(self) -> tuple[int, int]:
        """(in, out)."""
        in_features, out_features = self.layer_type.dims(self.layer)
        return in_features, self.output_slice.size if self.output_slice else out_features

    @property
    def weight(self) -> Tensor:
        """The dequantized weight of the layer, also for a part of it."""
        return dense_weight(self.layer, self.layer_type.weight_name)

    def matrix(self, weight: Tensor) -> Tensor | None:
        """Returns W of the equation, (groups, out/groups, n), from the layer's weight; None if it is not a matrix."""
        if not self.layer_type.has_matrix:
            return None
        W = self.layer_type.matrix(self.layer, weight)
        return W if self.output_slice is None else self.output_slice.take(W.mT).mT


@dataclass(frozen=True, kw_only=True)
class Target(TargetCandidate):
    """A selected candidate with its rank and alpha."""

    r: int
    lora_alpha: float


@dataclass(frozen=True)
class Selection:
    """Everything a config selects in a model. to_save: path -> module to train in full."""

    config: LoRAConfig
    targets: list[Target]
    to_save: dict[str, nn.Module]
    extras: ExtraTargets
    modules: Modules


def select(model: nn.Module, config: LoRAConfig, *, fit: bool = False) -> Selection:
    """Returns what `config` selects, targets in the model's order. Raises TargetError with all problems.

    fit: complete the config first, by `with_heads` and `with_fitting_ranks`.
    """
    modules = dict(model.named_modules())
    config = with_heads(model, config) if fit else config
    candidates = module_candidates(modules, config)
    selected = selected_candidates(model, modules, config, candidates)
    config = with_fitting_ranks(selected, config) if fit else config
    targets = [target_of(candidate, config) for candidate in selected.values()]
    to_save = saved_modules(modules, config)
    extras, extra_problems = extra_targets(model, modules, config, selected, to_save)
    problems = [
        *_unmatched_settings(candidates, selected, modules, config),
        *_conflicts(candidates, selected, to_save, config),
        *_target_problems(targets, config),
        *extra_problems,
    ]
    if not selected and not problems:
        problems.append(_nothing_selected(candidates, config))
    if problems:
        raise TargetError(listing(problems))
    return Selection(config, targets, to_save, extras, modules)


# ---- Completing a config for a model: heads to train in full, and ranks that fit

HAS_TASK_HEAD = re.compile(r"For\w*(Classification|QuestionAnswering|MultipleChoice|XVector)")

# Names of the heads that PEFT's class for the task expects in the file
HEADS_OF_TASK = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def with_heads(model: nn.Module, config: LoRAConfig) -> LoRAConfig:
    """Adds `task_heads` to modules_to_save if it is not set with ALL_LAYERS, or for a task_type with heads (PEFT)."""
    if not isinstance(config, LoRAConfig):
        raise ConfigError(f"expected a LoRAConfig, such as LoRAConfig(r=16), got {type(config).__name__}")
    is_open = config.target_modules in ALL_LAYERS and config.modules_to_save is None
    heads = task_heads(model) if is_open or config.task_type in HEADS_OF_TASK else []
    missing = [head for head in heads if head not in (config.modules_to_save or [])]
    return config.replaced(modules_to_save=[*(config.modules_to_save or []), *missing]) if missing else config


def with_fitting_ranks(selected: Mapping[str, TargetCandidate], config: LoRAConfig) -> LoRAConfig:
    """Lowers ranks to the smaller side of layers that a word or a regular expression selects, at the same scale.

    If r is too large for every layer, it stays, and `select` raises an error.
    """
    if not isinstance(config.target_modules, str):
        return config
    candidates = {path: c for path, c in selected.items() if not (c.layer_type.is_stacked or c.parameter_path)}
    lowered = {
        path: min(candidate.dims)
        for path, candidate in candidates.items()
        if config.r > min(candidate.dims)
        and patterns.by_pattern(candidate.pattern_names, config.rank_pattern, None) is None
    }
    was_set = "r" in config.model_fields_set
    if not lowered or (was_set and len(lowered) == len(candidates)):
        return config
    ranks = {patterns.exactly(path): r for path, r in lowered.items()}
    alphas = {
        patterns.exactly(path): config.alpha_at_rank(target_of(candidates[path], config).lora_alpha, config.r, r)
        for path, r in lowered.items()
    }
    if was_set:
        shown = ", ".join([f"{path} ({r})" for path, r in lowered.items()][:5])
        warnings.warn(
            f"r = {config.r} exceeds the smaller dimension of some layers ({len(lowered)}), which get a lower rank at "
            f"the same scale (see rank_pattern and alpha_pattern in the adapter's config): {shown}",
            TailoraWarning,
            stacklevel=4,
        )
    return config.replaced(rank_pattern=ranks | config.rank_pattern, alpha_pattern=alphas | config.alpha_pattern)


def task_heads(model: nn.Module) -> list[str]:
    """Returns the names of the untrained heads that transformers adds for a task: `classifier`, `score`, ...

    If the base model is not a single module (CLIP, T5), these are the model's direct linear layers. Names that also
    match modules of the base model are omitted, because PEFT would select all of them. A pooler that is missing in the
    model's files is one of the heads (`set_missing_pooler`).
    """
    if not HAS_TASK_HEAD.search(type(model).__name__):
        return []
    base_model = getattr(model, getattr(model, "base_model_prefix", ""), None)  # transformers' convention
    heads = [
        name
        for name, module in model.named_children()
        if module is not base_model and (base_model is not None or isinstance(module, nn.Linear))
        if next(module.parameters(), None) is not None and not quantized_layers(module)
    ]
    others = [path for path, _ in model.named_modules() if not any(patterns.inside(path, head) for head in heads)]
    unique = [head for head in heads if not any(path.endswith(head) for path in others)]
    return [*missing_pooler(model), *unique]


def set_missing_pooler(model: nn.Module, missing: Collection[str]) -> None:
    """Makes the base model's pooler one of the `task_heads` if all its parameters are `missing` in the files."""
    path = f"{getattr(model, 'base_model_prefix', '')}.pooler"
    names = [name for name, _ in model.named_parameters() if patterns.inside(name, path)]
    if names and set(names) <= set(missing):
        cast(Any, model).missing_pooler = path


def missing_pooler(model: nn.Module) -> list[str]:
    """Returns the path of the pooler that is missing in the model's files, in a list; [] for other models."""
    path = getattr(model, "missing_pooler", None)
    return [path] if isinstance(path, str) else []


# ---- Candidates


def module_candidates(modules: Modules, config: LoRAConfig) -> dict[str, TargetCandidate]:
    """Returns candidates for `target_modules` by path. Raises TargetError for `fused_parts` that do not fit."""
    candidates: dict[str, TargetCandidate] = {}
    for path, module in modules.items():
        parent = modules.get(path.rpartition(".")[0], module)
        candidates |= {candidate.path: candidate for candidate in _of_module(path, module, parent, config)}
    return candidates


def parameter_candidates(modules: Modules) -> dict[str, TargetCandidate]:
    """Returns candidates for `target_parameters` by path: matrices, stacks of them, weights of linear layers."""
    candidates: dict[str, TargetCandidate] = {}
    for path, module in modules.items():
        candidates |= {candidate.path: candidate for candidate in _parameters_of(path, module)}
        layer = _layer_candidate(path, module, modules.get(path.rpartition(".")[0], module))
        if layer and layer.layer_type.is_linear and not layer.layer_type.is_transposed(module):
            weight_path = f"{path}.weight"
            candidates[weight_path] = replace(layer, parameter_path=weight_path)
    return candidates


def target_at(model: nn.Module, path: str, config: LoRAConfig) -> Target:
    """Returns the target at this path without searching the model. Raises TargetError if there can be none."""
    layer_path = layer_path_of(model, path)
    module, parent = model.get_submodule(layer_path), model.get_submodule(layer_path.rpartition(".")[0])
    for candidate in (*_of_module(layer_path, module, parent, config), *_parameters_of(layer_path, module)):
        if candidate.path == path:
            return target_of(candidate, config)
    raise TargetError(f"{path} cannot be adapted: a {type(module).__name__} has no low-rank update there")


def _of_module(path: str, module: nn.Module, parent: nn.Module, config: LoRAConfig) -> Iterator[TargetCandidate]:
    """Yields the projections of an attention, or a layer and its parts (from `fused_parts` or a known class)."""
    for name, projection in projections(module).items():
        yield TargetCandidate(f"{path}.{name}" if path else name, path, module, projection)
    layer = _layer_candidate(path, module, parent)
    if layer is None:
        return
    yield layer
    if not layer.layer_type.is_linear or not path:
        return
    _, out_features = layer.dims
    configured = patterns.by_pattern(path, config.fused_parts, None)
    layout = layout_of(parent, path.rpartition(".")[2], out_features) if configured is None else configured
    try:
        slices = output_slices(layout, out_features) if layout else {}
    except ValueError as error:
        raise TargetError(f"fused_parts: {path}: {error}; correct the sizes, or remove fused_parts") from None
    for part, output_slice in slices.items():
        yield replace(layer, path=f"{path}.{part}", output_slice=output_slice)


def _layer_candidate(path: str, module: nn.Module, parent: nn.Module) -> TargetCandidate | None:
    """Returns the module as a candidate; None for a module without layer type or the projection of an attention."""
    layer_type = layer_type_of(module)
    if layer_type is None or (parent is not module and projections(parent)):
        return None
    return TargetCandidate(path, path, module, layer_type, use=use_of(parent, path.rpartition(".")[2]))


def _parameters_of(path: str, module: nn.Module) -> Iterator[TargetCandidate]:
    if path and not layer_type_of(module) and not projections(module):
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim in (2, 3):
                yield TargetCandidate(f"{path}.{name}", path, module, parameter_layer_type(name))


# ---- Selection


def selected_candidates(
    model: nn.Module, modules: Modules, config: LoRAConfig, candidates: Mapping[str, TargetCandidate] | None = None
) -> dict[str, TargetCandidate]:
    """Returns the candidates that the config selects, by path. Names that match nothing are not an error here.

    As in PEFT, modules in `modules_to_save` and everything inside them are excluded: `target_modules=["dense"]` with
    `modules_to_save=["classifier"]` does not select `classifier.dense`.
    """
    saved = saved_modules(modules, config)
    candidates = module_candidates(modules, config) if candidates is None else candidates
    if config.target_modules in ALL_LAYERS:
        path = language_model_path(model) if config.target_modules == LANGUAGE_MODEL else ""
        linear = _all_linear(model, candidates)
        selected = [candidate for candidate in linear if not path or patterns.inside(candidate.path, path)]
    else:
        names = config.target_modules
        selector = names if isinstance(names, str) else frozenset(names)  # there may be thousands
        selected = [candidate for candidate in candidates.values() if _selects(selector, candidate)]
    whole_layers = {candidate.path for candidate in selected if not candidate.output_slice}
    selected = [  # a whole layer contains its parts
        candidate for candidate in selected if not (candidate.output_slice and candidate.layer_path in whole_layers)
    ]
    parameter_names = config.target_parameters or []
    selected_layers = {candidate.path for candidate in selected}
    for path, candidate in parameter_candidates(modules).items() if parameter_names else ():
        if candidate.path not in selected_layers and any(patterns.named(name, path) for name in parameter_names):
            selected.append(candidate)
    if config.exclude_modules is not None:
        selected = list(_without(config.exclude_modules, selected, candidates))
    selected = [
        candidate for candidate in selected if not any(patterns.inside(candidate.layer_path, path) for path in saved)
    ]
    if (indices := config.layer_indices) is not None:
        numbers = patterns.layer_numbers([candidate.path for candidate in selected], config.layers_patterns)
        in_full = config.target_modules if isinstance(config.target_modules, list) else []
        selected = [
            candidate for candidate in selected if numbers[candidate.path] in indices or candidate.path in in_full
        ]
    return {candidate.path: candidate for candidate in selected}


def _selects(selector: patterns.Selector, candidate: TargetCandidate) -> bool:
    return any(patterns.matches(selector, name) for name in candidate.names)


def _all_linear(model: Any, candidates: Mapping[str, TargetCandidate]) -> list[TargetCandidate]:
    """Returns all linear layers and attention projections except the output head and layers that are not called."""
    get_head = getattr(model, "get_output_embeddings", None)  # transformers' convention
    head = get_head() if callable(get_head) else None
    return [
        candidate
        for candidate in candidates.values()
        if (candidate.layer_type.is_linear or candidate.path != candidate.layer_path)
        and not candidate.output_slice
        and candidate.layer is not head
        and candidate.use == "called"
        and _forward_obstacle(candidate.layer) is None
    ]


def _without(
    selector: patterns.Selector, selected: Iterable[TargetCandidate], candidates: Mapping[str, TargetCandidate]
) -> Iterator[TargetCandidate]:
    """Removes what the selector matches. If it matches parts of a selected layer, the other parts remain."""
    parts: dict[str, list[TargetCandidate]] = {}
    for candidate in candidates.values():
        if candidate.output_slice:
            parts.setdefault(candidate.layer_path, []).append(candidate)
    for candidate in selected:
        if not _selects(selector, candidate):
            own_parts = [] if candidate.output_slice else parts.get(candidate.path, [])
            remaining = [part for part in own_parts if not _selects(selector, part)]
            yield from [candidate] if len(remaining) == len(own_parts) else remaining


def target_of(candidate: TargetCandidate, config: LoRAConfig) -> Target:
    r = patterns.by_pattern(candidate.pattern_names, config.rank_pattern, config.r)
    alpha = patterns.by_pattern(candidate.pattern_names, config.alpha_pattern, config.lora_alpha)
    return Target(**vars(candidate), r=r, lora_alpha=alpha)


def saved_modules(modules: Modules, config: LoRAConfig) -> dict[str, nn.Module]:
    names = config.modules_to_save or []
    return {path: module for path, module in modules.items() if any(patterns.ends_with(name, path) for name in names)}


# ---- Problems: names, indices and patterns that match nothing


def _unmatched_settings(
    candidates: Mapping[str, TargetCandidate],
    selected: Mapping[str, TargetCandidate],
    modules: Modules,
    config: LoRAConfig,
) -> list[str]:
    problems = []
    if config.target_modules not in ALL_LAYERS and not (config.target_modules == [] and config.target_parameters):
        problems += _unmatched("target_modules", config.target_modules, candidates, modules)
    parameters = parameter_candidates(modules) if config.target_parameters is not None else {}
    if config.exclude_modules is not None:
        problems += _unmatched("exclude_modules", config.exclude_modules, {**candidates, **parameters}, modules)
    if config.target_parameters is not None:
        problems += _unmatched("target_parameters", config.target_parameters, parameters, modules)
    paths = [path for path in modules if path]
    problems += [
        _no_layer("modules_to_save", name, paths)
        for name in config.modules_to_save or []
        if not any(patterns.ends_with(name, path) for path in paths)
    ]
    numbers = patterns.layer_numbers(candidates, config.layers_patterns).values()
    indices = {number for number in numbers if number is not None}
    if missing := sorted((config.layer_indices or set()) - indices):
        existing = f"{min(indices)}..{max(indices)}" if indices else "none"
        problems.append(f"layers_to_transform={missing}: no layers with these indices; the model has {existing}")
    for setting, layers in (("rank_pattern", selected), ("alpha_pattern", selected), ("fused_parts", candidates)):
        last_names = {layer.last_name for layer in layers.values()}
        names = {name for layer in layers.values() for name in layer.pattern_names}
        for pattern in getattr(config, setting):
            if not any(patterns.pattern_matches(pattern, name) for name in names):
                hint = _hint(pattern, last_names | set(layers), last_names)
                problems.append(f"{setting}: {pattern!r} matches no adapted layer{hint}")
    return problems


def _unmatched(
    setting: str, selector: patterns.Selector, candidates: Mapping[str, TargetCandidate], modules: Modules
) -> list[str]:
    if selector == []:
        return [f"{setting}={selector!r} is empty; add names, or remove it"]
    if isinstance(selector, str):
        if any(_selects(selector, candidate) for candidate in candidates.values()):
            return []
        hint = _hint(selector, {candidate.last_name for candidate in candidates.values()})
        return [f"{setting}={selector!r} is a regular expression that matches no full path of a layer{hint}"]
    ends = {end for candidate in candidates.values() for name in candidate.names for end in patterns.ends_of(name)}
    return [_unmatched_name(setting, name, candidates, modules) for name in selector if name not in ends]


def _unmatched_name(setting: str, name: str, candidates: Mapping[str, TargetCandidate], modules: Modules) -> str:
    named = [path for path in modules if path and patterns.named(name, path)]
    if named and layer_type_of(modules[named[0]]) is None and setting != "target_parameters":
        blocks, class_name = tuple(f"{path}." for path in named), type(modules[named[0]]).__name__
        inner = {layer.last_name for path, layer in candidates.items() if path.startswith(blocks)}
        shown = ", ".join(sorted(inner)[:8]) or "none"
        return f"{setting}: {name!r} is a {class_name}, which cannot be adapted itself; layers inside it: {shown}"
    layer_name, _, part = name.rpartition(".")
    layers = [path for path in candidates if layer_name and patterns.named(layer_name, path)]
    if layers and not any(layer.output_slice and layer.layer_path == layers[0] for layer in candidates.values()):
        sizes = f'{{"{layer_name}": {{"{part}": its number of rows, ...}}}}'
        return (
            f"{setting}: {name!r}: it is unknown which rows of {layer_name} belong to {part}; set fused_parts={sizes}"
        )
    return _no_layer(setting, name, candidates)


def _nothing_selected(candidates: Mapping[str, TargetCandidate], config: LoRAConfig) -> str:
    """Returns a message about settings that match something each, but select nothing together."""
    names = ("target_modules", "exclude_modules", "layers_to_transform", "modules_to_save")
    settings = [f"{name}={value!r}" for name in names if (value := getattr(config, name)) is not None]
    hint = _hint("", {candidate.last_name for candidate in candidates.values()})
    reasons = {reason: None for layer in candidates.values() if (reason := obstacle_to_adapting(layer.layer))}
    return "; ".join([f"no layer left to adapt with {' and '.join(settings)}{hint}", *reasons])


def _no_layer(setting: str, name: str, paths: Collection[str]) -> str:
    last_names = {path.rpartition(".")[2] for path in paths}
    ends = {".".join(path.split(".")[-2:]) for path in paths}
    return f"{setting}: {name!r} matches no layer{_hint(name, last_names | ends | set(paths), last_names)}"


def _hint(name: str, names: Collection[str], examples: Iterable[str] | None = None) -> str:
    """Returns the `names` most similar to `name`, or if there are none, some `examples` (default: of the names)."""
    examples = sorted(set(names if examples is None else examples))
    if not examples:
        return "; the model has none"
    return nearest(name, names) or f"; existing: {', '.join(examples[:8])}{', ...' if len(examples) > 8 else ''}"


# ---- Problems: layers that cannot be adapted with this config


def _conflicts(
    candidates: Mapping[str, TargetCandidate],
    selected: Mapping[str, TargetCandidate],
    to_save: Modules,
    config: LoRAConfig,
) -> list[str]:
    """Returns problems with layers that cannot be adapted or trained in full, or are selected for both."""
    problems = []
    for path, candidate in selected.items():
        if config.lora_dropout and not candidate.layer_type.supports_dropout:
            problems.append(
                f"{path}: lora_dropout is not supported for a weight that is used without a layer; set lora_dropout=0"
            )
        elif candidate.use != "read" and (reason := obstacle_to_adapting(candidate.layer)):
            problems.append(f"{path}: {reason}")
    problems += gradient_problems(packed_layers({path: target.layer for path, target in selected.items()}))
    if only_read := [path for path, candidate in selected.items() if candidate.use == "read"]:
        problems.append(
            f"these layers are never called; the model only reads their weights: {', '.join(only_read[:5])} "
            f"({len(only_read)} in total). Adapters there would have no effect. Use "
            f"exclude_modules={last_names(only_read)}"
        )
    for name in config.target_modules if to_save and isinstance(config.target_modules, list) else []:
        named = [layer for layer in candidates.values() if any(patterns.named(name, own) for own in layer.names)]
        owners = [next((path for path in to_save if patterns.inside(layer.layer_path, path)), None) for layer in named]
        if None not in owners:  # the name matches no other layer
            problems += [
                f"{layer.path} is in both target_modules and modules_to_save ({owner}); remove it from one of them"
                for layer, owner in zip(named, owners, strict=True)
            ]
    for path, module in to_save.items():
        if "forward" in vars(module):
            problems.append(f"{path} cannot be trained in full, because its forward was replaced on the instance")
        if quantized_layers(module):
            problems.append(quantized_saved_module(path))
    return problems


def obstacle_to_adapting(layer: nn.Module) -> str | None:
    """Returns why a layer that the config selects cannot be adapted; None if it can."""
    return obstacle(layer) or storage_obstacle(layer) or _forward_obstacle(layer)


def _forward_obstacle(layer: nn.Module) -> str | None:
    return None if is_quantized(layer) else forward_obstacle(layer)


def quantized_saved_module(path: str) -> str:
    return f"{path} is quantized and cannot be trained in full; adapt it (target_modules), or do not quantize the base"


def _target_problems(targets: Sequence[Target], config: LoRAConfig) -> list[str]:
    """Returns problems with too large ranks, and with biases or DoRA on layers that do not support them."""
    problems = []
    biases = [name for name, is_on in (("lora_bias", config.lora_bias), ("bias", config.bias != "none")) if is_on]
    ranks: dict[str, set[int]] = {}  # path of an attention -> ranks of its matrices
    none_has_room = len(targets) > 1 and all(target.r == config.r > min(target.dims) for target in targets)
    if none_has_room:
        largest = max(min(target.dims) for target in targets)
        problems.append(f"r = {config.r} is too large for every layer; use at most {largest}")
    for target in targets:
        path, (in_features, out_features) = target.path, target.dims
        if not none_has_room and target.r > (limit := min(target.dims)):
            problems.append(
                f"{path}: r = {target.r} is too large for a matrix of {in_features} -> {out_features}; use 1..{limit} "
                f"(rank_pattern={{{target.last_name!r}: {limit}}}), or train it in full (modules_to_save)"
            )
        if "in_proj_weight" in projections(target.layer):
            ranks.setdefault(target.layer_path, set()).add(target.r)
        if biases and (target.output_slice or target.layer_type.replaces_forward):
            problems.append(
                f"{path}: {', '.join(biases)} is not supported for parts of fused layers, attention or parameters; "
                "exclude it"
            )
        if config.use_dora and (target.output_slice or not target.layer_type.supports_dora):
            problems.append(f"{path}: use_dora is not supported for this layer type and parts of layers; exclude it")
        if config.lora_bias and target.layer_type is EMBEDDING:
            problems.append(f"{path}: lora_bias is not supported for an Embedding; exclude it, or remove lora_bias")
    for path, own_ranks in ranks.items():
        if len(own_ranks) > 1:  # PEFT's files have one rank per attention
            problems.append(f"{path}: its matrices have different ranks {sorted(own_ranks)}; use the same rank for all")
    has_bias = [isinstance(getattr(target.layer, "bias", None), Tensor) for target in targets]
    if config.bias == "lora_only" and has_bias and not any(has_bias):
        problems.append("bias='lora_only': none of the adapted layers has a bias; use bias='none' or lora_bias=True")
    return problems
