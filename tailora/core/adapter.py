"""One adapter: its config and its parts, by the path of the module or parameter that each part changes.

`create` makes a fresh one for the layers selected by `core.targets.select`; `low_rank_layer`, `trained_copy` and
`extra_parts` make its parts. The rest combines the parts of several adapters by path and summarizes what is adapted.
"""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tailora.core.attach import detach
from tailora.core.config import LoRAConfig
from tailora.core.extras import ExtraTargets, TokenHead, TokenRows, TrainedBias
from tailora.core.init import WEIGHT_INITS, check_init, init_from_weight
from tailora.core.layer import INITS, LoRALayer
from tailora.core.layer_types import computing_device, layer_of, weight_of, whole_tensor
from tailora.core.patterns import inside
from tailora.core.quantization import dense_shape, stored_weight, weight_count
from tailora.core.targets import Selection, Target
from tailora.errors import AdapterError, FormatError, listing


@dataclass(frozen=True)
class Adapter:
    """A config and its parts by path.

    extras: trained biases, and rows of embeddings with the heads tied to them.
    """

    config: LoRAConfig
    low_rank: dict[str, LoRALayer]  # the low-rank updates
    saved: dict[str, nn.Module] = field(default_factory=dict)  # trained copies of complete modules (`modules_to_save`)
    extras: dict[str, nn.Module] = field(default_factory=dict)
    waits_for_data: bool = False  # its initial values still have to be computed from data

    @property
    def has_start(self) -> bool:
        """True if any layer's update is s (B A - B0 A0), with a frozen start."""
        return any(layer.has_start for layer in self.low_rank.values())

    @property
    def parts(self) -> dict[str, nn.Module]:
        return {**self.low_rank, **self.saved, **self.extras}

    def missing_data(self, name: str) -> str:
        """Returns the missing call before the adapter can be trained or saved; "" if there is none."""
        if not self.waits_for_data:
            return ""
        return (
            f"adapter {name!r} is initialized from data (init_lora_weights={self.config.init_lora_weights!r}); call "
            "start_from_data(batches) first"
        )

    def check_can_be_saved(self, name: str) -> None:
        """Raises AdapterError if the adapter is incomplete, FormatError if the name is not a valid folder name."""
        if reason := self.missing_data(name):
            raise AdapterError(reason)
        if name in (".", "..") or "\0" in name or Path(name).name != name:
            raise FormatError(
                f"adapter name {name!r} is not a valid folder name; add the adapter under a different name"
            )


# ---- A fresh adapter


def create(selection: Selection, *, fresh: bool = True) -> Adapter:
    """Returns a new adapter for the selected layers, on their devices. It does not change their outputs yet.

    fresh=False: factors and frozen starts are zero, to be filled from a state dict.
    Raises TargetError if a layer does not support the config's initialization.
    """
    config, init = selection.config, selection.config.init_lora_weights
    check_init(selection.targets, init)
    saved = {path: trained_copy(module) for path, module in selection.to_save.items()}
    share_parameters(selection.to_save, saved)
    extras = extra_parts(selection.extras, selection.modules)
    low_rank = {target.path: low_rank_layer(target, config, fresh=fresh) for target in selection.targets}
    if not fresh:
        for layer in low_rank.values():
            for factor in (layer.lora_A, layer.lora_B):
                nn.init.zeros_(factor)
            if init in WEIGHT_INITS:
                layer.start_from(layer.lora_A, layer.lora_B)
        return Adapter(config, low_rank, saved, extras)
    if init in WEIGHT_INITS:
        for target in selection.targets:
            init_from_weight(low_rank[target.path], target, init)
    return Adapter(config, low_rank, saved, extras, waits_for_data=init == "eva")


def low_rank_layer(target: Target, config: LoRAConfig, *, fresh: bool = True) -> LoRALayer:
    """Returns an update for this layer. fresh=False leaves the factors uninitialized, without random numbers."""
    in_features, out_features = target.dims
    weight = stored_weight(target.layer, target.layer_type.weight_name)  # the dense value is not needed
    shape_A, shape_B = target.layer_type.shapes(target.layer, target.r)
    # "kaiming" until it is filled from the weight or from data
    random = config.init_lora_weights if config.init_lora_weights in INITS else "kaiming"
    layer = LoRALayer(
        in_features,
        out_features,
        target.r,
        target.lora_alpha,
        config.learn_scaling,
        lora_dropout=config.lora_dropout,
        lora_bias=config.lora_bias,
        use_rslora=config.use_rslora,
        init_lora_weights=random if fresh else None,
        layer_type=target.layer_type,
        shapes=(shape_A, (target.output_slice.size, *shape_B[1:]) if target.output_slice else shape_B),
        groups=target.layer_type.groups(target.layer),
        output_slice=target.output_slice,
        device=computing_device(weight),
        dtype=adapter_dtype(weight.dtype),
    )
    if config.use_dora:
        layer.add_dora(target.layer)
    if config.bias != "none":
        layer.add_trained_bias(target.layer)
    return layer


