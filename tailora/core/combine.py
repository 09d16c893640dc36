"""One adapter out of several: the exact sum, its best approximation of a lower rank, TIES and DARE.

What adds up are the updates dW_i = s_i B_i A_i, never the factors by themselves: B_1 A_1 + B_2 A_2 is not
(B_1 + B_2)(A_1 + A_2). Every result is plain LoRA with scale 1 (alpha = r in every module), strengths folded in, and
trained biases where the sources change biases.
"""

import copy
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tailora.core.adapter import Adapter, check_compatible, low_rank_layer, trained_copy
from tailora.core.config import LoRAConfig
from tailora.core.extras import TrainedBias
from tailora.core.layer import LoRALayer
from tailora.core.layer_types import host_of, host_path, layer_type_of, projections
from tailora.core.low_rank import Factors, concatenated, low_rank, product_spectrum, tail, truncated
from tailora.core.patterns import commonest, portable_patterns, portable_targets
from tailora.core.quantization import dense_weight
from tailora.core.targets import place_at, target_at
from tailora.errors import AdapterError, ConfigError, listing, nearest

# ---- What a layer's adapter adds to it, as matrices and vectors, and an adapter built of such again.
#
# A layer's output changes by dW x + db:
#
#     dW = s (B A - B0 A0), times the strength; with DoRA (g - 1) W + g s (B A - B0 A0)
#     db = s lora_bias + (trained bias - bias), times the strength


UNSCALED = 1e-6  # |g - 1| up to which DoRA scales nothing: a few roundings of float32
MIXED = "A reads the channels of all groups, which no grouped weight can hold; keep this adapter by itself"
SCALED = "DoRA scales the rows of W, which no product of two factors can say; method 'svd' takes the nearest of rank r"


def factors_of(layer: LoRALayer, *, strength: bool = True) -> Factors:
    """s (B A - B0 A0) by group, s and the strength in A; of twice the rank with a frozen start."""
    A, B = layer.pair()
    A, B = (A * (layer.scaling * (layer.strength if strength else 1))).detach(), B.detach()
    return Factors(B.reshape(layer.groups, -1, B.shape[1]), A.reshape(layer.groups, B.shape[1], -1))


def dense_of(layer: LoRALayer, base: nn.Module) -> Tensor:
    """dW of the base's layer, (groups, out, n), in at least float32."""
    update = factors_of(layer).dense
    gain = layer.gain(base)
    if gain is None:
        return update
    W = cast(Any, layer.layer_type.matrix)(base, dense_weight(base, layer.layer_type.weight)).to(update)
    matrix: Tensor = W if layer.rows is None else layer.rows.take(W.mT).mT
    rows = gain.detach().to(update).view(len(update), -1, 1)
    dense: Tensor = rows * update + layer.strength * (rows - 1) * matrix
    return dense


def is_mixed(layer: LoRALayer) -> bool:
    """PEFT's A of a grouped convolution, when it reads all channels."""
    return not layer.layer_type.stacked and layer.groups * layer.lora_B.shape[1] != layer.r


def is_product(layer: LoRALayer, base: nn.Module) -> bool:
    """Whether dW is what `factors_of` gives: no DoRA, or one that scales no row."""
    gain = layer.gain(base)
    return gain is None or float((gain.detach() - 1).abs().max()) <= UNSCALED


def obstacle_to_sum(layer: LoRALayer, base: nn.Module, exact: bool) -> str | None:
    """Why this update cannot be added to others; None where it can. exact: as a product of two factors."""
    if is_mixed(layer):
        return MIXED
    if is_product(layer, base):
        return None
    if exact:
        return SCALED
    return None if layer.layer_type.matrix else f"the weight of a {layer.layer_type.name} with DoRA is not one matrix"


def place_of_biases(changes: Mapping[str, Tensor], adapted: Mapping[str, nn.Module]) -> tuple[dict[str, Any], str]:
    """The settings under which an adapter of these layers can hold these db, and what is in the way ("": nothing)."""
    if not changes:
        return {}, ""
    if all(getattr(adapted[path], "bias", None) is not None for path in changes):
        return {"bias": "lora_only"}, ""
    if any(isinstance(layer, nn.Embedding) for layer in adapted.values()):
        return {}, (
            "one has biases beside B of layers without a bias, another adapts an embedding; no file holds both together"
        )
    return {"lora_bias": True}, ""


