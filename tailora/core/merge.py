"""Merging updates into the weights of a base model, and restoring the original bits.

MergeState           whether a model is merged, and how to restore its weights
merge_changes        the merged tensors of all layers, before anything is written
merged_weight        W + dW of one layer, rounded once; written over W if `fits_in_place`
check_ties           weights that several modules share
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from tailora.core.attach import Adapted, Change, Substituted, TensorChange, attach, attached_parts
from tailora.core.dora import weight_scale
from tailora.core.extras import TokenHead, TokenRows, TrainedBias
from tailora.core.layer import LoRALayer
from tailora.core.layer_calls import use_of
from tailora.core.layer_types import forward_obstacle, parameter_owner, weight_of
from tailora.core.quantization import common_dtype, dense_weight, dequantize_layer, dequantize_model, is_quantized
from tailora.errors import MergeError, listing

BLOCK = 2**18  # numbers merged at a time: in float32 they stay in the core's cache through all steps
LayerParts = tuple[nn.Module, Sequence[nn.Module]]  # a layer, and the parts of adapters attached to it


@dataclass(frozen=True)
class MergeReport:
    """Relative rounding error of every merged weight: ||W_merged - (W + dW)|| / ||dW||, 0 if dW is 0.

    In bfloat16 it is 17% if ||dW|| is a hundredth of ||W||, and 79% at a thousandth (measured on random matrices).
    """

    rounding_error: dict[str, float]

    @property
    def worst(self) -> float:
        return max(self.rounding_error.values(), default=0.0)


class MergeState:
    """Whether updates are merged into the weights of `base_model`, and how to restore the weights."""

    def __init__(self, base_model: nn.Module) -> None:
        self.base_model = base_model
        self._undo: list[Change] = []
        self.config_untied = False  # tie_word_embeddings of the model's config is False while merged

    @property
    def is_merged(self) -> bool:
        return bool(self._undo)

    def check_unmerged(self, action: str) -> None:
        if self.is_merged:
            raise MergeError(f"cannot {action} while merged; call unmerge() first")

    def merge(self, layers: Mapping[str, nn.Module], *, untie_weights: bool, in_place: bool = False) -> MergeReport:
        """Merges the attached parts into the weights of these layers, and detaches them.

        All merged weights are computed and checked to be finite before the first one is written. Raises MergeError.
        in_place: overwrite weights for which `fits_in_place` is true; they cannot be restored.
        """
        self.check_unmerged("merge")
        attached = {path: (layer, parts) for path, layer in layers.items() if (parts := attached_parts(layer))}
        if not attached:
            raise MergeError("no adapter is active; call set_adapter(name) first")
        adapted = {path: layer_parts for path, layer_parts in attached.items() if isinstance(layer_parts[0], Adapted)}
        overwritten: list[str] = []
        if in_place:
            parameters_by_name = self.base_model.named_parameters(remove_duplicate=False)
            users = Counter(parameter.untyped_storage().data_ptr() for _, parameter in parameters_by_name)
            overwritten = [
                path
                for path, layer_parts in adapted.items()
                if not _is_only_read(self.base_model, path) and fits_in_place(*layer_parts, users)
            ]
        report = MergeReport({})
        replaced = {path: layer_parts for path, layer_parts in adapted.items() if path not in overwritten}
        changes = list(merge_changes(self.base_model, replaced, report))
        parameters: dict[int, nn.Parameter] = {}
        for layer, parts in attached.values():
            if isinstance(layer, Substituted):
                changes += replace_by_copy(layer, parts[0], parameters)
        untied = check_ties(self.base_model, changes, untie_weights)
        for path in overwritten:
            layer, parts = adapted[path]
            merged_weight(layer, cast(Sequence[LoRALayer], parts), in_place=True)
        self._undo = [change.make() for change in changes]
        config: Any = getattr(self.base_model, "config", None)
        if untied and getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings, self.config_untied = False, True
        for layer, _ in attached.values():
            attach(layer, ())
        return report

    def unmerge(self) -> None:
        """Restores the original weights bit for bit."""
        if not self.is_merged:
            raise MergeError("cannot unmerge, because nothing is merged; call merge() first")
        for change in reversed(self._undo):
            change.make()
        if self.config_untied:
            cast(Any, self.base_model).config.tie_word_embeddings = True
        self._undo, self.config_untied = [], False

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Applies `fn` to the weights that `unmerge` restores. Raises MergeError for a quantized base."""
        exchanges = [change for change in self._undo if isinstance(change, TensorChange)]
        if len(exchanges) < len(self._undo):
            raise MergeError("a merged quantized base cannot be moved or cast; call unmerge() first")
        for exchange in exchanges:
            exchange.tensor.data = fn(exchange.tensor.data)


