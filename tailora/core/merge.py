"""Folding updates into weights, and taking them out again with the same bits."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from tailora.core.attach import Swapped
from tailora.core.dequantize import Change, Exchange, made_plain, requantizing_error
from tailora.core.extras import TokenHead, TokenRows, TrainedBias, rows_behind
from tailora.core.geometry import own_share
from tailora.core.layer import LoRALayer
from tailora.core.layer_types import LAYER_TYPES, holder, qualified, weight_of
from tailora.core.quantization import dense_weight, is_quantized
from tailora.errors import MergeError, listing

BLOCK = 2**18  # numbers merged at a time: in float32 they stay near a core from the first step to the last


@dataclass(frozen=True)
class MergeReport:
    """Relative rounding error of every merged weight: ||W_merged - (W + dW)|| / ||dW||, 0 where dW is 0.

    In bfloat16 it is 17% where ||dW|| is a hundredth of ||W||, 79% at a thousandth (measured on random matrices).

    quantization_error: of layers whose weight was quantised, what quantising the merged one again would cost:
        ||Q(W_merged) - W_merged|| / ||dW||, on some rows. Near 1 the update would be lost. What is merged into is the
        dequantised weight, and it stays so.
    """

    rounding_error: dict[str, float]
    quantization_error: dict[str, float] = field(default_factory=dict)

    @property
    def worst(self) -> float:
        return max(self.rounding_error.values(), default=0.0)


def fold(layer: nn.Module, adapters: Sequence[LoRALayer], others: torch.dtype | None = None) -> tuple[Tensor, float]:
    """The layer's weight with the updates in it, summed in at least float32 and rounded once; its rounding error.

    W + sum of t ((g - 1) W + g s (B A - B0 A0)) over the adapters of strength t. The error is NaN where the weight is
    not finite. A quantised weight is dequantised first (`dense_weight`).
    """
    weight = dense_weight(layer, adapters[0].layer_type.weight, others)
    wide = torch.promote_types(weight.dtype, torch.float32)
    left, right, own = _terms(layer, adapters, wide)
    shape = len(left), left.shape[1], right.shape[2]
    merged = torch.empty_like(weight, memory_format=torch.contiguous_format)
    source, target = weight.reshape(shape), merged.view(shape)
    if own is None and weight.dtype == wide:  # nothing is rounded
        torch.baddbmm(source, left, right, out=target)
        finite = math.isfinite(float(merged.sum())) or bool(merged.isfinite().all())
        return merged, 0.0 if finite else math.nan
    blocks = list(_blocks(shape, BLOCK if weight.device.type == "cpu" else weight.numel()))
    scratch = torch.empty_like(source[blocks[0]], dtype=wide)
    errors, changes = [], []
    for groups, rows in blocks:
        block = source[groups, rows]
        exact = scratch[: len(block), : block.shape[1]].copy_(block)
        if own is not None:
            exact.mul_(own[groups] if own.shape[1] == 1 else own[groups, rows])
        exact.baddbmm_(left[groups, rows], right[groups])
        if own is not None:
            changes.append(torch.linalg.vector_norm(exact - block))
        rounded = target[groups, rows].copy_(exact)
        errors.append(torch.linalg.vector_norm(exact.sub_(rounded)))
    error, norm = (
        float(torch.stack(errors).norm()),
        float(torch.stack(changes).norm()) if changes else _norm(left, right),
    )
    return merged, error / norm if norm > 0 else error


def _terms(layer: nn.Module, adapters: Sequence[LoRALayer], wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """The merged weight is own * W + left @ right: left (groups, m, r), right (groups, r, n); own spreads over
    (groups, m, n), and is None where no adapter has a magnitude.
    """
    gains = [adapter.gain(layer, exact=True) for adapter in adapters]
    lefts, rights = zip(*(a.factors(layer, gain) for a, gain in zip(adapters, gains, strict=True)), strict=True)
    left, right = torch.cat([each.to(wide) for each in lefts], 2), torch.cat([each.to(wide) for each in rights], 1)
    own = own_share(layer, adapters, gains)
    return left, right, own if own is None else own.to(wide)


def _blocks(shape: tuple[int, int, int], numbers: int) -> Iterator[tuple[slice, slice]]:
    """Slices of the groups and of the rows that cut a (groups, m, n) weight into blocks of about `numbers`."""
    groups, m, n = shape
    if groups > 1:
        step = max(1, numbers // (m * n))
        yield from ((slice(start, start + step), slice(None)) for start in range(0, groups, step))
    else:
        step = max(1, numbers // n)
        yield from ((slice(None), slice(start, start + step)) for start in range(0, m, step))


def _norm(left: Tensor, right: Tensor) -> float:
    """Of the product, without forming it: the sum of (L^T L) * (R R^T) is its square."""
    left, right = left.cpu().double(), right.cpu().double()
    return float(((left.mT @ left) * (right @ right.mT)).sum().clamp(min=0).sqrt())


@torch.no_grad()
def fit_in_place(
    model: nn.Module, layers: Mapping[str, tuple[nn.Module, Sequence[nn.Module]]]
) -> dict[str, tuple[nn.Module, list[LoRALayer]]]:
    """The layers whose weight can take its updates itself: nothing else changes in them, no other parameter has its
    memory, and every number of it stays finite.
    """
    users: Counter[int] = Counter(
        parameter.untyped_storage().data_ptr() for _, parameter in model.named_parameters(remove_duplicate=False)
    )
    found = {}
    for path, (layer, parts) in layers.items():
        updates = [part for part in parts if isinstance(part, LoRALayer)]
        alone = len(updates) == len(parts) and len({part.layer_type.weight for part in updates}) == 1
        if alone and _unmergeable(layer, parts) is None and _has_room(layer, updates, users):
            found[path] = (layer, updates)
    return found


def _has_room(layer: nn.Module, updates: Sequence[LoRALayer], users: Mapping[int, int]) -> bool:
    """||W|| + ||L|| ||R|| bounds every number of the merged weight; twice that, since norms are rounded, too."""
    if is_quantized(layer) or merged_bias(layer, updates) is not None:
        return False
    weight = weight_of(layer, updates[0].layer_type.weight).detach()
    if users.get(weight.untyped_storage().data_ptr()) != 1 or not weight.is_contiguous() or weight.is_inference():
        return False
    left, right, own = _terms(layer, updates, torch.promote_types(weight.dtype, torch.float32))
    norm = torch.linalg.vector_norm
    largest = float(norm(weight)) + float(norm(left)) * float(norm(right))  # the largest number itself: 10x slower
    return own is None and 2 * largest < torch.finfo(weight.dtype).max


@torch.no_grad()
def fold_in_place(layer: nn.Module, adapters: Sequence[LoRALayer]) -> None:
    """The numbers of `fold`, written over a weight that can take them (`fit_in_place`)."""
    weight = weight_of(layer, adapters[0].layer_type.weight).detach()
    wide = torch.promote_types(weight.dtype, torch.float32)
    left, right, _ = _terms(layer, adapters, wide)
    shape = len(left), left.shape[1], right.shape[2]
    target = weight.view(shape)
    if weight.dtype == wide:
        target.baddbmm_(left, right)
        return
    blocks = list(_blocks(shape, BLOCK if weight.device.type == "cpu" else weight.numel()))
    scratch = torch.empty_like(target[blocks[0]], dtype=wide)
    for groups, rows in blocks:
        block = target[groups, rows]
        exact = scratch[: len(block), : block.shape[1]].copy_(block)
        block.copy_(exact.baddbmm_(left[groups, rows], right[groups]))


@torch.no_grad()
def folded(
    layers: Mapping[str, tuple[nn.Module, Sequence[nn.Module]]], others: torch.dtype | None = None
) -> tuple[list[Change], MergeReport]:
    """The merged tensors of every layer, nothing written yet. `others`: precision of the model's plain weights.

    Raises MergeError with all layers whose merged weight is not finite or whose class hides what it computes.
    """
    problems = [f"{path}: {reason}" for path, each in layers.items() if (reason := _unmergeable(*each))]
    if problems:
        raise MergeError(listing(problems))
    exchanges: list[Change] = []
    errors: dict[str, float] = {}
    again: dict[str, float] = {}
    tied: dict[object, nn.Parameter] = {}  # what an embedding and its head share stays shared
    for path, layer, parts in _by_weight(layers):
        updates = [part for part in parts if isinstance(part, LoRALayer)]
        merged = None
        if updates:
            merged, errors[path] = fold(layer, updates, others)
            if not math.isfinite(errors[path]) and not merged.isfinite().all():
                problems.append(f"{path}: the merged weight is not finite in {merged.dtype}; load the base in float32")
        if rows := [part for part in parts if isinstance(part, TokenRows | TokenHead)]:
            merged = with_rows(layer, merged, rows)
        if merged is not None and is_quantized(layer):
            exchanges += made_plain(layer, merged)
            again[path] = requantizing_error(layer, dense_weight(layer, others=others), merged)
        elif merged is not None:
            module, name = holder(layer, updates[0].layer_type.weight if updates else "weight")
            key = path if updates else (id(weight_of(layer)), *(id(rows_behind(part)) for part in rows))
            exchanges.append(Exchange(module, name, tied.setdefault(key, nn.Parameter(merged, requires_grad=False))))
        if (bias := merged_bias(layer, parts)) is not None:
            exchanges.append(Exchange(layer, "bias", nn.Parameter(bias, requires_grad=False)))
    if problems:
        raise MergeError(listing(problems))
    return exchanges, MergeReport(errors, again)


def _by_weight(
    layers: Mapping[str, tuple[nn.Module, Sequence[nn.Module]]],
) -> Iterator[tuple[str, nn.Module, list[nn.Module]]]:
    """Path, layer and what changes each weight: all parts of a fused one together, each of several apart."""
    for path, (layer, parts) in layers.items():
        names = [part.layer_type.weight if isinstance(part, LoRALayer) else "weight" for part in parts]
        for name in dict.fromkeys(names):
            where = path if name == "weight" else f"{path}.{name}".removeprefix(".")
            yield where, layer, [part for part, own in zip(parts, names, strict=True) if own == name]


def with_rows(layer: nn.Module, merged: Tensor | None, parts: Sequence[TokenRows | TokenHead]) -> Tensor:
    """The layer's weight, or what it is `merged` to already, with the trained rows in it."""
    weight = (weight_of(layer) if merged is None else merged).detach().clone()
    for part in parts:
        indices, change = part.row_change(layer)
        weight[indices] = (weight[indices] + change).to(weight.dtype)
    return weight


