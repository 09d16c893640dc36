"""One adapter: its settings and its parts, by the path of the base's module."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tailora.core.attach import detach
from tailora.core.config import LoRAConfig
from tailora.core.extras import TokenHead, TokenRows, TrainedBias
from tailora.core.init import DATA_STARTS, FROM_WEIGHT, MOVED, check_fits, start_at_weight
from tailora.core.layer import INITS, LoRALayer
from tailora.core.layer_types import host_of, weight_of
from tailora.core.patterns import inside
from tailora.core.quantization import dense_shape, weight_count
from tailora.core.targets import ExtraTargets, Selection, Target
from tailora.errors import AdapterError, TargetError, listing


@dataclass(frozen=True)
class Adapter:
    config: LoRAConfig
    low_rank: dict[str, LoRALayer]
    saved: dict[str, nn.Module] = field(default_factory=dict)  # trained copies, by path (modules_to_save)
    extras: dict[str, nn.Module] = field(default_factory=dict)  # TrainedBias, TokenRows and TokenHead, by path
    waits: bool = False  # for data to start from

    @property
    def has_start(self) -> bool:
        """Whether some layer's update is s (B A - B0 A0), with a frozen start."""
        return any(layer.has_start for layer in self.low_rank.values())

    @property
    def parts(self) -> dict[str, nn.Module]:
        return {**self.low_rank, **self.saved, **self.extras}


def create(selection: Selection, config: LoRAConfig, *, fresh: bool = True) -> Adapter:
    """A fresh adapter for the selected layers, on their devices, computing nothing yet.

    fresh=False: factors and frozen starts are zero, for a state dict to fill.
    Raises TargetError where a layer cannot start as the config says.
    """
    name = config.init_lora_weights
    check_fits(selection.targets, name)
    if config.adalora is not None:
        check_allocatable(selection.targets)
    saved = {path: trained_copy(module) for path, module in selection.to_save.items()}
    tie(selection.to_save, saved)
    extras = extra_parts(selection.extras, selection.modules)
    if not fresh:
        empty = {target.path: _empty_layer(target, config) for target in selection.targets}
        return Adapter(config, empty, saved, extras)
    low_rank = {target.path: low_rank_layer(target, config) for target in selection.targets}
    if name in FROM_WEIGHT:
        for target in selection.targets:
            start_at_weight(low_rank[target.path], target, name)
    return Adapter(config, low_rank, saved, extras, waits=name in DATA_STARTS)


