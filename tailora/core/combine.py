"""Combines several adapters into one: the exact sum, its best approximation of a lower rank, TIES and DARE.

The updates dW_i = s_i B_i A_i are added, never the factors. The result is plain LoRA with scale 1 (alpha = r in every
module), including strengths. Adapters with trained biases are refused.

    One update           the change of a layer's weight, as two factors or dense
    build_adapter        an adapter with given updates
    combine_adapters     collects the updates of the sources, and combines them layer by layer
    _combine_layer       cat, svd, ties, dare: combines the updates of one layer
"""

import copy
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from tailora.core.adapter import Adapter, check_compatible, low_rank_layer, share_parameters, trained_copy
from tailora.core.config import LoRAConfig, StrictModel
from tailora.core.extras import TrainedBias
from tailora.core.layer import LoRALayer
from tailora.core.layer_types import layer_of, layer_path_of, layer_type_of
from tailora.core.low_rank import Factors, concatenated, nearest_of_rank, product_spectrum, truncated, truncation_error
from tailora.core.parameters import projections
from tailora.core.patterns import commonest, portable_patterns, portable_targets
from tailora.core.quantization import dense_weight
from tailora.core.targets import target_at
from tailora.errors import AdapterError, ConfigError, listing

# ---- One update: dW = s (B A - B0 A0), times the strength; with DoRA (g - 1) W + g s (B A - B0 A0)


MIXES_GROUPS = "A reads the channels of all groups, which a grouped weight cannot represent; use this adapter alone"
SCALES_ROWS = (
    "DoRA scales the rows of W, so its update is not a product of two factors; use method 'svd' to approximate it"
)


def factors_of(layer: LoRALayer, *, strength: bool = True) -> Factors:
    """Returns s (B A - B0 A0) by group, with s and the strength in A; with a frozen start it has twice the rank."""
    A, B = layer.unscaled_factors()
    A, B = (A * (layer.scaling * (layer.strength if strength else 1))).detach(), B.detach()
    return Factors(B.reshape(layer.groups, -1, B.shape[1]), A.reshape(layer.groups, B.shape[1], -1))


def dense_update(layer: LoRALayer, base: nn.Module) -> Tensor:
    """Returns dW of the base's layer, (groups, out, n), in at least float32."""
    update = factors_of(layer).dense
    gain = layer.gain(base)
    if gain is None:
        return update
    W = layer.layer_type.matrix(base, dense_weight(base, layer.layer_type.weight_name)).to(update)
    gain = gain.detach().to(update).view(len(update), -1, 1)
    return gain * update + layer.strength * (gain - 1) * W


def mixes_groups(layer: LoRALayer) -> bool:
    """True for PEFT's A of a grouped convolution if it reads the channels of all groups."""
    return not layer.layer_type.is_stacked and layer.groups * layer.lora_B.shape[1] != layer.r


def is_product(layer: LoRALayer) -> bool:
    """True if dW is the product returned by `factors_of`, so without DoRA."""
    return layer.lora_magnitude_vector is None


def rank_per_group(r: int, layer: LoRALayer) -> int:
    """Returns the rank of each group, rounded up; each expert of a stack has the full r."""
    return r if layer.layer_type.is_stacked else math.ceil(r / layer.groups)


# ---- An adapter with given updates