def moved_in(module: nn.Module, trained: nn.Module, made: dict[int, nn.Parameter] | None = None) -> Iterator[Exchange]:
    """The tensors of a copy that was trained whole, in the precision of the module that they come to.

    made: what parameters of other copies became, so that what is shared stays shared.
    """
    made = {} if made is None else made
    for own, copy in zip(module.modules(), trained.modules(), strict=True):
        for name, parameter in own._parameters.items():
            if parameter is not None:
                source = cast(nn.Parameter, copy._parameters[name])
                if id(source) not in made:
                    value = source.detach().to(parameter.dtype, copy=True)
                    made[id(source)] = nn.Parameter(value, requires_grad=False)
                yield Exchange(own, name, made[id(source)])
        for name, buffer in own._buffers.items():
            if buffer is not None:
                yield Exchange(own, name, copy._buffers[name].detach().clone())  # type: ignore[union-attr]


def settle_ties(model: nn.Module, changes: Sequence[Change], untie_weights: bool) -> bool:
    """Refuse weights that another layer shares; True when there are some and each layer may get its own.

    An exchange replaces the parameter of one module only, so the others keep the shared one.
    """
    shared = list(_shared(model, [change for change in changes if isinstance(change, Exchange)]))
    if shared and not untie_weights:
        raise MergeError(
            f"merging would change a weight that another layer shares ({', '.join(shared)}); pass untie_weights=True"
        )
    return bool(shared)