# ---- The merged tensors of all layers


@torch.no_grad()
def merge_changes(base_model: nn.Module, layers: Mapping[str, LayerParts], report: MergeReport) -> Iterator[Change]:
    """Yields the changes that install the merged tensors of these layers, layer by layer, and fills in the report.

    If a layer is quantized, the whole model is dequantized. Raises MergeError with all layers that compute an unknown
    function, or, after the last change, with all merged weights that contain NaN or infinity.
    """
    problems = [f"{path}: {reason}" for path, layer_parts in layers.items() if (reason := _obstacle(*layer_parts))]
    problems += [
        f"{path}: only the layer's weight is used, so its adapter has no effect now, but would have one after "
        "merging; exclude the layer (exclude_modules), or keep the adapter unmerged"
        for path, (layer, parts) in layers.items()
        if _is_only_read(base_model, path)
        and any(bool(part.delta_weight(layer).any()) for part in parts if isinstance(part, LoRALayer))
    ]
    if problems:
        raise MergeError(listing(problems))
    dtype = common_dtype(base_model)
    tied: dict[object, nn.Parameter] = {}  # keeps an embedding and its head tied
    for path, layer, parts in _by_weight(layers):
        updates = [part for part in parts if isinstance(part, LoRALayer)]
        merged = None
        if updates:
            merged, error = merged_weight(layer, updates, dtype)
            report.rounding_error[path] = error
            if not math.isfinite(error) and not merged.isfinite().all():
                problems.append(f"{path}: the merged weight is not finite in {merged.dtype}; load the base in float32")
        if token_parts := [part for part in parts if isinstance(part, TokenRows | TokenHead)]:
            merged = (weight_of(layer) if merged is None else merged).detach().clone()
            for part in token_parts:
                indices, change = part.row_change(layer)
                merged[indices] = (merged[indices] + change).to(merged.dtype)
        if merged is not None and is_quantized(layer):
            yield from dequantize_layer(layer, merged)
        elif merged is not None:
            module, name = parameter_owner(layer, updates[0].layer_type.weight_name if updates else "weight")
            parameter = nn.Parameter(merged, requires_grad=False)
            if not updates:
                key = id(weight_of(layer)), *(id(getattr(part, "token_rows", part)) for part in token_parts)
                parameter = tied.setdefault(key, parameter)
            yield TensorChange(module, name, parameter)
        if (bias := _merged_bias(layer, parts)) is not None:
            yield TensorChange(layer, "bias", nn.Parameter(bias, requires_grad=False))
    if problems:
        raise MergeError(listing(problems))
    if quantized := [layer for layer, _ in layers.values() if is_quantized(layer)]:
        yield from dequantize_model(base_model, quantized, dtype)


def _is_only_read(base_model: nn.Module, path: str) -> bool:
    """True if the parent module reads the layer's weight and never calls the layer."""
    owner, _, name = path.rpartition(".")
    return use_of(base_model.get_submodule(owner), name) == "read"


def _by_weight(layers: Mapping[str, LayerParts]) -> Iterator[tuple[str, nn.Module, list[nn.Module]]]:
    """Yields the path and layer of every changed weight, and all parts that change it."""
    for path, (layer, parts) in layers.items():
        names = [part.layer_type.weight_name if isinstance(part, LoRALayer) else "weight" for part in parts]
        for name in dict.fromkeys(names):
            weight_path = path if name == "weight" else f"{path}.{name}".removeprefix(".")
            yield weight_path, layer, [part for part, part_name in zip(parts, names, strict=True) if part_name == name]


