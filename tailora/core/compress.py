"""Adapters of a lower rank: shrinking an adapter by its singular values, and extracting one from a fully tuned model.

Shrinking keeps the largest singular values of every update, up to a rank or a share of the energy: the squared singular
values of a layer. Extracting computes the best low-rank update for W_tuned - W_base.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from tailora.core import low_rank
from tailora.core.adapter import Adapter, trained_copy
from tailora.core.combine import (
    MIXES_GROUPS,
    Truncation,
    build_adapter,
    factors_of,
    is_number,
    mixes_groups,
    rank_per_group,
)
from tailora.core.config import LoRAConfig
from tailora.core.device import wide_dtype
from tailora.core.quantization import dense_weight
from tailora.core.targets import Selection, Target, select
from tailora.errors import AdapterError, BaseMismatchError, ConfigError, DivergedError, TargetError, listing

Ranks = Mapping[str, int]  # path -> rank per group
Spectra = Mapping[str, low_rank.Spectrum]
KEPT_SETTINGS = (
    *("lora_dropout", "fused_parts", "modules_to_save", "trainable_token_indices"),
    *("use_dora", "lora_bias", "bias"),
)


def check(r: int | None, energy: float | None) -> None:
    """Raises ConfigError unless either r or energy is given, with a valid value."""
    if (r is None) == (energy is None):
        raise ConfigError(f"expected either r or energy, got {'none' if r is None else 'both'}")
    if r is not None and (isinstance(r, bool) or not isinstance(r, int) or r < 1):
        raise ConfigError(f"expected an integer >= 1 for r, got {r!r}")
    if energy is not None and not (is_number(energy) and 0 < energy <= 1):
        raise ConfigError(f"expected a share above 0 and at most 1 for energy, got {energy!r}")


# ---- Selecting singular values


@torch.no_grad()
def spectra_of(adapter: Adapter) -> dict[str, low_rank.Spectrum]:
    """Returns the spectrum of s (B A - B0 A0) by path, without the strength. Raises AdapterError if there is none."""
    if problems := [f"{path}: {MIXES_GROUPS}" for path, layer in adapter.low_rank.items() if mixes_groups(layer)]:
        raise AdapterError(f"this adapter cannot be made smaller: {listing(problems)}")
    return {
        path: low_rank.product_spectrum(factors_of(layer, strength=False)) for path, layer in adapter.low_rank.items()
    }


@contextmanager
def leading_only(adapter: Adapter, spectra: Spectra, ranks: Ranks) -> Iterator[None]:
    """Within the block, layers use only leading singular values, for measuring. ranks: path -> number per group."""
    layers = {path: adapter.low_rank[path] for path in ranks if adapter.low_rank[path].scaling.item()}
    names = ("lora_A", "lora_B", "start_A", "start_B")
    before = {path: {name: getattr(layer, name) for name in names} for path, layer in layers.items()}
    try:
        with torch.no_grad():
            for path, layer in layers.items():
                factors = low_rank.truncated(spectra[path], ranks[path])
                missing = layer.lora_B.shape[1] - factors.A.shape[1]
                A = F.pad(factors.A, (0, 0, 0, missing)).reshape(layer.lora_A.shape) / layer.scaling.item()
                B = F.pad(factors.B, (0, missing)).reshape(layer.lora_B.shape)
                layer.lora_A = nn.Parameter(A.to(layer.lora_A), requires_grad=False)
                layer.lora_B = nn.Parameter(B.to(layer.lora_B), requires_grad=False)
                layer.start_A = layer.start_B = None
        yield
    finally:
        for path, layer in layers.items():
            for name, value in before[path].items():
                setattr(layer, name, value)


# ---- Shrinking


def shrink(adapter: Adapter, base_model: nn.Module, r: int | None, energy: float | None) -> tuple[Adapter, Truncation]:
    """Returns the adapter truncated to rank r, or to this share of every layer's energy. Everything else is copied.

    Raises AdapterError.
    """
    spectra, layers = spectra_of(adapter), adapter.low_rank
    if r is not None:
        ranks = {path: min(rank_per_group(r, layers[path]), S.shape[1]) for path, (_, S, _) in spectra.items()}
    else:
        ranks = {path: low_rank.rank_for_energy(S, energy or 1.0) for path, (_, S, _) in spectra.items()}
    factors = {path: low_rank.truncated(spectra[path], k) for path, k in ranks.items()}
    settings = {name: getattr(adapter.config, name) for name in KEPT_SETTINGS}
    smaller = build_adapter(factors, base_model, saved=copy.deepcopy(adapter.saved), **settings)
    smaller = replace(smaller, extras=copy.deepcopy(adapter.extras))
    with torch.no_grad():
        for path, layer in smaller.low_rank.items():
            source = adapter.low_rank[path]
            layer.strength = source.strength
            for slot, scale in (("lora_magnitude_vector", 1), ("bias", 1), ("lora_bias", source.scaling)):
                if (value := getattr(source, slot)) is not None:
                    getattr(layer, slot).copy_(value * scale)
    errors = {path: low_rank.truncation_error(spectra[path].S, k) for path, k in ranks.items()}
    return smaller, Truncation({path: layer.r for path, layer in smaller.low_rank.items()}, errors)


# ---- Extracting an adapter from a fully tuned model


@dataclass(frozen=True, repr=False)
class Extraction(Truncation):
    """Rank and error of every layer that differs, and the differences that are not in the adapter."""

    left_over: dict[str, float]  # parameter or buffer -> ||tuned - base|| / ||base|| (inf where the base's is 0)


@torch.no_grad()
def extract(
    base: nn.Module, tuned: nn.Module, *, r: int | None, energy: float | None, config: LoRAConfig
) -> tuple[Adapter, Extraction]:
    """Returns the adapter of `base` that best approximates `tuned`, layer by layer. Equal layers are not adapted.

    config: the layers to compare, and the modules_to_save, which are copied; its ranks are ignored.
    Raises ConfigError, TargetError; BaseMismatchError with all parameters that are missing, unexpected or have a
    different shape; AdapterError if no layer differs; DivergedError for NaN or infinity in a difference.
    """
    check(r, energy)
    base_shapes = {name: tuple(value.shape) for name, value in base.state_dict().items()}
    tuned_shapes = {name: tuple(value.shape) for name, value in tuned.state_dict().items()}
    if problems := [
        f"{name} has shape {tuned_shapes.get(name)} in the tuned model, but {base_shapes.get(name)} in the base"
        for name in {**base_shapes, **tuned_shapes}
        if tuned_shapes.get(name) != base_shapes.get(name)
    ]:
        raise BaseMismatchError(f"the tuned model does not match this base; use the matching base: {listing(problems)}")
    selection = select(base, config.replaced(r=1, rank_pattern={}, alpha_pattern={}))
    factors, errors = {}, {}
    for target in selection.targets:
        # W_tuned - W_base, (groups, out, in times kernel), in at least float32
        weight, tuned_layer = target.weight.detach(), tuned.get_submodule(target.layer_path)
        wide = torch.promote_types(weight.dtype, torch.float32)
        change = dense_weight(tuned_layer, target.layer_type.weight_name).to(weight.device, wide) - weight.to(wide)
        if not change.isfinite().all():
            raise DivergedError(f"{target.path}: the difference between the two weights contains NaN or infinity")
        update = target.matrix(change)
        if update is None:
            raise TargetError(
                f"{target.path}: the weight of a {target.layer_type.name} is not a single matrix; exclude it"
            )
        if update.any():
            factors[target.path], errors[target.path] = (
                low_rank.nearest_of_rank(update, r if target.layer_type.is_stacked else math.ceil(r / len(update)))
                if r
                else low_rank.nearest_for_energy(update, energy or 1)
            )
    if not factors:
        raise AdapterError("no selected layer differs between the two models; check the paths, or select other targets")
    adapter = build_adapter(
        factors,
        base,
        saved={path: trained_copy(tuned.get_submodule(path)) for path in selection.to_save},
        modules_to_save=config.modules_to_save,
        fused_parts=config.fused_parts,
    )
    ranks = {path: layer.r for path, layer in adapter.low_rank.items()}
    return adapter, Extraction(ranks, errors, _left_over(base, tuned, selection))


def _left_over(base: nn.Module, tuned: nn.Module, selection: Selection) -> dict[str, float]:
    """Returns the differences outside the weights of selected layers and outside copied modules."""
    targets: dict[str, list[Target]] = {}  # name of a weight -> the targets in it
    for target in selection.targets:
        name = f"{target.layer_path}.{target.layer_type.weight_name}".removeprefix(".")
        targets.setdefault(name, []).append(target)
    tuned_values = tuned.state_dict()
    left_over = {}
    for name, value in base.state_dict().items():
        copied = any(name.startswith(f"{path}.") for path in selection.to_save)
        if copied or torch.equal(value, tuned_value := tuned_values[name].to(value)):
            continue
        wide = wide_dtype(value.device)
        change = tuned_value.to(wide) - value.to(wide)
        for target in targets.get(name, []):
            if target.output_slice is None:
                change = torch.zeros_like(change)
            else:  # the other outputs of a fused layer
                mask = 1 - target.output_slice.spread(change.new_ones(target.output_slice.size))  # (out,)
                change = change * (mask if target.layer_type.is_transposed(target.layer) else mask[:, None])
        if change.any():
            norm = float(value.to(wide).norm())
            left_over[name] = float(change.norm()) / norm if norm else math.inf
    return left_over
