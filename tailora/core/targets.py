"""Which layers a config means. Strict: what matches nothing is an error, and all errors come at once."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import regex
from torch import nn

from tailora.core.config import LoRAConfig
from tailora.core.kinds import CONV1D, EMBEDDING, KINDS, LINEAR, Kind, is_called, kind_of, obstacle
from tailora.errors import PatternError, TargetError, listing, nearest

Selector = list[str] | str
T = TypeVar("T")
MATCH_SECONDS = 0.2  # of CPU time; honest patterns take microseconds


@dataclass(frozen=True)
class Target:
    """One layer to adapt, with its own rank and alpha."""

    path: str
    layer: nn.Module
    kind: Kind
    r: int
    lora_alpha: float


@dataclass(frozen=True)
class Selection:
    targets: list[Target]
    to_save: dict[str, nn.Module]  # path -> module trained whole


def select(model: nn.Module, config: LoRAConfig) -> Selection:
    """The layers of `model` that `config` names, in the model's order.

    Raises TargetError with every selector, pattern and index that matches nothing, every layer that cannot be
    adapted and every rank that is too large.
    """
    modules = dict(model.named_modules())
    to_save = saved_modules(modules, config)
    paths = chosen_paths(model, modules, config)
    targets = [target_at(path, modules[path], config) for path in paths]
    problems = [*_dead_names(modules, config), *_dead_patterns(config, paths), *_conflicts(modules, config, paths)]
    problems += [problem for target in targets if (problem := _rank_problem(target))]
    problems += _slot_problems(targets, config)
    if not targets and not problems:
        problems.append(
            f"target_modules={config.target_modules!r} leaves no layer to adapt; kinds here: {_kinds(modules)}"
        )
    if problems:
        raise TargetError(listing(problems))
    return Selection(targets, to_save)


def default_config(model: nn.Module) -> LoRAConfig:
    """The defaults, with a lower rank at the same scale for layers that are too small for theirs."""
    config = LoRAConfig()
    modules = dict(model.named_modules())
    limits = {path: _limit(modules[path]) for path in chosen_paths(model, modules, config)}
    low = {re.escape(path): limit for path, limit in limits.items() if limit < config.r}
    return config.replaced(
        rank_pattern=low, alpha_pattern={path: config.lora_alpha * limit / config.r for path, limit in low.items()}
    )


def chosen_paths(model: nn.Module, modules: Mapping[str, nn.Module], config: LoRAConfig) -> list[str]:
    """The paths that the config's targets, exclusions and layer indices leave; unmatched ones pass in silence."""
    chosen = _all_linear(model, modules, config)
    if config.target_modules != "all-linear":
        chosen = [path for path in adaptable(modules) if matches(config.target_modules, path)]
    if config.exclude_modules is not None:
        chosen = [path for path in chosen if not matches(config.exclude_modules, path)]
    wanted = layer_indices(config)
    return chosen if wanted is None else [path for path in chosen if layer_index(path) in wanted]


def saved_modules(modules: Mapping[str, nn.Module], config: LoRAConfig) -> dict[str, nn.Module]:
    names = config.modules_to_save or []
    return {path: module for path, module in modules.items() if path and any(_named(name, path) for name in names)}


def adaptable(modules: Mapping[str, nn.Module]) -> list[str]:
    return [path for path, module in modules.items() if kind_of(module)]


def target_at(path: str, layer: nn.Module, config: LoRAConfig) -> Target:
    """The layer with the rank and alpha that the patterns give it. Raises TargetError where no kind fits."""
    kind = kind_of(layer)
    if kind is None:
        raise TargetError(f"{path} is a {type(layer).__name__}, which has no low-rank form; kinds: {_known()}")
    r = by_pattern(path, config.rank_pattern, config.r)
    return Target(path, layer, kind, r, by_pattern(path, config.alpha_pattern, config.lora_alpha))


def matches(selector: Selector, path: str) -> bool:
    """A name: the path or its end after a dot. A string: a regular expression for the whole path (PEFT's rule)."""
    if isinstance(selector, str):
        return _full_match(selector, path)
    return any(_named(name, path) for name in selector)


def _full_match(pattern: str, path: str) -> bool:
    """Raises PatternError, since an adapter's file may bring a pattern whose time doubles with every letter."""
    try:
        return regex.fullmatch(pattern, path, timeout=MATCH_SECONDS) is not None
    except TimeoutError:
        raise PatternError(
            f"the regular expression {pattern!r} takes more than {MATCH_SECONDS} s to match {path!r}; "
            "repeat no group that can match in several ways, or list the names"
        ) from None