def _merged_bias(layer: nn.Module, parts: Iterable[nn.Module]) -> Tensor | None:
    """Returns the layer's bias plus the changes of the parts, rounded once; None if nothing changes."""
    biased = [part for part in parts if isinstance(part, LoRALayer | TrainedBias)]
    changes = [change for part in biased if (change := part.bias_change(layer)) is not None]
    if not changes:
        return None
    bias = cast(Tensor, layer.bias)
    return (bias + torch.stack(changes).sum(0)).to(bias.dtype)


def _obstacle(layer: nn.Module, parts: Sequence[nn.Module]) -> str | None:
    """Returns why these parts cannot be merged into the layer; None if they can."""
    if all(isinstance(part, TrainedBias) for part in parts):
        return None
    if getattr(layer, "bias", None) is None and any(getattr(part, "lora_bias", None) is not None for part in parts):
        return "lora_bias cannot be merged, because the layer has no bias; keep the adapter unmerged"
    if nn.utils.parametrize.is_parametrized(layer):
        return "its weight is computed by a parametrization; remove the parametrization first"
    return None if is_quantized(layer) else forward_obstacle(layer)


def replace_by_copy(
    module: nn.Module, trained: nn.Module, parameters: dict[int, nn.Parameter]
) -> Iterator[TensorChange]:
    """Yields the changes that install a trained copy. parameters: new ones by id of the copy's; they keep ties."""
    for target, copy in zip(module.modules(), trained.modules(), strict=True):
        for name, parameter in target._parameters.items():
            if parameter is not None:
                source = cast(nn.Parameter, copy._parameters[name])
                if id(source) not in parameters:
                    value = source.detach().to(parameter.dtype, copy=True)
                    parameters[id(source)] = nn.Parameter(value, requires_grad=False)
                yield TensorChange(target, name, parameters[id(source)])
        for name, buffer in target._buffers.items():
            if buffer is not None:
                yield TensorChange(target, name, cast(Tensor, copy._buffers[name]).detach().clone())


# ---- The merged weight of one layer


