"""An adapter of lower rank: the singular values of every update decide what goes.

How much goes is a rank, a share of the energy (the squared singular values of a layer), or a loss that may rise by
so much: then all layers' singular values stand in one line, the largest first, and the shortest beginning of the line
whose measured loss is within the budget is kept. A layer of which nothing is left is adapted no more.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tailora.core.adapter import Adapter, trained_copy
from tailora.core.combine import MIXED, Truncation, built, factors_of, is_mixed, is_number, per_group
from tailora.core.config import LoRAConfig
from tailora.core.layer import LoRALayer
from tailora.core.low_rank import (
    Factors,
    Spectrum,
    for_energy,
    low_rank,
    product_spectrum,
    rank_for_energy,
    tail,
    truncated,
    zeros,
)
from tailora.core.quantization import dense_weight
from tailora.core.targets import Selection, Target, select
from tailora.errors import AdapterError, BaseMismatchError, ConfigError, DivergedError, TargetError, listing

Ranks = Mapping[str, int]  # path -> rank per group; 0: the layer goes
Spectra = Mapping[str, Spectrum]
SAME = (
    *("lora_dropout", "fused_parts", "modules_to_save", "trainable_token_indices"),
    *("use_dora", "lora_bias", "bias"),
)


@torch.no_grad()
def spectra_of(adapter: Adapter) -> dict[str, Spectrum]:
    """Path -> all singular values of s (B A - B0 A0), without the strength. Raises AdapterError for what has none."""
    if problems := [f"{path}: {MIXED}" for path, layer in adapter.low_rank.items() if is_mixed(layer)]:
        raise AdapterError(f"this adapter cannot be made smaller: {listing(problems)}")
    return {path: product_spectrum(factors_of(layer, strength=False)) for path, layer in adapter.low_rank.items()}


def check(r: int | None, energy: float | None, loss: object = None, budget: float | None = None) -> None:
    """Raises ConfigError unless one way to choose the ranks is given, whole and in range."""
    ways = [name for name, value in (("r", r), ("energy", energy), ("loss", loss)) if value is not None]
    problems = [] if len(ways) == 1 else [f"give one way to choose the ranks: r, energy or loss; got {ways or 'none'}"]
    if r is not None and (isinstance(r, bool) or not isinstance(r, int) or r < 1):
        problems.append(f"r = {r!r}; take a whole number from 1 on")
    if energy is not None and not (is_number(energy) and 0 < energy <= 1):
        problems.append(f"energy = {energy!r}; take the share to keep, above 0, at most 1")
    if (loss is None) != (budget is None):
        problems.append("loss (a function of the model) and budget (how much it may rise) go together")
    if loss is not None and not callable(loss):
        problems.append(f"loss = {loss!r}; take a function of the model that returns a number")
    if budget is not None and not (is_number(budget) and budget >= 0):
        problems.append(f"budget = {budget!r}; take how much the loss may rise, from 0 on")
    if problems:
        raise ConfigError(listing(problems))


def ranks_of(adapter: Adapter, spectra: Spectra, r: int | None, energy: float | None) -> dict[str, int]:
    """At most rank r, or this share of every layer's energy; at least rank 1 (a group)."""
    if r is not None:
        layers = adapter.low_rank
        return {path: min(per_group(r, layers[path]), each.S.shape[1]) for path, each in spectra.items()}
    return {path: rank_for_energy(each.S, energy or 1.0) for path, each in spectra.items()}


def ranks_by_loss(spectra: Spectra, loss: Callable[[Ranks], float], budget: float) -> dict[str, int]:
    """The fewest singular values whose loss is at most that of all of them plus the budget, by halving.

    Takes about log2 of their number evaluations. What is returned was measured; that fewer do not suffice is only as
    sure as the loss falls with every value kept. Raises DivergedError for a loss that is not finite.
    """
    line = sorted(
        ((float(each.S[:, j].norm()), path, j) for path, each in spectra.items() for j in range(each.S.shape[1])),
        key=lambda value: -value[0],
    )

    def kept(count: int) -> dict[str, int]:
        ranks = dict.fromkeys(spectra, 0)
        for _, path, _ in line[:count]:
            ranks[path] += 1
        return ranks

    def measured(count: int) -> float:
        value = float(loss(kept(count)))
        if not math.isfinite(value):
            raise DivergedError(f"the loss with {count} of {len(line)} singular values is {value}")
        return value

    low, high = 1, len(line)
    allowed = measured(high) + budget
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if measured(middle) <= allowed else (middle + 1, high)
    return kept(high)


