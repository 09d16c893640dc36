"""Which layers a config means. Strict: what matches nothing is an error, and all errors come at once."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tailora.core.config import LoRAConfig
from tailora.core.extras import adds_its_bias, biases_of
from tailora.core.fused_layers import OutputSlice, layout_of, rows_of
from tailora.core.layer_types import (
    EMBEDDING,
    LAYER_TYPES,
    LayerType,
    host_path,
    is_called,
    layer_type_of,
    obstacle,
    parameter_layer_type,
    projections,
)
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
from tailora.core.quantization import base_obstacle, dense_weight, quantized_layers
from tailora.errors import TargetError, listing, nearest

# ---- What of a model can be adapted: whole layers, parts of fused ones, projections of attention, named parameters.


Modules = Mapping[str, nn.Module]


@dataclass(frozen=True)
class Place:
    """One matrix of the model. `layer`, found at the path `host`, is the module that computes with it."""

    path: str
    host: str
    layer: nn.Module
    layer_type: LayerType
    rows: OutputSlice | None = None  # of a part

    @property
    def names(self) -> tuple[str, ...]:
        """The paths that select it: a projection of attention goes by the attention's, too, as in PEFT."""
        return (self.path,) if self.rows or self.layer_type.stacked else tuple(dict.fromkeys((self.path, self.host)))

    @property
    def pattern_names(self) -> tuple[str, ...]:
        """The paths that a pattern for rank or alpha may match: of a part and a projection the whole layer's, too."""
        return (self.path,) if self.layer_type.stacked else tuple(dict.fromkeys((self.path, self.host)))

    @property
    def end(self) -> str:
        """The last name of its path; of a part or parameter the last two."""
        return ".".join(self.path.split(".")[-1 if self.path == self.host else -2 :])

    @property
    def dims(self) -> tuple[int, int]:
        """(in, out)."""
        in_features, out_features = self.layer_type.dims(self.layer)
        return in_features, self.rows.size if self.rows else out_features

    @property
    def weight(self) -> Tensor:
        """What holds it, dequantised; of a part the whole layer's."""
        return dense_weight(self.layer, self.layer_type.weight)

    def matrix(self, weight: Tensor) -> Tensor | None:
        """W as the equation has it, (groups, out/groups, n), out of what holds it; None for what is not one matrix."""
        if self.layer_type.matrix is None:
            return None
        W = self.layer_type.matrix(self.layer, weight)
        return W if self.rows is None else self.rows.take(W.mT).mT


def places(modules: Modules, config: LoRAConfig) -> dict[str, Place]:
    """All that `target_modules` can name, by path, in the model's order.

    Raises TargetError for `fused_parts` that do not fit.
    """
    found: dict[str, Place] = {}
    for path, module in modules.items():
        parent = modules.get(path.rpartition(".")[0], module)
        found |= {place.path: place for place in _of_module(path, module, parent, config)}
    return found


def place_at(model: nn.Module, path: str, config: LoRAConfig) -> Place:
    """The place at this path, without a look at the rest of the model. Raises TargetError where there is none."""
    host = host_path(model, path)
    module, parent = model.get_submodule(host), model.get_submodule(host.rpartition(".")[0])
    found = [*_of_module(host, module, parent, config), *_parameters_of(host, module)]
    place = next((place for place in found if place.path == path), None)
    if place is None:
        raise TargetError(f"{path} is a {type(module).__name__}, which has no low-rank form there")
    return place


def _of_module(path: str, module: nn.Module, parent: nn.Module, config: LoRAConfig) -> Iterator[Place]:
    for name, projection in projections(module).items():
        yield Place(f"{path}.{name}" if path else name, path, module, projection)
    layer_type = layer_type_of(module)
    if layer_type is None or (parent is not module and projections(parent)):
        return
    yield Place(path, path, module, layer_type)
    if layer_type.linear and path:
        for part, rows in _rows(path, parent, layer_type.dims(module)[1], config).items():
            yield Place(f"{path}.{part}", path, module, layer_type, rows)


def _rows(path: str, parent: nn.Module, total: int, config: LoRAConfig) -> dict[str, OutputSlice]:
    told = by_pattern(path, config.fused_parts, None)
    layout = layout_of(parent, path.rpartition(".")[2], total) if told is None else told
    try:
        return rows_of(layout, total) if layout else {}
    except ValueError as error:
        raise TargetError(f"fused_parts: {path}: {error}") from None


def parameters(modules: Modules) -> dict[str, Place]:
    """All that `target_parameters` can name: matrices and stacks of them that no kind of layer computes with."""
    return {place.path: place for host, module in modules.items() for place in _parameters_of(host, module)}


def _parameters_of(host: str, module: nn.Module) -> Iterator[Place]:
    if host and not layer_type_of(module) and not projections(module):
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim in (2, 3):
                yield Place(f"{host}.{name}", host, module, parameter_layer_type(name))


def chosen_parameters(modules: Modules, config: LoRAConfig) -> dict[str, Place]:
    wanted = config.target_parameters or []
    return {path: place for path, place in parameters(modules).items() if any(named(name, path) for name in wanted)}


# ---- What a config means beside the layers to adapt: biases to train, rows of embeddings, and heads tied to those.


@dataclass(frozen=True)
class ExtraTargets:
    biases: list[str] = field(default_factory=list)  # paths of layers that are not adapted
    tokens: dict[str, list[int]] = field(default_factory=dict)  # path of an embedding -> rows
    heads: dict[str, str] = field(default_factory=dict)  # path of a head -> of the embedding that it is tied to