@torch.no_grad()
def merged_weight(
    layer: nn.Module, adapters: Sequence[LoRALayer], dtype: torch.dtype | None = None, *, in_place: bool = False
) -> tuple[Tensor, float]:
    """Returns W + sum of t ((g - 1) W + g s (B A - B0 A0)) over the adapters of strength t, and its rounding error.

    Computed in at least float32 and rounded once. The error is NaN if the weight is not finite.
    dtype: of the model's plain weights.
    in_place: overwrite the weight, which must fit; then the error is 0.
    """
    weight = dense_weight(layer, adapters[0].layer_type.weight_name, dtype)
    wide = torch.promote_types(weight.dtype, torch.float32)
    left, right, scale = _terms(layer, adapters, wide)
    shape = groups, m, n = len(left), left.shape[1], right.shape[2]
    merged = weight if in_place else torch.empty_like(weight, memory_format=torch.contiguous_format)
    target = merged.view(shape)
    source = target if in_place else weight.reshape(shape)
    if scale is None and weight.dtype == wide:  # nothing is rounded
        torch.baddbmm(source, left, right, out=target)
        finite = in_place or math.isfinite(float(merged.sum())) or bool(merged.isfinite().all())
        return merged, 0.0 if finite else math.nan
    # Slices of groups and rows: blocks of about BLOCK numbers on a CPU, a single block on other devices
    numbers = BLOCK if weight.device.type == "cpu" else weight.numel()
    group_step, row_step = (max(1, numbers // (m * n)), m) if groups > 1 else (1, max(1, numbers // n))
    blocks = [
        (slice(group, group + group_step), slice(row, row + row_step))
        for group in range(0, groups, group_step)
        for row in range(0, m, row_step)
    ]
    scratch = torch.empty_like(source[blocks[0]], dtype=wide)
    errors, changes = [], []
    for group, rows in blocks:
        block = source[group, rows]
        exact = scratch[: len(block), : block.shape[1]].copy_(block)
        if scale is not None:
            exact.mul_(scale[group] if scale.shape[1] == 1 else scale[group, rows])
        exact.baddbmm_(left[group, rows], right[group])
        if scale is not None:
            changes.append(torch.linalg.vector_norm(exact - block))
        rounded = target[group, rows].copy_(exact)
        if not in_place:
            errors.append(torch.linalg.vector_norm(exact.sub_(rounded)))
    if in_place:
        return merged, 0.0
    error = float(torch.stack(errors).norm())
    if changes:
        norm = float(torch.stack(changes).norm())
    else:  # ||L R|| without forming the product: the sum of (L^T L) * (R R^T) is its square
        left, right = left.cpu().double(), right.cpu().double()
        norm = float(((left.mT @ left) * (right @ right.mT)).sum().clamp(min=0).sqrt())
    return merged, error / norm if norm > 0 else error


def _terms(layer: nn.Module, adapters: Sequence[LoRALayer], wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns left (groups, m, r), right (groups, r, n), scale or None: merged weights are scale * W + left @ right."""
    gains = [adapter.gain(layer, exact=True) for adapter in adapters]
    pairs = [adapter.weight_factors(layer, gain) for adapter, gain in zip(adapters, gains, strict=True)]
    left = torch.cat([left.to(wide) for left, _ in pairs], 2)
    right = torch.cat([right.to(wide) for _, right in pairs], 1)
    scale = weight_scale(layer, adapters, gains)
    return left, right, scale if scale is None else scale.to(wide)


@torch.no_grad()
def fits_in_place(layer: nn.Module, parts: Sequence[nn.Module], users: Mapping[int, int]) -> bool:
    """True if the weight can be overwritten: nothing else changes, `users` counts it once, and it stays finite."""
    updates = [part for part in parts if isinstance(part, LoRALayer)]
    if len(updates) < len(parts) or len({part.layer_type.weight_name for part in updates}) > 1:
        return False
    if _obstacle(layer, parts) or is_quantized(layer) or _merged_bias(layer, updates) is not None:
        return False
    weight = weight_of(layer, updates[0].layer_type.weight_name).detach()
    if users.get(weight.untyped_storage().data_ptr()) != 1 or not weight.is_contiguous() or weight.is_inference():
        return False
    left, right, scale = _terms(layer, updates, torch.promote_types(weight.dtype, torch.float32))
    # ||W|| + ||L|| ||R|| is a bound for the merged weight; computing its largest number would take 10x longer
    norm = torch.linalg.vector_norm
    largest = float(norm(weight)) + float(norm(left)) * float(norm(right))
    return scale is None and 2 * largest < torch.finfo(weight.dtype).max  # twice, because norms are also rounded


# ---- Weights that several modules share


def check_ties(model: nn.Module, changes: Iterable[Change], untie_weights: bool) -> bool:
    """Returns True if changes untie a shared weight. Raises MergeError in that case, unless `untie_weights`."""
    users: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                users.setdefault(id(parameter), []).append((path, module, name))
    exchanges = [change for change in changes if isinstance(change, TensorChange)]
    new_tensors = {(id(exchange.module), exchange.name): exchange.tensor for exchange in exchanges}
    untied = []
    for exchange in exchanges:
        sharing = users.get(id(exchange.module._parameters.get(exchange.name)), [])
        changed = [path for path, module, name in sharing if module is exchange.module and name == exchange.name]
        others = [path for path, module, name in sharing if new_tensors.get((id(module), name)) is not exchange.tensor]
        untied += [f"{changed[0]} = {' = '.join(others)}"] if others else []
    if untied and not untie_weights:
        raise MergeError(
            f"merging would change a weight that another layer shares ({', '.join(untied)}); pass untie_weights=True"
        )
    return bool(untied)