@torch.no_grad()
def shrunk(adapter: Adapter, spectra: Spectra, ranks: Ranks, base_model: nn.Module) -> tuple[Adapter, Truncation]:
    """The adapter cut to these ranks. Magnitudes, biases, token rows, strengths and modules trained whole come along as
    copies.

    A layer that is cut to nothing is adapted no more and has rank 0. It keeps a rank of zeros where it has a magnitude
    or a bias, or is a matrix of an attention or a stack of experts, for which files need both.
    """
    kept: dict[str, Factors] = {path: truncated(spectra[path], k) for path, k in ranks.items() if k}
    stay = [path for path in ranks if path not in kept and not _can_go(adapter.low_rank[path])]
    kept |= {path: zeros(truncated(spectra[path], 1)) for path in stay}
    settings = {name: getattr(adapter.config, name) for name in SAME}
    smaller = built(kept, base_model, saved=copy.deepcopy(adapter.saved), **settings)
    smaller = replace(smaller, extras=copy.deepcopy(adapter.extras))
    for path, layer in smaller.low_rank.items():
        source = adapter.low_rank[path]
        layer.strength.copy_(source.strength)
        _copied(layer.lora_magnitude_vector, source.lora_magnitude_vector)
        _copied(layer.bias, source.bias)
        _copied(layer.lora_bias, None if source.lora_bias is None else source.lora_bias * source.scaling)
    sizes = {path: smaller.low_rank[path].r if path in kept else 0 for path in ranks}
    return smaller, Truncation(sizes, {path: tail(spectra[path].S, k) for path, k in ranks.items()})


def _can_go(layer: LoRALayer) -> bool:
    return layer.is_plain and layer.layer_type.forward is None


def _copied(slot: nn.Parameter | None, source: Tensor | None) -> None:
    if slot is not None and source is not None:
        slot.copy_(source)


@contextmanager
def leading_only(adapter: Adapter, spectra: Spectra, ranks: Ranks) -> Iterator[None]:
    """Within the block these layers compute with the leading singular values of s (B A - B0 A0) alone, in place.

    ranks: path -> how many per group, at most what B holds (r); other layers stay. Afterwards all is as it was, to the
    bit. For measuring, not for training: a frozen start is part of the spectrum and is put aside.
    """
    layers = {path: adapter.low_rank[path] for path in ranks if adapter.low_rank[path].scaling.item()}
    names = ("lora_A", "lora_B", "start_A", "start_B", "lora_E")
    before = {path: {name: getattr(layer, name) for name in names} for path, layer in layers.items()}
    try:
        with torch.no_grad():
            for path, layer in layers.items():
                _replace_factors(layer, truncated(spectra[path], ranks[path]))
        yield
    finally:
        for path, layer in layers.items():
            for name, value in before[path].items():
                setattr(layer, name, value)


def _replace_factors(layer: LoRALayer, factors: Factors) -> None:
    """Fresh parameters that hold this update, filled up with zeros; what they replace is left alone."""
    missing = layer.lora_B.shape[1] - factors.A.shape[1]
    A = F.pad(factors.A, (0, 0, 0, missing)).reshape(layer.lora_A.shape) / layer.scaling.item()
    B = F.pad(factors.B, (0, missing)).reshape(layer.lora_B.shape)
    layer.lora_A = nn.Parameter(A.to(layer.lora_A), requires_grad=False)
    layer.lora_B = nn.Parameter(B.to(layer.lora_B), requires_grad=False)
    layer.start_A = layer.start_B = layer.lora_E = None


# ---- The adapter between two models: the best low rank of W_tuned - W_base, and what it cannot hold.


@dataclass(frozen=True)
class Extraction(Truncation):
    """Rank and error of every layer that differs, and what else differs and is not in the adapter.

    left_over: parameter or buffer -> ||tuned - base|| / ||base|| (inf where the base's is 0).
    """

    left_over: dict[str, float]


