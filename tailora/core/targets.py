"""Which layers a config means. Strict: what matches nothing is an error, and all errors come at once."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from tailora.core.config import LoRAConfig
from tailora.core.extra_targets import ExtraTargets, extra_targets
from tailora.core.layer_types import EMBEDDING, KINDS, kind_of, obstacle, projections
from tailora.core.patterns import (
    Selector,
    by_pattern,
    ends_of,
    exactly,
    inside,
    layer_index,
    matches,
    named,
    pattern_matches,
)
from tailora.core.places import Modules, Place, chosen_parameters, parameters, place_at, places
from tailora.core.quantization import base_obstacle, quantized_layers
from tailora.errors import TargetError, listing, nearest


@dataclass(frozen=True)
class Target(Place):
    """A place to adapt, with its own rank and alpha."""

    r: int = 1
    lora_alpha: float = 1.0


@dataclass(frozen=True)
class Selection:
    targets: list[Target]
    to_save: dict[str, nn.Module]  # path -> module trained whole
    extras: ExtraTargets
    modules: dict[str, nn.Module]  # of the whole model, by path


def select(model: nn.Module, config: LoRAConfig) -> Selection:
    """The layers of `model` that `config` names, in the model's order.

    Raises TargetError with every selector, pattern and index that matches nothing, every layer that cannot be
    adapted and every rank that is too large.
    """
    modules = dict(model.named_modules())
    there = places(modules, config)
    to_save = saved_modules(modules, config)
    chosen = chosen_places(model, modules, config)
    problems = [*_dead_names(there, modules, config), *_dead_patterns(config, there, chosen)]
    problems += [*_conflicts(modules, config, chosen), *_unequal_ranks(chosen, config)]
    problems += [problem for place in chosen.values() if (problem := _rank_problem(place, config))]
    targets = [target_of(place, config) for place in chosen.values()]
    problems += _slot_problems(targets, config)
    extras, more = extra_targets(model, modules, config, chosen, to_save)
    problems += more
    if not chosen and not problems:
        problems.append(
            f"target_modules={config.target_modules!r} leaves no layer to adapt; kinds here: {_kinds(modules)}"
        )
    if problems:
        raise TargetError(listing(problems))
    return Selection(targets, to_save, extras, modules)


def default_config(model: nn.Module) -> LoRAConfig:
    """The defaults, with a lower rank at the same scale for layers that are too small for theirs."""
    config = LoRAConfig()
    chosen = chosen_places(model, dict(model.named_modules()), config)
    limits = {path: min(place.dims) for path, place in chosen.items()}
    low = {exactly(path): limit for path, limit in limits.items() if limit < config.r}
    return config.replaced(
        rank_pattern=low, alpha_pattern={path: config.lora_alpha * limit / config.r for path, limit in low.items()}
    )


def chosen_places(model: nn.Module, modules: Modules, config: LoRAConfig) -> dict[str, Place]:
    """The places that the config's targets, exclusions and layer indices leave; unmatched ones pass in silence."""
    there = places(modules, config)
    if config.target_modules == "all-linear":
        chosen = _all_linear(model, modules, there, config)
    else:
        names = config.target_modules
        selector = names if isinstance(names, str) else frozenset(names)  # there may be thousands
        chosen = [place for place in there.values() if _selects(selector, place)]
    whole = {place.path for place in chosen if not place.rows}
    chosen = [place for place in chosen if not (place.rows and place.host in whole)]  # a whole layer has its parts
    chosen += chosen_parameters(modules, config).values()
    if config.exclude_modules is not None:
        chosen = list(_without(config.exclude_modules, chosen, there))
    wanted = layer_indices(config)
    return {place.path: place for place in chosen if wanted is None or layer_index(place.path) in wanted}


def saved_modules(modules: Modules, config: LoRAConfig) -> dict[str, nn.Module]:
    names = config.modules_to_save or []
    return {path: module for path, module in modules.items() if path and any(named(name, path) for name in names)}


def target_of(place: Place, config: LoRAConfig) -> Target:
    """The place with the rank and alpha that the patterns give it."""
    r = by_pattern(place.pattern_names, config.rank_pattern, config.r)
    alpha = by_pattern(place.pattern_names, config.alpha_pattern, config.lora_alpha)
    return Target(place.path, place.host, place.layer, place.kind, place.rows, r=r, lora_alpha=alpha)


def target_at(model: nn.Module, path: str, config: LoRAConfig) -> Target:
    """The target at this path, selected or not. Raises TargetError where no kind fits."""
    return target_of(place_at(model, path, config), config)