def extra_parts(wanted: ExtraTargets, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The parts beside the low-rank updates, computing nothing yet."""
    parts: dict[str, nn.Module] = {}
    for path in wanted.biases:
        layer: Any = modules[path]
        parts[path] = TrainedBias(layer, adapter_dtype(layer.bias.dtype))
    rows = {
        path: TokenRows(modules[path], indices, adapter_dtype(weight_of(modules[path]).dtype))
        for path, indices in wanted.tokens.items()
    }
    return {**parts, **rows, **{head: TokenHead(rows[path]) for head, path in wanted.heads.items()}}


def tie(modules: Mapping[str, nn.Module], copies: Mapping[str, nn.Module]) -> None:
    """Let copies share what their modules share, as a head and its embedding do, where their values are the same."""
    first: dict[int, tuple[nn.Module, str]] = {}
    for path, whole in modules.items():
        for inner, module in whole.named_modules():
            for name, parameter in module._parameters.items():
                owner = copies[path].get_submodule(inner)
                there, same = first.setdefault(id(parameter), (owner, name))
                if parameter is not None and there is not owner and _equal(there, same, owner, name):
                    owner._parameters[name] = there._parameters[same]


def _equal(one: nn.Module, name: str, other: nn.Module, its_name: str) -> bool:
    a, b = one._parameters[name], other._parameters[its_name]
    return a is not None and b is not None and torch.equal(a, b)


def low_rank_layer(target: Target, config: LoRAConfig, *, fresh: bool = True) -> LoRALayer:
    """An update for this layer; `fresh=False` leaves both factors zero and the random state alone, to be filled."""
    in_features, out_features = target.dims
    weight = weight_of(target.layer, target.layer_type.weight)  # as it is stored: its dense value is not needed
    shape_A, shape_B = target.layer_type.shapes(target.layer, target.r)
    layer = LoRALayer(
        in_features,
        out_features,
        target.r,
        target.lora_alpha,
        config.learn_scaling,
        lora_dropout=config.lora_dropout,
        lora_bias=config.lora_bias,
        use_rslora=config.use_rslora,
        init_lora_weights=_random_start(config) if fresh else None,
        layer_type=target.layer_type,
        shapes=(shape_A, (target.rows.size, *shape_B[1:]) if target.rows else shape_B),
        groups=target.layer_type.groups(target.layer),
        rows=target.rows,
        device=weight.device,
        dtype=adapter_dtype(weight.dtype),
    )
    if config.adalora is not None:
        layer.diagonal()
    if config.use_dora:
        layer.magnify(target.layer)
    if config.bias != "none":
        layer.take_bias(target.layer)
    return layer


def check_allocatable(targets: Iterable[Target]) -> None:
    """Raises TargetError with every layer whose ranks cannot be taken one by one."""
    if grouped := [target.path for target in targets if target.layer_type.groups(target.layer) > 1]:
        raise TargetError(
            f"adalora takes ranks one by one, but those of groups or experts go together: {', '.join(grouped)}; "
            "exclude_modules"
        )


def _empty_layer(target: Target, config: LoRAConfig) -> LoRALayer:
    layer = low_rank_layer(target, config, fresh=False)
    if config.init_lora_weights in MOVED:
        layer.start_from(layer.lora_A, layer.lora_B)
    return layer


def _random_start(config: LoRAConfig) -> str:
    """How the factors are filled before the weights or the data say more."""
    return config.init_lora_weights if config.init_lora_weights in INITS else "kaiming"


def adapter_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 on a 16-bit or quantised base: in bfloat16 half of the steps of 2e-5 vanish (measured)."""
    return dtype if dtype == torch.float64 else torch.float32


def trained_copy(module: nn.Module) -> nn.Module:
    """A module of its own to train whole: plain classes, and float32 where the base has 16 bits."""
    clone = copy.deepcopy(module)
    for part in clone.modules():
        detach(part)
    for parameter in clone.parameters():
        parameter.data = parameter.data.to(adapter_dtype(parameter.dtype))
    return clone.requires_grad_()


def check_compatible(adapters: Mapping[str, Adapter], *, by_row: bool = False) -> None:
    """Raises AdapterError where one adapter replaces a module that another one adapts or replaces, too.

    `by_row`: each row has one of them, so that they may replace the same module; only not one within another.
    """
    problems = [
        f"{name} trains {whole} whole, which {other} adapts at {path}"
        for name, adapter in adapters.items()
        for whole in adapter.saved
        for other in adapters
        if other != name
        for path in adapters[other].parts
        if inside(path, whole) and not (by_row and path == whole)
    ]
    if problems:
        raise AdapterError(f"these adapters cannot be active together: {listing(problems)}")


def layer_key(path: str) -> str:
    """The key of a base layer in `lora_layers`: its path with / for the dots, which ModuleDict does not take."""
    key = path.replace("/", "//").replace(".", "/")
    return f"/{key}" if not key or hasattr(nn.ModuleDict, key) else key


def parts_by_path(adapters: list[Adapter]) -> dict[str, tuple[nn.Module, ...]]:
    found: dict[str, tuple[nn.Module, ...]] = {}
    for adapter in adapters:
        for path, part in adapter.parts.items():
            found[path] = (*found.get(path, ()), part)
    return found


def by_host(hosts: Mapping[str, str], parts: Mapping[str, tuple[nn.Module, ...]]) -> dict[str, tuple[nn.Module, ...]]:
    """By the path of the module that computes with them, in the order of the paths."""
    found: dict[str, tuple[nn.Module, ...]] = {}
    for path, each in parts.items():
        found[hosts[path]] = (*found.get(hosts[path], ()), *each)
    return found


def register(parts: dict[str, tuple[nn.Module, ...]]) -> nn.ModuleDict:
    """One entry per adapted layer: its part, or the list of its parts when several adapters are active."""
    return nn.ModuleDict(
        {layer_key(path): each[0] if len(each) == 1 else nn.ModuleList(each) for path, each in parts.items()}
    )


# ---- What is adapted, as a table that prints itself.


EXTRAS = {"bias": "bias", "trainable_tokens_delta": "token rows"}


@dataclass(frozen=True)
class Row:
    path: str
    layer_type: str
    shape: tuple[int, ...]
    r: int | None  # None for a module trained whole
    lora_alpha: float | None
    parameters: int


@dataclass(frozen=True)
class Summary:
    """Rows of the active adapters, and the parameters trained of all. `str()` gives the table."""

    rows: list[Row]
    trainable_parameters: int
    total_parameters: int

    def __str__(self) -> str:
        cells = [("path", "kind", "shape", "r", "alpha", "parameters")]
        for row in self.rows:
            alpha = "-" if row.lora_alpha is None else f"{row.lora_alpha:g}"
            shape = " x ".join(map(str, row.shape))
            cells.append((row.path, row.layer_type, shape, str(row.r or "-"), alpha, f"{row.parameters:,}"))
        widths = [max(len(line[column]) for line in cells) for column in range(6)]
        lines = [
            "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells
        ]
        share = self.trainable_parameters / max(self.total_parameters, 1)
        lines.append(f"trained: {self.trainable_parameters:,} of {self.total_parameters:,} parameters ({share:.2%})")
        return "\n".join(lines)


def summarise(base_model: nn.Module, adapters: list[Adapter]) -> Summary:
    rows = []
    for adapter in adapters:
        for path, layer in adapter.low_rank.items():
            shape = tuple(dense_shape(host_of(base_model, path), layer.layer_type.weight))
            shape = shape if layer.rows is None else (layer.out_features, layer.in_features)
            rows.append(Row(path, layer.layer_type.name, shape, layer.r, layer.lora_alpha, parameter_count(layer)))
        for path, module in adapter.saved.items():
            rows.append(Row(path, type(module).__name__, (), None, None, parameter_count(module)))
        for path, part in adapter.extras.items():
            for name, parameter in part.named_parameters():
                rows.append(Row(path, EXTRAS[name], tuple(parameter.shape), None, None, parameter.numel()))
    trained = sum(row.parameters for row in rows)
    return Summary(rows, trained, weight_count(base_model) + trained)


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
