"""What a config means beside the layers to adapt: biases to train, rows of embeddings, and heads tied to those."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tailora.core.config import LoRAConfig
from tailora.core.extras import adds_its_bias, biases_of
from tailora.core.layer_types import EMBEDDING, is_called, kind_of, obstacle
from tailora.core.patterns import inside, named
from tailora.errors import nearest

Modules = Mapping[str, nn.Module]


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
            embeddings = [path for path, module in modules.items() if kind_of(module) is EMBEDDING]
            problems.append(f"trainable_token_indices: {name!r} matches no module{nearest(name, embeddings)}")
        for path in paths:
            problems += [f"trainable_token_indices: {path}: {each}" for each in _row_problems(modules[path], indices)]
            found[path] = indices
    return ({}, problems) if problems else (found, [])


def _row_problems(module: Any, indices: list[int]) -> list[str]:
    if kind_of(module) is not EMBEDDING:
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
