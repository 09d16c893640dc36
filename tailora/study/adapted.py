"""What a configuration adapts, in groups of like layers, and what it leaves alone, with the reason."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from tailora.core.adapter import layer_key
from tailora.core.config import LoRAConfig
from tailora.core.layer import LoRALayer
from tailora.core.layer_types import host_path, kind_of
from tailora.core.patterns import layer_index
from tailora.core.summary import Row
from tailora.core.targets import chosen_places
from tailora.model import LoRAModel


@dataclass(frozen=True)
class Module:
    """A layer with a low-rank update."""

    path: str
    kind: str
    in_features: int
    out_features: int
    r: int
    alpha: float
    parameters: int


@dataclass(frozen=True)
class Group:
    """Like layers: in `path` a range stands for the number that tells them apart.

    shape: (in, out), of what is trained whole that of the parameter; r, alpha: None there.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    r: int | None
    alpha: float | None
    count: int
    parameters: int


@dataclass(frozen=True)
class Left:
    """Like layers that stay as they are. parameters: of all of them; 0 where they are counted elsewhere (tied)."""

    path: str
    kind: str
    count: int
    parameters: int
    reason: str


def modules_of(model: LoRAModel) -> list[Module]:
    """Those with a low-rank update, in the model's order."""
    return [_module(row, model) for row in model.summary().rows if row.r is not None]


def _module(row: Row, model: LoRAModel) -> Module:
    layer = cast(LoRALayer, model.lora_layers[layer_key(row.path)])
    return Module(row.path, row.kind, layer.in_features, layer.out_features, layer.r, layer.lora_alpha, row.parameters)


def groups_of(model: LoRAModel) -> list[Group]:
    """All that is trained."""
    found: dict[tuple[Any, ...], list[tuple[str, int]]] = {}
    dims = {each.path: (each.in_features, each.out_features) for each in modules_of(model)}
    for row in model.summary().rows:
        shape = row.shape if row.r is None else dims[row.path]
        found.setdefault((starred(row.path), row.kind, shape, row.r, row.lora_alpha), []).append(
            (row.path, row.parameters)
        )
    return [
        Group(ranged([path for path, _ in each]), kind, shape, r, alpha, len(each), sum(count for _, count in each))
        for (_, kind, shape, r, alpha), each in found.items()
    ]


def left_alone(model: LoRAModel) -> list[Left]:
    """Modules with weights of their own that the active adapter neither adapts nor trains."""
    base, config = model.base_model, model.adapters[model.active_adapters[0]]
    rows = [row.path for row in model.summary().rows]
    touched = {*rows, *(host_path(base, path) for path in rows)}
    why = _Reasons(base, config)
    found: dict[tuple[str, str, str], list[tuple[str, int]]] = {}
    seen: set[int] = set()
    for path, module in base.named_modules():
        own = list(module.parameters(recurse=False))
        if not own or any(path == each or path.startswith(f"{each}.") for each in touched):
            continue
        count = sum(parameter.numel() for parameter in own if id(parameter) not in seen)
        seen |= {id(parameter) for parameter in own}
        reason = why(path, module) + ("" if count else "; tied to another weight")
        found.setdefault((starred(path), _name(module), reason), []).append((path, count))
    return [
        Left(ranged([path for path, _ in each]), kind, len(each), sum(count for _, count in each), reason)
        for (_, kind, reason), each in found.items()
    ]


def _name(module: nn.Module) -> str:
    return type(module).__name__.removeprefix("Thawing")


class _Reasons:
    """Why a module is not among what the config adapts."""

    def __init__(self, base: nn.Module, config: LoRAConfig) -> None:
        modules = dict(base.named_modules())
        find = getattr(base, "get_output_embeddings", None)
        self._head = find() if callable(find) else None
        self._all_linear = config.target_modules == "all-linear"
        without = {
            "exclude_modules takes it away": {"exclude_modules": None},
            "its layer is not in layers_to_transform": {"layers_to_transform": None},
        }
        self._lifted = {
            reason: set(chosen_places(base, modules, config.replaced(**change))) for reason, change in without.items()
        }

    def __call__(self, path: str, module: nn.Module) -> str:
        kind = kind_of(module)
        if kind is None:
            return "no low-rank form: not a matrix"
        if lifted := next((reason for reason, paths in self._lifted.items() if path in paths), None):
            return lifted
        if self._all_linear and module is self._head:
            return "the output head, which all-linear leaves out: name it to adapt it"
        if self._all_linear and not kind.linear:
            return "not linear: name it to adapt it"
        return "not among target_modules"


# ---- paths


def starred(path: str) -> str:
    """The path with * for its first number: like layers have the same."""
    parts = path.split(".")
    place = next((place for place, part in enumerate(parts) if part.isdecimal()), None)
    return path if place is None else ".".join([*parts[:place], "*", *parts[place + 1 :]])


def ranged(paths: Sequence[str]) -> str:
    """Like paths as one: model.layers.{0-29}.self_attn.q_proj."""
    numbers = [index for path in paths if (index := layer_index(path)) is not None]
    if len(paths) == 1 or not numbers:
        return paths[0]
    spans = ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in _spans(sorted(set(numbers))))
    return starred(paths[0]).replace("*", f"{{{spans}}}", 1)


def _spans(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    first = last = None
    for number in numbers:
        if last is not None and first is not None and number != last + 1:
            yield first, last
            first = None
        first = number if first is None else first
        last = number
    if first is not None and last is not None:
        yield first, last