def extra_targets(
    model: nn.Module, modules: Modules, config: LoRAConfig, adapted: Collection[str], saved: Collection[str]
) -> tuple[ExtraTargets, list[str]]:
    """What the config names; and all that stands in the way. `adapted`, `saved`: paths that are taken already."""
    tokens, problems = _tokens(model, modules, config)
    heads = {path: tied for tied in tokens for path in _tied_to(modules, tied)}
    for path in (*tokens, *heads):
        if owner := next((each for each in (*adapted, *saved) if inside(path, each)), None):
            what = "target_modules" if owner in adapted else "modules_to_save"
            tie = f", tied to {heads[path]}" if path in heads else ""
            problems.append(f"{path}{tie} is in trainable_token_indices and in {what}; take one")
    if odd := [path for path in heads if not isinstance(modules[path], nn.Linear)]:
        problems.append(f"trainable_token_indices: tied to what is neither embedding nor linear: {', '.join(odd)}")
    biases: list[str] = []
    if config.bias == "all":
        biases, more = _biases(modules, adapted, saved)
        problems += more
        if clash := [path for path in biases if path in heads]:
            problems.append(f"bias='all' and trainable_token_indices both train {', '.join(clash)}; take one")
    return ExtraTargets(biases, tokens, heads), problems


def _biases(modules: Modules, adapted: Collection[str], saved: Collection[str]) -> tuple[list[str], list[str]]:
    found, problems = [], []
    for path, module in modules.items():
        if any(inside(path, whole) for whole in saved):
            continue
        names = biases_of(module)
        if "forward" in vars(module) and names:
            problems.append(f"bias='all': {path}: its forward was replaced on the instance; its bias cannot be trained")
        elif names == ["bias"] and (adds_its_bias(module) or path in adapted) and is_called(module):
            found += [path] if path not in adapted else []
        elif names:
            problems.append(
                f"bias='all': {path or 'the model'} is a {type(module).__name__} whose {', '.join(names)} is not added "
                "to its output; take bias='lora_only', or name it in modules_to_save"
            )
    if not found and not problems and not any(biases_of(modules[path]) for path in adapted):
        problems.append("bias='all': the model has no bias; take bias='none' or lora_bias=True")
    return found, problems


def _tokens(model: Any, modules: Modules, config: LoRAConfig) -> tuple[dict[str, list[int]], list[str]]:
    wanted = config.trainable_token_indices
    if wanted is None:
        return {}, []
    if isinstance(wanted, list):
        find = getattr(model, "get_input_embeddings", None)
        own = find() if callable(find) else None
        path = next((path for path, module in modules.items() if module is own), None)
        if path is None:
            text = "trainable_token_indices is a list, but the model does not say which embedding is its input's"
            return {}, [f"{text}; name it: {{'path': [...]}}"]
        wanted = {path: wanted}
    found: dict[str, list[int]] = {}
    problems = []
    for name, indices in wanted.items():
        paths = [path for path in modules if named(name, path)]
        if not paths:
            embeddings = [path for path, module in modules.items() if layer_type_of(module) is EMBEDDING]
            problems.append(f"trainable_token_indices: {name!r} matches no module{nearest(name, embeddings)}")
        for path in paths:
            problems += [f"trainable_token_indices: {path}: {each}" for each in _row_problems(modules[path], indices)]
            found[path] = indices
    return ({}, problems) if problems else (found, [])


def _row_problems(module: Any, indices: list[int]) -> list[str]:
    if layer_type_of(module) is not EMBEDDING:
        return [f"a {type(module).__name__} is no embedding"]
    reason = obstacle(module)
    problems = [reason] if reason else []
    if outside := [index for index in indices if not 0 <= index < module.num_embeddings]:
        problems.append(
            f"no rows {outside[:5]}; there are 0..{module.num_embeddings - 1} "
            "(resize_token_embeddings comes before the adapter)"
        )
    if module.padding_idx in indices:
        problems.append(f"{module.padding_idx} is the padding token, which the model does not learn")
    return problems


def _tied_to(modules: Modules, path: str) -> list[str]:
    weight = modules[path].weight
    return [other for other, module in modules.items() if other != path and module._parameters.get("weight") is weight]


# ----


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
    return Target(place.path, place.host, place.layer, place.layer_type, place.rows, r=r, lora_alpha=alpha)


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
        if (place.layer_type.linear or place.path != place.host)
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
    if unfit is not None and layer_type_of(unfit) is None and field != "target_parameters":
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
    return ", ".join([*(name.rpartition(".")[2] for name in LAYER_TYPES), "MultiheadAttention"])


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
        where = [target.path for target in targets if target.rows or target.layer_type.forward]
        what = "no bias of a part of a fused layer, of attention or beside a parameter is trained; exclude it"
        problems += [f"{path}: {', '.join(names)}: {what}" for path in where]
    if config.use_dora:
        where = [target.path for target in targets if not target.layer_type.scales]
        problems += [f"{path}: use_dora: how its rows would be scaled is not known; exclude it" for path in where]
    if config.lora_bias:
        names = [target.path for target in targets if target.layer_type is EMBEDDING]
        problems += [f"{path}: lora_bias on an Embedding, whose file has no place for it" for path in names]
    if config.bias == "lora_only" and targets and not any(_has_bias(target.layer) for target in targets):
        problems.append("bias='lora_only': none of the adapted layers has a bias; take bias='none' or lora_bias=True")
    return problems


def _has_bias(layer: nn.Module) -> bool:
    return isinstance(getattr(layer, "bias", None), nn.Parameter)


def _obstacle(place: Place, config: LoRAConfig) -> str | None:
    if place.layer_type.stacked and config.lora_dropout:
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