@torch.no_grad()
def build_adapter(
    factors: Mapping[str, Factors],
    base_model: nn.Module,
    *,
    saved: Mapping[str, nn.Module] | None = None,
    **settings: Any,
) -> Adapter:
    """Returns an adapter with these updates. Its config has alpha = r everywhere, so s = 1.

    factors, saved: dW and trained modules by path.
    settings: for the LoRAConfig.
    """
    factors = _equal_ranks_in_attention(factors, base_model)
    parts_config = LoRAConfig(fused_parts=settings.get("fused_parts", {}))
    stacks = {path for path in factors if target_at(base_model, path, parts_config).layer_type.is_stacked}
    ranks = {path: pair.B.shape[2] * (1 if path in stacks else pair.B.shape[0]) for path, pair in factors.items()}
    layers_only = [path for path in ranks if path not in stacks]
    r = commonest(ranks)
    config = LoRAConfig(
        r=r,
        lora_alpha=r,
        target_modules=portable_targets(layers_only, [path for path, _ in base_model.named_modules()])
        if layers_only
        else [],
        target_parameters=sorted(stacks) or None,
        rank_pattern=portable_patterns(ranks, r),
        alpha_pattern=portable_patterns({path: float(rank) for path, rank in ranks.items()}, float(r)),
        **settings,
    )
    layers = {}
    for path, pair in factors.items():
        layer = layers[path] = low_rank_layer(target_at(base_model, path, config), config, fresh=False)
        layer.lora_A.copy_(pair.A.reshape(layer.lora_A.shape))
        layer.lora_B.copy_(pair.B.reshape(layer.lora_B.shape))
    copies = dict(saved or {})
    share_parameters({path: base_model.get_submodule(path) for path in copies}, copies)
    return Adapter(config, layers, copies)


def _equal_ranks_in_attention(factors: Mapping[str, Factors], base_model: nn.Module) -> dict[str, Factors]:
    """Pads the two matrices of an attention to the same rank with zeros, as PEFT's file has one rank for both."""
    layer_paths = {path: layer_path_of(base_model, path) for path in factors}
    ranks: dict[str, int] = {}
    for path, pair in factors.items():
        if "in_proj_weight" in projections(base_model.get_submodule(layer_paths[path])):
            ranks[layer_paths[path]] = max(pair.A.shape[1], ranks.get(layer_paths[path], 0))
    padded = {}
    for path, pair in factors.items():
        missing = ranks.get(layer_paths[path], 0) - pair.A.shape[1]
        padded[path] = Factors(F.pad(pair.B, (0, missing)), F.pad(pair.A, (0, 0, 0, missing))) if missing > 0 else pair
    return padded


# ---- Combining


@dataclass(frozen=True, repr=False)
class Truncation:
    """By path: the remaining rank, and ||dW - B A|| / ||dW|| in the Frobenius norm before rounding."""

    rank: dict[str, int]
    error: dict[str, float]

    @property
    def worst(self) -> float:
        return max(self.error.values(), default=0.0)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.rank)} layers, relative error up to {self.worst:.3g}: see rank, error)"


Method = Literal["cat", "svd", "ties", "dare"]
METHOD_SETTINGS = {"r": ("svd", "ties", "dare"), "density": ("ties",), "drop": ("dare",), "seed": ("dare",)}


class Combination(StrictModel):
    """Settings for combining adapters. None means the default, or not applicable to the method.

    method: "cat" (exact, ranks add up), "svd" (the best approximation of rank r), "ties" (arXiv:2306.01708) or "dare"
        (arXiv:2311.03099). The last two process the dense update of each layer and then truncate it to rank r.
    density: TIES keeps this share of the largest entries of every update; default .2 as in its sec. 4.
    drop: DARE zeroes entries with this probability p and divides the others by 1 - p; default .5.
    seed: for DARE; its result does not depend on the machine or the order of the adapters; default 0.
    """

    method: Method = "cat"
    r: int | None = Field(None, ge=1)  # maximum rank of a layer; default: the maximum of its sources
    density: float | None = Field(None, gt=0, le=1)
    drop: float | None = Field(None, ge=0, lt=1)
    seed: int | None = None

    @model_validator(mode="after")
    def _check_method(self) -> Self:
        for name, methods in METHOD_SETTINGS.items():
            if (value := getattr(self, name)) is not None and self.method not in methods:
                only = ", ".join(methods)
                raise ValueError(f"{name} = {value!r} has no effect with method {self.method!r}, only with {only}")
        return self