def extract(
    base: nn.Module,
    tuned: nn.Module,
    *,
    r: int | None,
    energy: float | None,
    config: LoRAConfig,
) -> tuple[Adapter, Extraction]:
    """An adapter of `base` that comes nearest to `tuned`, layer by layer; equal layers are not adapted.

    config: where to look (targets, and modules_to_save, which are taken over whole); its ranks are not used.
    Raises ConfigError, TargetError; BaseMismatchError with every parameter that is missing, unexpected or of another
    shape; AdapterError where no layer differs.
    """
    check(r, energy)
    check_same_shapes(base, tuned)
    selection = select(base, config.replaced(r=1, rank_pattern={}, alpha_pattern={}))
    factors, errors = {}, {}
    with torch.no_grad():
        for target in selection.targets:
            update = difference(target, tuned.get_submodule(target.host))
            if update.any():
                factors[target.path], errors[target.path] = (
                    low_rank(update, r if target.layer_type.stacked else math.ceil(r / len(update)))
                    if r
                    else for_energy(update, energy or 1)
                )
    if not factors:
        raise AdapterError("no selected layer differs between the two models; check the paths, or select other targets")
    copies = {path: trained_copy(tuned.get_submodule(path)) for path in selection.to_save}
    adapter = built(factors, base, saved=copies, modules_to_save=config.modules_to_save, fused_parts=config.fused_parts)
    ranks = {path: layer.r for path, layer in adapter.low_rank.items()}
    return adapter, Extraction(ranks, errors, left_over(base, tuned, selection))


def check_same_shapes(base: nn.Module, tuned: nn.Module) -> None:
    """Raises BaseMismatchError with all that the two state dicts do not share."""
    here = {name: tuple(value.shape) for name, value in base.state_dict().items()}
    there = {name: tuple(value.shape) for name, value in tuned.state_dict().items()}
    problems = [f"missing {name} {here[name]}" for name in here if name not in there]
    problems += [f"unexpected {name} {there[name]}" for name in there if name not in here]
    problems += [
        f"misshapen {name}: tuned {there[name]}, base {here[name]}"
        for name in here
        if name in there and there[name] != here[name]
    ]
    if problems:
        raise BaseMismatchError(f"the tuned model is not this base, trained: {listing(problems)}")


def difference(target: Target, tuned: nn.Module) -> Tensor:
    """W_tuned - W_base as B A sees it, (groups, out, in times kernel), in at least float32. Raises DivergedError."""
    weight = target.weight.detach()
    wide = torch.promote_types(weight.dtype, torch.float32)
    change = dense_weight(tuned, target.layer_type.weight).to(weight.device, wide) - weight.to(wide)
    if not change.isfinite().all():
        raise DivergedError(f"{target.path}: the difference of the two weights is not finite")
    matrix = target.matrix(change)
    if matrix is None:
        raise TargetError(f"{target.path}: a {target.layer_type.name}'s weight is not one matrix; exclude it")
    return matrix


def left_over(base: nn.Module, tuned: nn.Module, selection: Selection) -> dict[str, float]:
    """What differs and is neither a selected layer's weight nor in a module taken over whole."""
    parts: dict[str, list[Target]] = {}
    for target in selection.targets:
        parts.setdefault(f"{target.host}.{target.layer_type.weight}".removeprefix("."), []).append(target)
    trained = tuned.state_dict()
    changes = {}
    for name, value in base.state_dict().items():
        taken = any(name.startswith(f"{path}.") for path in selection.to_save)
        if taken or torch.equal(value, other := trained[name].to(value)):
            continue
        change = other.double() - value.double()
        for target in parts.get(name, []):
            change = _without(target, change)
        if change.any():
            start = float(value.double().norm())
            changes[name] = float(change.norm()) / start if start else math.inf
    return changes


def _without(target: Target, change: Tensor) -> Tensor:
    """The change of a weight but for the rows that the target adapts: all, unless it is a part of a fused layer."""
    if target.rows is None:
        return torch.zeros_like(change)
    others = 1 - target.rows.spread(change.new_ones(target.rows.size))  # (out,)
    return change * (others if target.layer_type.columns(target.layer) else others[:, None])