def adapter_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns float32 for a 16-bit or quantized base: in bfloat16 half of the steps of 2e-5 vanish (measured)."""
    return dtype if dtype == torch.float64 else torch.float32


def trained_copy(module: nn.Module) -> nn.Module:
    """Returns a copy of a module for full training, with its original classes, in float32 if the base has 16 bits."""
    clone = copy.deepcopy(module)
    for part in clone.modules():
        detach(part)
    for owner in clone.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if (whole := whole_tensor(parameter)) is not parameter:
                owner._parameters[name] = nn.Parameter(whole)
                owner._load_state_dict_post_hooks.clear()  # FSDP2's hooks are for the copied module
    for parameter in clone.parameters():
        parameter.data = parameter.data.to(adapter_dtype(parameter.dtype))
    return clone.requires_grad_()


def share_parameters(modules: Mapping[str, nn.Module], copies: Mapping[str, nn.Module]) -> None:
    """Ties parameters of `copies` whose `modules` (same paths) are tied, such as an embedding and its head."""
    owners: dict[int, tuple[nn.Module, str]] = {}  # id of a module's parameter -> the first copy of it
    for path, saved_module in modules.items():
        for inner_path, module in saved_module.named_modules():
            owner = copies[path].get_submodule(inner_path)
            for name, parameter in module._parameters.items():
                first, first_name = owners.setdefault(id(parameter), (owner, name))
                shared, separate = first._parameters[first_name], owner._parameters[name]
                if first is owner or shared is None or separate is None:
                    continue
                if torch.equal(shared, separate):
                    owner._parameters[name] = shared


def extra_parts(targets: ExtraTargets, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Returns trained biases, rows of embeddings and tied heads by path. They do not change outputs yet."""
    biases: dict[str, nn.Module] = {}
    for path in targets.biases:
        layer: Any = modules[path]
        biases[path] = TrainedBias(layer, adapter_dtype(layer.bias.dtype))
    tokens = {
        path: TokenRows(modules[path], indices, adapter_dtype(weight_of(modules[path]).dtype))
        for path, indices in targets.tokens.items()
    }
    return {**biases, **tokens, **{head: TokenHead(tokens[path]) for head, path in targets.heads.items()}}


def with_strength(adapter: Adapter, strength: float) -> Adapter:
    """Returns the adapter times `strength`, sharing all tensors; trained copies of modules stay unchanged."""

    def scaled(part: Any) -> Any:
        clone = copy.copy(part)  # with the same parameters
        clone.strength *= strength
        return clone

    low_rank = {path: scaled(layer) for path, layer in adapter.low_rank.items()}
    extras = {path: scaled(part) for path, part in adapter.extras.items() if not isinstance(part, TokenHead)}
    rows = {id(adapter.extras[path]): part for path, part in extras.items()}
    for path, part in adapter.extras.items():
        if isinstance(part, TokenHead):
            extras[path] = TokenHead(rows[id(part.token_rows)])
    return replace(adapter, low_rank=low_rank, extras=extras)


# ---- The parts of several adapters


def check_compatible(adapters: Mapping[str, Adapter], *, by_row: bool = False) -> None:
    """Raises AdapterError if one replaces what another changes. by_row: two may replace the same module."""
    problems = [
        f"{name} trains {saved_path} in full, and {second_name} adapts {path}"
        for name, adapter in adapters.items()
        for saved_path in adapter.saved
        for second_name, second in adapters.items()
        if second_name != name
        for path in second.parts
        if inside(path, saved_path) and not (by_row and path == saved_path)
    ]
    if problems:
        raise AdapterError(f"these adapters cannot be active together; use one at a time: {listing(problems)}")


def group_by_path(parts: Iterable[tuple[str, nn.Module]]) -> dict[str, tuple[nn.Module, ...]]:
    groups: dict[str, tuple[nn.Module, ...]] = {}
    for path, part in parts:
        groups[path] = (*groups.get(path, ()), part)
    return groups


def as_module(parts: Mapping[str, tuple[nn.Module, ...]]) -> nn.ModuleDict:
    """Returns `lora_layers`: path -> its part, or the list of its parts if several adapters are active."""
    return nn.ModuleDict(
        {
            layer_key(path): layer_parts[0] if len(layer_parts) == 1 else nn.ModuleList(layer_parts)
            for path, layer_parts in parts.items()
        }
    )


def layer_key(path: str) -> str:
    """Returns the key of a path in `lora_layers`: / replaces the dots, which nn.ModuleDict does not allow."""
    key = path.replace("/", "//").replace(".", "/")
    return f"/{key}" if not key or hasattr(nn.ModuleDict, key) else key


# ---- Summary of the adapted layers, as a printable table


@dataclass(frozen=True)
class SummaryRow:
    path: str
    layer_type: str
    shape: tuple[int, ...]
    r: int | None  # None for a module trained in full
    lora_alpha: float | None
    parameters: int


@dataclass(frozen=True)
class Summary:
    """A row for each adapted layer of the active adapters, and the numbers of parameters. `str()` returns the table."""

    rows: list[SummaryRow]
    trainable_parameters: int
    total_parameters: int

    def __str__(self) -> str:
        cells = [("path", "layer type", "shape", "r", "alpha", "parameters")]
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


EXTRA_NAMES = {"bias": "bias", "trainable_tokens_delta": "token rows"}  # parameter of an extra part -> in the table


def summarize(base_model: nn.Module, adapters: Iterable[Adapter]) -> Summary:
    rows = []
    for adapter in adapters:
        for path, layer in adapter.low_rank.items():
            shape = tuple(dense_shape(layer_of(base_model, path), layer.layer_type.weight_name))
            shape = shape if layer.output_slice is None else (layer.out_features, layer.in_features)
            layer_type = layer.layer_type.name
            rows.append(SummaryRow(path, layer_type, shape, layer.r, layer.lora_alpha, parameter_count(layer)))
        for path, module in adapter.saved.items():
            rows.append(SummaryRow(path, type(module).__name__, (), None, None, parameter_count(module)))
        for path, part in adapter.extras.items():
            for name, parameter in part.named_parameters():
                shape = tuple(parameter.shape)
                rows.append(SummaryRow(path, EXTRA_NAMES[name], shape, None, None, parameter.numel()))
    trained = sum(row.parameters for row in rows)
    return Summary(rows, trained, weight_count(base_model) + trained)


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