@torch.no_grad()
def combine_adapters(
    adapter_named: Callable[[str], Adapter], weights: Mapping[str, float], base_model: nn.Module, settings: Combination
) -> tuple[Adapter, Truncation]:
    """Returns sum_i weights_i dW_i as one adapter that shares nothing with its sources.

    adapter_named: name -> adapter; raises AdapterError for an unknown name.
    Raises ConfigError for invalid weights, AdapterError with everything that cannot be combined.
    """
    check_weights(weights)
    adapters = {name: adapter_named(name) for name in weights}
    sources = {name: adapter for name, adapter in adapters.items() if weights[name] != 0}
    check_compatible(sources)
    updates, problems = _updates(sources, weights, base_model, exact=settings.method == "cat")
    saved, saved_problems = _combined_modules(sources, weights, base_model)
    problems += saved_problems
    if problems:
        raise AdapterError(f"these adapters cannot be combined: {listing(problems)}")
    results = {path: _combine_layer(layer_updates, settings) for path, layer_updates in updates.items()}
    factors = {path: pair for path, (pair, _) in results.items()}
    if infinite := [
        path for path, pair in factors.items() if not (pair.A.isfinite().all() and pair.B.isfinite().all())
    ]:
        raise AdapterError(
            f"the sum is not finite at {', '.join(infinite[:5])} ({len(infinite)} in total); use smaller weights"
        )
    configs = [adapter.config for adapter in sources.values()]
    dropouts = {config.lora_dropout for config in configs}
    adapter = build_adapter(
        factors,
        base_model,
        saved=saved,
        lora_dropout=dropouts.pop() if len(dropouts) == 1 else 0.0,
        fused_parts={name: parts for config in configs for name, parts in config.fused_parts.items()},
        modules_to_save=sorted({name for config in configs for name in config.modules_to_save or []}) or None,
    )
    ranks = {path: layer.r for path, layer in adapter.low_rank.items()}
    return adapter, Truncation(ranks, {path: error for path, (_, error) in results.items()})


def check_weights(weights: Mapping[str, float]) -> None:
    """Raises ConfigError unless all weights are finite numbers and at least one is not 0."""
    wrong = [f"{name!r} = {weight!r}" for name, weight in weights.items() if not is_number(weight)]
    if wrong:
        raise ConfigError(f"expected finite numbers as weights, got {', '.join(wrong)}")
    if not any(weights.values()):
        raise ConfigError("all weights are 0, so there is nothing to combine")


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# ---- The updates of the sources


@dataclass(frozen=True)
class WeightedUpdate:
    """The update of one adapter for one layer of the base, and its weight in the sum."""

    adapter: str
    path: str
    weight: float
    layer: LoRALayer
    base: nn.Module

    @property
    def factors(self) -> Factors:
        """weight dW, if it is a product of two factors."""
        factors = factors_of(self.layer)
        return Factors(factors.B, self.weight * factors.A)

    @property
    def dense(self) -> Tensor:
        """weight dW, (groups, out, n)."""
        return self.weight * dense_update(self.layer, self.base)


def _updates(
    adapters: Mapping[str, Adapter], weights: Mapping[str, float], base_model: nn.Module, exact: bool
) -> tuple[dict[str, list[WeightedUpdate]], list[str]]:
    """Returns the updates of every layer by path, in the order of the adapters, and all problems."""
    updates: dict[str, list[WeightedUpdate]] = {}
    problems = []
    for name, adapter in adapters.items():
        for path, part in adapter.extras.items():
            trained = "a bias" if isinstance(part, TrainedBias) else "rows of an embedding"
            problems.append(f"{path} of {name!r}: trains {trained}, which is not supported")
        for path, layer in adapter.low_rank.items():
            base = layer_of(base_model, path)
            updates.setdefault(path, []).append(WeightedUpdate(name, path, weights[name], layer, base))
            if layer.lora_bias is not None or layer.bias is not None:
                problems.append(f"{path} of {name!r}: trains a bias, which is not supported")
            if mixes_groups(layer):
                problems.append(f"{path} of {name!r}: {MIXES_GROUPS}")
            elif exact and not is_product(layer):
                problems.append(f"{path} of {name!r}: {SCALES_ROWS}")
            elif not layer.layer_type.has_matrix and not is_product(layer):
                layer_type = layer.layer_type.name
                problems.append(f"{path} of {name!r}: the weight of a {layer_type} with DoRA is not a single matrix")
    return updates, problems