def _selects(selector: Selector, place: Place) -> bool:
    return any(matches(selector, name) for name in place.names)


def _without(selector: Selector, chosen: list[Place], there: Mapping[str, Place]) -> Iterator[Place]:
    """A layer without one of its parts is its other parts."""
    parts: dict[str, list[Place]] = {}
    for place in there.values():
        if place.rows:
            parts.setdefault(place.host, []).append(place)
    for place in chosen:
        if not _selects(selector, place):
            of_it = [] if place.rows else parts.get(place.path, [])
            rest = [part for part in of_it if not _selects(selector, part)]
            yield from [place] if len(rest) == len(of_it) else rest


def _all_linear(model: nn.Module, modules: Modules, there: Mapping[str, Place], config: LoRAConfig) -> list[Place]:
    """Every linear layer but the output head and what is trained whole; the projections of attention are linear."""
    whole = (*saved_modules(modules, config), *_output_heads(model, modules))
    return [
        place
        for place in there.values()
        if (place.kind.linear or place.path != place.host)
        and not place.rows
        and not any(inside(place.host, head) for head in whole)
    ]


def _output_heads(model: Any, modules: Modules) -> list[str]:
    """Paths of what turns hidden states into logits, where the model says so (transformers' convention)."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    return [path for path, module in modules.items() if module is head]


def _dead_names(there: Mapping[str, Place], modules: Modules, config: LoRAConfig) -> list[str]:
    """Every entry of a selector that names nothing."""
    problems = []
    if config.target_modules != "all-linear" and not (config.target_modules == [] and config.target_parameters):
        problems += _unmatched("target_modules", config.target_modules, there, modules)
    stacks = parameters(modules) if config.target_parameters is not None else {}
    if config.exclude_modules is not None:
        problems += _unmatched("exclude_modules", config.exclude_modules, {**there, **stacks}, modules)
    if config.target_parameters is not None:
        problems += _unmatched("target_parameters", config.target_parameters, stacks, modules)
    for name in config.modules_to_save or []:
        paths = [path for path in modules if path]
        problems += [] if any(named(name, path) for path in paths) else [_no_layer("modules_to_save", name, paths)]
    return problems + _dead_indices(there, config)


def _unmatched(field: str, selector: Selector, there: Mapping[str, Place], modules: Modules) -> list[str]:
    if selector == []:
        return [f"{field}={selector!r} names nothing"]
    if isinstance(selector, str):
        ends = {place.end for place in there.values()}
        hint = nearest(selector, ends) or _examples(sorted(ends))
        return (
            []
            if any(_selects(selector, place) for place in there.values())
            else [f"{field}={selector!r} is a regular expression that matches no whole path of a layer{hint}"]
        )
    meant = {end for place in there.values() for name in place.names for end in ends_of(name)}
    return [_missing(field, name, there, modules) for name in selector if name not in meant]


def _missing(field: str, name: str, there: Mapping[str, Place], modules: Modules) -> str:
    unfit = next((module for path, module in modules.items() if path and named(name, path)), None)
    if unfit is not None and kind_of(unfit) is None and field != "target_parameters":
        return f"{field}: {name!r} is a {type(unfit).__name__}, which has no low-rank form; kinds: {_known()}"
    whole, _, part = name.rpartition(".")
    fused = [place for place in there.values() if whole and named(whole, place.path) and not place.rows]
    if fused and not any(place.rows and place.host == fused[0].path for place in there.values()):
        sizes = f'{{"{whole}": {{"{part}": its number of rows, ...}}}}'
        return f"{field}: {name!r}: which rows of {whole} are {part} is not known; say it: fused_parts={sizes}"
    return _no_layer(field, name, there)


def _no_layer(field: str, name: str, paths: Iterable[str]) -> str:
    paths = list(paths)
    ends = {".".join(path.split(".")[-count:]) for path in paths for count in (1, 2)}
    last = sorted({path.rpartition(".")[2] for path in paths})
    return f"{field}: {name!r} matches no layer{nearest(name, ends | set(paths)) or _examples(last)}"


def _examples(names: list[str]) -> str:
    return f"; there are: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}" if names else "; there are none"


def _known() -> str:
    return ", ".join([*(name.rpartition(".")[2] for name in KINDS), "MultiheadAttention"])


def _kinds(modules: Modules) -> str:
    return ", ".join(sorted({type(module).__name__ for module in modules.values()})) or "no modules"


def _conflicts(modules: Modules, config: LoRAConfig, chosen: Mapping[str, Place]) -> list[str]:
    """Layers that were named and cannot be adapted, or are to be adapted and trained whole at once."""
    saved = saved_modules(modules, config)
    problems = [f"{path}: {reason}" for path, place in chosen.items() if (reason := _obstacle(place, config))]
    problems += [
        f"{path} is in target_modules and in modules_to_save ({whole})"
        for path in chosen
        for whole in saved
        if inside(path, whole)
    ]
    replaced = [path for path, module in saved.items() if "forward" in vars(module)]
    problems += [f"{path}: its forward was replaced on the instance; it cannot be trained whole" for path in replaced]
    return problems + [quantized_whole(path) for path, module in saved.items() if quantized_layers(module)]


def quantized_whole(path: str) -> str:
    return f"{path} is quantised and cannot be trained whole; adapt it (target_modules), or load the base unquantised"


def _slot_problems(targets: list[Target], config: LoRAConfig) -> list[str]:
    """Slots of the equation that the config asks for and the chosen layers do not have."""
    problems = []
    asked = {"lora_bias": config.lora_bias, "bias": config.bias != "none"}
    if names := [name for name, is_asked in asked.items() if is_asked]:
        where = [target.path for target in targets if target.rows or target.kind.forward]
        what = "no bias of a part of a fused layer, of attention or beside a parameter is trained; exclude it"
        problems += [f"{path}: {', '.join(names)}: {what}" for path in where]
    if config.use_dora:
        where = [target.path for target in targets if not target.kind.scales]
        problems += [f"{path}: use_dora: how its rows would be scaled is not known; exclude it" for path in where]
    if config.lora_bias:
        names = [target.path for target in targets if target.kind is EMBEDDING]
        problems += [f"{path}: lora_bias on an Embedding, whose file has no place for it" for path in names]
    if config.bias == "lora_only" and targets and not any(_has_bias(target.layer) for target in targets):
        problems.append("bias='lora_only': none of the adapted layers has a bias; take bias='none' or lora_bias=True")
    return problems


def _has_bias(layer: nn.Module) -> bool:
    return isinstance(getattr(layer, "bias", None), nn.Parameter)


def _obstacle(place: Place, config: LoRAConfig) -> str | None:
    if place.kind.stacked and config.lora_dropout:
        return "an update of a parameter has no input that lora_dropout could drop; set lora_dropout=0"
    return obstacle(place.layer) or base_obstacle(place.layer)


def layer_indices(config: LoRAConfig) -> set[int] | None:
    wanted = config.layers_to_transform
    return {wanted} if isinstance(wanted, int) else None if wanted is None else set(wanted)


def _dead_indices(paths: Iterable[str], config: LoRAConfig) -> list[str]:
    there = {index for path in paths if (index := layer_index(path)) is not None}
    missing = sorted((layer_indices(config) or set()) - there)
    known = f"{min(there)}..{max(there)}" if there else "none"
    return [f"layers_to_transform={missing}: no layer has this index; there are: {known}"] if missing else []


def _dead_patterns(config: LoRAConfig, there: Mapping[str, Place], chosen: Mapping[str, Place]) -> list[str]:
    fields: list[tuple[str, Mapping[str, Any], Mapping[str, Place]]] = [
        ("rank_pattern", config.rank_pattern, chosen),
        ("alpha_pattern", config.alpha_pattern, chosen),
        ("fused_parts", config.fused_parts, there),
    ]
    return [
        f"{field}: {pattern!r} matches no adapted layer{_near(pattern, among)}"
        for field, patterns, among in fields
        for pattern in patterns
        if not any(pattern_matches(pattern, name) for place in among.values() for name in place.pattern_names)
    ]


def _near(pattern: str, among: Mapping[str, Place]) -> str:
    ends = {place.end for place in among.values()}
    return nearest(pattern, ends | set(among)) or _examples(sorted(ends))


def _unequal_ranks(chosen: Mapping[str, Place], config: LoRAConfig) -> list[str]:
    """PEFT's files hold one rank for both matrices of an attention."""
    ranks: dict[str, set[int]] = {}
    for place in chosen.values():
        if "in_proj_weight" in projections(place.layer):
            ranks.setdefault(place.host, set()).add(target_of(place, config).r)
    return [
        f"{host}: its matrices have the ranks {sorted(found)}; take one"
        for host, found in ranks.items()
        if len(found) > 1
    ]


def _rank_problem(place: Place, config: LoRAConfig) -> str | None:
    in_features, out_features = place.dims
    limit, r = min(place.dims), target_of(place, config).r
    if 1 <= r <= limit:
        return None
    return f"{place.path}: r = {r} on a matrix of {in_features} -> {out_features}; take 1..{limit}"