def built(
    factors: Mapping[str, Factors],
    base_model: nn.Module,
    *,
    changes: Mapping[str, Tensor] | None = None,
    saved: Mapping[str, nn.Module] | None = None,
    **settings: Any,
) -> Adapter:
    """The adapter with these updates, and the config that describes it: alpha = r everywhere, so that s = 1.

    changes: db by path, for which `settings` make room.    settings: of LoRAConfig.
    """
    factors = _one_rank_in_attention(factors, base_model)
    told = LoRAConfig(fused_parts=settings.get("fused_parts", {}))
    stacks = {path for path in factors if place_at(base_model, path, told).layer_type.stacked}
    ranks = {path: each.B.shape[2] * (1 if path in stacks else each.B.shape[0]) for path, each in factors.items()}
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
    layers = {path: _filled(path, base_model, config, each) for path, each in factors.items()}
    for path, change in (changes or {}).items():
        _shifted(layers[path], change)
    return Adapter(config, layers, dict(saved or {}))


def _one_rank_in_attention(factors: Mapping[str, Factors], base_model: nn.Module) -> dict[str, Factors]:
    """Zeros up to the higher rank of the two matrices of an attention, for which PEFT's file has one rank."""
    hosts = {path: host_path(base_model, path) for path in factors}
    attentions = {host for host in hosts.values() if "in_proj_weight" in projections(base_model.get_submodule(host))}
    ranks = {host: max(factors[path].A.shape[1] for path in factors if hosts[path] == host) for host in attentions}
    return {
        path: _padded(each, ranks[hosts[path]]) if hosts[path] in attentions else each for path, each in factors.items()
    }


def _padded(factors: Factors, k: int) -> Factors:
    more = k - factors.A.shape[1]
    return Factors(F.pad(factors.B, (0, more)), F.pad(factors.A, (0, 0, 0, more)))


@torch.no_grad()
def _filled(path: str, base_model: nn.Module, config: LoRAConfig, factors: Factors) -> LoRALayer:
    layer = low_rank_layer(target_at(base_model, path, config), config, fresh=False)
    layer.lora_A.copy_(factors.A.reshape(layer.lora_A.shape))
    layer.lora_B.copy_(factors.B.reshape(layer.lora_B.shape))
    return layer


@torch.no_grad()
def _shifted(layer: LoRALayer, change: Tensor) -> None:
    """With s = 1 either place of a bias adds what it holds."""
    place = layer.lora_bias if layer.bias is None else layer.bias
    cast(nn.Parameter, place).add_(change)


# ----


@dataclass(frozen=True)
class Truncation:
    """By path of the layer: the rank kept, and ||dW - B A|| / ||dW|| in the Frobenius norm, 0 where nothing is lost.

    The error is that of the low rank, against the update before it was cut; rounding the factors is not in it.
    """

    rank: dict[str, int]
    error: dict[str, float]

    @property
    def worst(self) -> float:
        return max(self.error.values(), default=0.0)


@dataclass(frozen=True)
class Combination:
    """How to combine; None is what a method does not take, or its default.

    method: "cat" (exact, ranks add up), "svd" (the best of rank r), "ties" (arXiv:2306.01708) or "dare"
        (arXiv:2311.03099), which act on the dense update of one layer at a time and then cut it to rank r.
    r: highest rank of a layer; default: the highest that a source has there.
    density: TIES keeps this share of the largest entries of every update; .2 as in its sec. 4.
    drop: DARE zeroes entries with this probability and divides the others by the rest; .5.
    seed: of DARE's choice, which is the same on every machine and for every order of the adapters; 0.
    """

    method: str = "cat"
    r: int | None = None
    density: float | None = None
    drop: float | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Part:
    """What one adapter brings to one layer."""

    adapter: str
    path: str
    weight: float
    layer: LoRALayer
    base: nn.Module

    @property
    def weighted(self) -> Factors:
        """weight dW, where that is a product."""
        factors = factors_of(self.layer)
        return Factors(factors.B, self.weight * factors.A)

    @property
    def dense(self) -> Tensor:
        """weight dW, (groups, out, n)."""
        return self.weight * dense_of(self.layer, self.base)


Combined = tuple[Factors, float]  # and the relative error of its rank