def _shared(model: nn.Module, exchanges: Sequence[Exchange]) -> Iterator[str]:
    users: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                users.setdefault(id(parameter), []).append((path, module, name))
    becomes = {(id(exchange.module), exchange.name): exchange.tensor for exchange in exchanges}
    for exchange in exchanges:
        parameter = exchange.module._parameters.get(exchange.name)
        places = users.get(id(parameter), [])
        here = [path for path, module, name in places if module is exchange.module and name == exchange.name]
        others = [path for path, module, name in places if becomes.get((id(module), name)) is not exchange.tensor]
        if others:
            yield f"{here[0]} = {' = '.join(others)}"


def merged_bias(layer: nn.Module, parts: Sequence[nn.Module]) -> Tensor | None:
    """The layer's bias with what the parts add to it, rounded once; None where nothing is added."""
    able = [part for part in parts if isinstance(part, LoRALayer | TrainedBias)]
    changes = [change for part in able if (change := part.bias_change(layer)) is not None]
    if not changes:
        return None
    bias = cast(Tensor, layer.bias)
    return (bias + torch.stack(changes).sum(0)).to(bias.dtype)


def _unmergeable(layer: nn.Module, parts: Sequence[nn.Module]) -> str | None:
    if all(isinstance(part, TrainedBias) for part in parts):
        return None
    if getattr(layer, "bias", None) is None and any(getattr(part, "lora_bias", None) is not None for part in parts):
        return "lora_bias needs a bias to merge into, and the layer has none; keep it unmerged"
    if nn.utils.parametrize.is_parametrized(layer):
        return "its weight is computed by a parametrization; remove that first"
    cls = layer.plain if isinstance(layer, Swapped) else type(layer)
    if is_quantized(layer):
        return None
    own = next(parent for parent in cls.__mro__ if "forward" in vars(parent))
    computed = isinstance(parts[0], LoRALayer) and parts[0].layer_type.forward is not None
    if not computed and qualified(own) not in LAYER_TYPES and getattr(layer, "embed_scale", None) is None:
        return f"{cls.__name__} overrides forward, so its weight alone does not say what it computes; keep it unmerged"
    return None