def _named(name: str, path: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _all_linear(model: nn.Module, modules: Mapping[str, nn.Module], config: LoRAConfig) -> list[str]:
    """Every linear layer but the output head, what is trained whole, and what its owner reads without a call."""
    whole = (*saved_modules(modules, config), *_output_heads(model, modules))
    return [
        path
        for path in adaptable(modules)
        if kind_of(modules[path]) in (LINEAR, CONV1D)
        and not any(path == head or path.startswith(f"{head}.") for head in whole)
        and is_called(modules[path])
    ]


def _output_heads(model: Any, modules: Mapping[str, nn.Module]) -> list[str]:
    """Paths of what turns hidden states into logits, where the model says so (transformers' convention)."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    return [path for path, module in modules.items() if module is head]


def _dead_names(modules: Mapping[str, nn.Module], config: LoRAConfig) -> list[str]:
    """Every entry of a selector that names nothing."""
    there = adaptable(modules)
    problems = []
    if config.target_modules != "all-linear":
        problems += _unmatched("target_modules", config.target_modules, there, modules)
    if config.exclude_modules is not None:
        problems += _unmatched("exclude_modules", config.exclude_modules, there, modules)
    for name in config.modules_to_save or []:
        problems += _unmatched("modules_to_save", [name], [path for path in modules if path], modules)
    return problems + _dead_indices(modules, config)


def _unmatched(field: str, selector: Selector, paths: list[str], modules: Mapping[str, nn.Module]) -> list[str]:
    if selector == []:
        return [f"{field}={selector!r} names nothing"]
    if isinstance(selector, str):
        ends = {path.rpartition(".")[2] for path in paths}
        hint = nearest(selector, ends) or _examples(paths)
        return (
            []
            if any(matches(selector, path) for path in paths)
            else [f"{field}={selector!r} is a regular expression that matches no whole path of a layer{hint}"]
        )
    return [_missing(field, name, paths, modules) for name in selector if not any(_named(name, p) for p in paths)]


def _missing(field: str, name: str, paths: list[str], modules: Mapping[str, nn.Module]) -> str:
    unfit = next((module for path, module in modules.items() if path and _named(name, path)), None)
    if unfit is not None and kind_of(unfit) is None:
        return f"{field}: {name!r} is a {type(unfit).__name__}, which has no low-rank form; kinds: {_known()}"
    ends = {path.rpartition(".")[2] for path in paths}
    return f"{field}: {name!r} matches no layer{nearest(name, ends | set(paths)) or _examples(sorted(ends))}"


def _examples(names: list[str]) -> str:
    return f"; there are: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}" if names else "; there are none"


def _known() -> str:
    return ", ".join(name.rpartition(".")[2] for name in KINDS)


def _kinds(modules: Mapping[str, nn.Module]) -> str:
    return ", ".join(sorted({type(module).__name__ for module in modules.values()})) or "no modules"


def _conflicts(modules: Mapping[str, nn.Module], config: LoRAConfig, paths: list[str]) -> list[str]:
    """Layers that were named and cannot be adapted, or are to be adapted and trained whole at once."""
    saved = saved_modules(modules, config)
    problems = [f"{path}: {reason}" for path in paths if (reason := obstacle(modules[path]))]
    problems += [
        f"{path} is in target_modules and in modules_to_save ({whole})"
        for path in paths
        for whole in saved
        if path == whole or path.startswith(f"{whole}.")
    ]
    replaced = [path for path, module in saved.items() if "forward" in vars(module)]
    return problems + [
        f"{path}: its forward was replaced on the instance; it cannot be trained whole" for path in replaced
    ]


def _slot_problems(targets: list[Target], config: LoRAConfig) -> list[str]:
    """Slots of the equation that the config asks for and the chosen layers do not have."""
    problems = []
    if config.lora_bias:
        names = [target.path for target in targets if target.kind is EMBEDDING]
        problems += [f"{path}: lora_bias on an Embedding, whose file has no place for it" for path in names]
    if config.bias == "lora_only" and targets and not any(_has_bias(target.layer) for target in targets):
        problems.append("bias='lora_only': none of the adapted layers has a bias; take bias='none' or lora_bias=True")
    return problems


def _has_bias(layer: nn.Module) -> bool:
    return isinstance(getattr(layer, "bias", None), nn.Parameter)


def layer_index(path: str) -> int | None:
    """The first number in the path: `model.layers.3.mlp.experts.5` is in layer 3."""
    return next((int(part) for part in path.split(".") if part.isdecimal()), None)


def layer_indices(config: LoRAConfig) -> set[int] | None:
    wanted = config.layers_to_transform
    return {wanted} if isinstance(wanted, int) else None if wanted is None else set(wanted)


def _dead_indices(modules: Mapping[str, nn.Module], config: LoRAConfig) -> list[str]:
    there = {index for path in adaptable(modules) if (index := layer_index(path)) is not None}
    missing = sorted((layer_indices(config) or set()) - there)
    known = f"{min(there)}..{max(there)}" if there else "none"
    return [f"layers_to_transform={missing}: no layer has this index; there are: {known}"] if missing else []


def pattern_matches(pattern: str, path: str) -> bool:
    return _full_match(rf"(.*\.)?({pattern})$", path)


def by_pattern(path: str, patterns: Mapping[str, T], default: T) -> T:
    return next((value for pattern, value in patterns.items() if pattern_matches(pattern, path)), default)


def _dead_patterns(config: LoRAConfig, paths: list[str]) -> list[str]:
    ends = {path.rpartition(".")[2] for path in paths}
    return [
        f"{field}: {pattern!r} matches no adapted layer{nearest(pattern, ends | set(paths)) or _examples(sorted(ends))}"
        for field, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern))
        for pattern in patterns
        if not any(pattern_matches(pattern, path) for path in paths)
    ]


def _limit(layer: nn.Module) -> int:
    kind = kind_of(layer)
    return min(kind.dims(layer)) if kind else 0


def _rank_problem(target: Target) -> str | None:
    limit = _limit(target.layer)
    if 1 <= target.r <= limit:
        return None
    in_features, out_features = target.kind.dims(target.layer)
    return f"{target.path}: r = {target.r} on a matrix of {in_features} -> {out_features}; take 1..{limit}"