@torch.no_grad()
def combine(
    adapters: Mapping[str, Adapter], weights: Mapping[str, float], base_model: nn.Module, how: Combination
) -> tuple[Adapter, Truncation]:
    """sum_i weights_i dW_i as one adapter, which shares nothing with its sources; biases likewise.

    Raises ConfigError for settings that mean nothing, AdapterError with everything that cannot be combined.
    """
    check(weights, how)
    used = {name: adapter for name, adapter in adapters.items() if weights[name] != 0}
    check_compatible(used)
    layers, problems = _sources(used, base_model, exact=how.method == "cat")
    saved, unmixed = _saved(used, weights, base_model)
    changes = _biases(layers, weights, base_model)
    places, homeless = place_of_biases(changes, {path: host_of(base_model, path) for path in layers})
    if problems := [*problems, *unmixed, *([homeless] if homeless else [])]:
        raise AdapterError(f"these adapters cannot be combined: {listing(problems)}")
    results = {}
    for path, each in layers.items():
        base = host_of(base_model, path)
        parts = [Part(name, path, weights[name], layer, base) for name, layer in each.items()]
        results[path] = METHODS[how.method](parts, how, max(layer.r for layer in each.values()))
    factors = {path: each for path, (each, _) in results.items()}
    if broken := [path for path, each in factors.items() if not each.is_finite]:
        raise AdapterError(f"the sum is not finite at {', '.join(broken[:5])} ({len(broken)} in all): smaller weights")
    adapter = built(
        factors,
        base_model,
        changes=changes,
        saved=saved,
        lora_dropout=_agreed([adapter.config.lora_dropout for adapter in used.values()]),
        fused_parts={name: parts for each in used.values() for name, parts in each.config.fused_parts.items()},
        modules_to_save=_united([adapter.config.modules_to_save or [] for adapter in used.values()]),
        **places,
    )
    ranks = {path: layer.r for path, layer in adapter.low_rank.items()}
    return adapter, Truncation(ranks, {path: error for path, (_, error) in results.items()})


def check(weights: Mapping[str, float], how: Combination) -> None:
    """Raises ConfigError with all settings that are out of range or that the method would ignore."""
    problems = [
        f"weight of {name!r} = {weight!r}; take a finite number"
        for name, weight in weights.items()
        if not is_number(weight)
    ]
    if not problems and not any(weights.values()):
        problems.append("nothing to combine: give at least one adapter a weight other than 0")
    if how.method not in METHODS:
        problems.append(f"method = {how.method!r}; there are: {', '.join(METHODS)}{nearest(str(how.method), METHODS)}")
    for field, methods, fits, wanted in SETTINGS:
        value = getattr(how, field)
        if value is not None and how.method in METHODS and how.method not in methods:
            problems.append(f"{field} = {value!r} means nothing to method {how.method!r}, but to {', '.join(methods)}")
        elif value is not None and not (is_number(value) and fits(value)):
            problems.append(f"{field} = {value!r}; take {wanted}")
    if problems:
        raise ConfigError(listing(problems))


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


SETTINGS: list[tuple[str, tuple[str, ...], Callable[[float], bool], str]] = [
    ("r", ("svd", "ties", "dare"), lambda r: isinstance(r, int) and r >= 1, "a whole number from 1 on"),
    ("density", ("ties",), lambda share: 0 < share <= 1, "a share above 0, at most 1"),
    ("drop", ("dare",), lambda share: 0 <= share < 1, "a probability from 0 to below 1"),
    ("seed", ("dare",), lambda seed: seed == int(seed), "a whole number"),
]


# ---- what the sources are


def _sources(
    adapters: Mapping[str, Adapter], base_model: nn.Module, exact: bool
) -> tuple[dict[str, dict[str, LoRALayer]], list[str]]:
    """Path -> adapter -> its layer there, in the order of the adapters; and all that stands in the way."""
    layers: dict[str, dict[str, LoRALayer]] = {}
    problems = []
    for name, adapter in adapters.items():
        problems += [f"{path} of {name!r}: {_no_update(part)}" for path, part in adapter.extras.items()]
        for path, layer in adapter.low_rank.items():
            layers.setdefault(path, {})[name] = layer
            if reason := obstacle_to_sum(layer, host_of(base_model, path), exact):
                problems.append(f"{path} of {name!r}: {reason}")
    return layers, problems


def _no_update(part: nn.Module) -> str:
    return "it trains a bias" if isinstance(part, TrainedBias) else "it trains rows of an embedding"


def _biases(
    layers: Mapping[str, Mapping[str, LoRALayer]], weights: Mapping[str, float], base_model: nn.Module
) -> dict[str, Tensor]:
    """sum_i w_i db_i of every layer where something is added to the bias."""
    sums: dict[str, Tensor] = {}
    for path, each in layers.items():
        base = host_of(base_model, path)
        for name, layer in each.items():
            change = layer.bias_change(base)
            if change is not None:
                sums[path] = sums.get(path, 0) + weights[name] * change.detach()
    return sums


