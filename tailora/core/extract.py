"""The adapter between two models: the best low rank of W_tuned - W_base, and what it cannot hold."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tailora.core.adapter import Adapter, trained_copy
from tailora.core.combine import Truncation
from tailora.core.compress import check
from tailora.core.config import LoRAConfig
from tailora.core.low_rank import for_energy, low_rank
from tailora.core.quantization import dense_weight
from tailora.core.targets import Selection, Target, select
from tailora.core.updates import built
from tailora.errors import AdapterError, BaseMismatchError, DivergedError, TargetError, listing


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
                    low_rank(update, r if target.kind.stacked else math.ceil(r / len(update)))
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
    change = dense_weight(tuned, target.kind.weight).to(weight.device, wide) - weight.to(wide)
    if not change.isfinite().all():
        raise DivergedError(f"{target.path}: the difference of the two weights is not finite")
    matrix = target.matrix(change)
    if matrix is None:
        raise TargetError(f"{target.path}: a {target.kind.name}'s weight is not one matrix; exclude it")
    return matrix


def left_over(base: nn.Module, tuned: nn.Module, selection: Selection) -> dict[str, float]:
    """What differs and is neither a selected layer's weight nor in a module taken over whole."""
    parts: dict[str, list[Target]] = {}
    for target in selection.targets:
        parts.setdefault(f"{target.host}.{target.kind.weight}".removeprefix("."), []).append(target)
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
    return change * (others if target.kind.columns(target.layer) else others[:, None])