def _combined_modules(
    adapters: Mapping[str, Adapter], weights: Mapping[str, float], base_model: nn.Module
) -> tuple[dict[str, nn.Module], list[str]]:
    """Returns the modules_to_save as W + sum_i w_i (W_i - W), and a problem for each non-linear one."""
    modules: dict[str, nn.Module] = {}
    problems = []
    for path in dict.fromkeys(path for adapter in adapters.values() for path in adapter.saved):
        trained = {name: adapter.saved[path] for name, adapter in adapters.items() if path in adapter.saved}
        base = base_model.get_submodule(path)
        if len(trained) == 1 and all(weights[name] == 1 for name in trained):
            modules[path] = copy.deepcopy(next(iter(trained.values())))
        elif layer_type_of(base):  # linear in its weights
            modules[path] = total = trained_copy(base)
            start = {name: parameter.clone() for name, parameter in total.named_parameters()}
            for adapter_name, module in trained.items():
                for name, parameter in module.named_parameters():
                    total.get_parameter(name).add_(parameter - start[name], alpha=weights[adapter_name])
        else:
            class_name = type(next(iter(trained.values()))).__name__
            problems.append(
                f"{path}, trained in full by {', '.join(map(repr, trained))}, is a {class_name}, which is not linear "
                "in its weights; use only one adapter with it, at weight 1"
            )
    return modules, problems


# ---- Methods: the weighted updates of one layer -> one update


def _combine_layer(updates: list[WeightedUpdate], settings: Combination) -> tuple[Factors, float]:
    factors = [update.factors for update in updates]
    if settings.method == "cat":  # A = [w_i s_i A_i], B = [B_i], or fewer ranks if the matrix is smaller
        total = concatenated(factors)
        limit = min(total.B.shape[1], total.A.shape[2])
        return (total if total.B.shape[2] <= limit else truncated(product_spectrum(total), limit)), 0.0
    r = rank_per_group(settings.r or max(update.layer.r for update in updates), updates[0].layer)
    if settings.method == "svd" and all(is_product(update.layer) for update in updates):
        spectrum = product_spectrum(concatenated(factors))
        k = min(r, spectrum.S.shape[1])
        return truncated(spectrum, k), truncation_error(spectrum.S, k)
    return nearest_of_rank(DENSE_METHODS[settings.method](updates, settings), r)


def _sum(updates: list[WeightedUpdate], _: Combination) -> Tensor:
    return torch.stack([update.dense for update in updates]).sum(0)


def _ties(updates: list[WeightedUpdate], settings: Combination) -> Tensor:
    """Trims the weighted updates, elects a sign and averages entries that agree (arXiv:2306.01708, alg. 1).

    If all weights are equal, they are the paper's lambda.
    """
    density = 0.2 if settings.density is None else settings.density
    dense = torch.stack([update.dense for update in updates])
    size = dense[0].numel()
    count = max(1, round(density * size))  # of every update, the largest entries
    thresholds = [magnitudes.kthvalue(size - count + 1).values for magnitudes in dense.abs().flatten(1)]
    trimmed = dense * (dense.abs() >= torch.stack(thresholds).view(-1, 1, 1, 1))
    agrees = (trimmed.sign() == trimmed.sum(0).sign()) & (trimmed != 0)
    return (trimmed * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def _dare(updates: list[WeightedUpdate], settings: Combination) -> Tensor:
    """Drops entries with probability p, divides the others by 1 - p (arXiv:2311.03099, eq. 2, 3), and adds them."""
    p = 0.5 if settings.drop is None else settings.drop
    dropped = []
    for update in updates:
        digest = hashlib.sha256(f"{int(settings.seed or 0)}\n{update.adapter}\n{update.path}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        dense = update.dense
        mask = torch.rand(dense.shape, generator=generator, device="cpu") >= p
        dropped.append(dense * mask.to(dense.device) / (1 - p))
    return torch.stack(dropped).sum(0)


DENSE_METHODS = {"svd": _sum, "ties": _ties, "dare": _dare}