def _saved(
    adapters: Mapping[str, Adapter], weights: Mapping[str, float], base_model: nn.Module
) -> tuple[dict[str, nn.Module], list[str]]:
    """Modules trained whole, W + sum_i w_i (W_i - W), where that is the sum of what they compute."""
    found: dict[str, nn.Module] = {}
    problems = []
    for path in dict.fromkeys(path for adapter in adapters.values() for path in adapter.saved):
        holders = {name: adapter.saved[path] for name, adapter in adapters.items() if path in adapter.saved}
        base = base_model.get_submodule(path)
        if len(holders) == 1 and all(weights[name] == 1 for name in holders):
            found[path] = copy.deepcopy(next(iter(holders.values())))
        elif layer_type_of(base):  # linear in its weights
            found[path] = _mixed(base, [(weights[name], module) for name, module in holders.items()])
        else:
            layer_type = type(next(iter(holders.values()))).__name__
            problems.append(
                f"{path}, trained whole by {', '.join(map(repr, holders))}, is a {layer_type}, which is not linear in "
                "its weights; take it from one adapter, with weight 1"
            )
    return found, problems


def _mixed(base: nn.Module, trained: list[tuple[float, nn.Module]]) -> nn.Module:
    mix = trained_copy(base)
    start = {name: parameter.clone() for name, parameter in mix.named_parameters()}
    for weight, module in trained:
        for name, parameter in module.named_parameters():
            mix.get_parameter(name).add_(parameter - start[name], alpha=weight)
    return mix


def _united(names: list[list[str]]) -> list[str] | None:
    return sorted({name for each in names for name in each}) or None


def _agreed(values: list[float]) -> float:
    return values[0] if len(set(values)) == 1 else 0.0


# ---- methods: the parts of one layer -> factors, error


def _cat(parts: list[Part], *_: object) -> Combined:
    """A = [w_i s_i A_i], B = [B_i]. Where the ranks add up to more than the matrix has, the same update in fewer."""
    total = concatenated([part.weighted for part in parts])
    limit = min(total.B.shape[1], total.A.shape[2])
    return (total if total.B.shape[2] <= limit else truncated(product_spectrum(total), limit)), 0.0


def _svd(parts: list[Part], how: Combination, highest: int) -> Combined:
    if not all(is_product(part.layer, part.base) for part in parts):
        return low_rank(torch.stack([part.dense for part in parts]).sum(0), _wanted(parts, how, highest))
    spectrum = product_spectrum(concatenated([part.weighted for part in parts]))
    k = min(_wanted(parts, how, highest), spectrum.S.shape[1])
    return truncated(spectrum, k), tail(spectrum.S, k)


def _ties(parts: list[Part], how: Combination, highest: int) -> Combined:
    """Trim, elect a sign, average what agrees (arXiv:2306.01708, alg. 1), of the weighted updates.

    With one weight for all it is the paper's lambda.
    """
    density = 0.2 if how.density is None else how.density
    updates = torch.stack([_trimmed(part.dense, density) for part in parts])
    elected = updates.sum(0).sign()
    agrees = (updates.sign() == elected) & (updates != 0)
    return low_rank((updates * agrees).sum(0) / agrees.sum(0).clamp(min=1), _wanted(parts, how, highest))


def _trimmed(update: Tensor, density: float) -> Tensor:
    magnitude = update.abs()
    kept = max(1, round(density * update.numel()))
    threshold = magnitude.flatten().kthvalue(update.numel() - kept + 1).values
    return update * (magnitude >= threshold)


def _dare(parts: list[Part], how: Combination, highest: int) -> Combined:
    """Drop entries with probability p, divide the others by 1 - p (arXiv:2311.03099, eq. 2 and 3), add up."""
    p = 0.5 if how.drop is None else how.drop
    thinned = [_thinned(part, p, how.seed or 0) for part in parts]
    total = torch.stack(thinned).sum(0)
    return low_rank(total, _wanted(parts, how, highest))


def _thinned(part: Part, p: float, seed: int) -> Tensor:
    """The choice is drawn on the CPU, by a generator of this adapter and layer alone."""
    digest = hashlib.sha256(f"{int(seed)}\n{part.adapter}\n{part.path}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    update = part.dense
    kept = torch.rand(update.shape, generator=generator) >= p
    return update * kept.to(update.device) / (1 - p)


METHODS: dict[str, Callable[[list[Part], Combination, int], Combined]] = {
    "cat": _cat,
    "svd": _svd,
    "ties": _ties,
    "dare": _dare,
}


def _wanted(parts: list[Part], how: Combination, highest: int) -> int:
    return per_group(how.r or highest, parts[0].layer)


def per_group(r: int, layer: LoRALayer) -> int:
    """A layer's rank as that of each of its groups (rounded up), or of its experts, who have it each."""
    return r if layer.layer_type.stacked else math.ceil(r / layer.groups)
