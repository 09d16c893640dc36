"""What a layer's adapter adds to it, as matrices and vectors, and an adapter built of such again.

A layer's output changes by dW x + db:

    dW = s (B A - B0 A0), times the strength; with DoRA (g - 1) W + g s (B A - B0 A0)
    db = s lora_bias + (trained bias - bias), times the strength
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tailora.core.adapter import Adapter, low_rank_layer
from tailora.core.config import LoRAConfig
from tailora.core.layer import LoRALayer
from tailora.core.layer_types import host_path, projections
from tailora.core.low_rank import Factors
from tailora.core.places import place_at
from tailora.core.quantization import dense_weight
from tailora.core.selectors import commonest, portable_patterns, portable_targets
from tailora.core.targets import target_at

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
    W = cast(Any, layer.kind.matrix)(base, dense_weight(base, layer.kind.weight)).to(update)
    matrix: Tensor = W if layer.rows is None else layer.rows.take(W.mT).mT
    rows = gain.detach().to(update).view(len(update), -1, 1)
    dense: Tensor = rows * update + layer.strength * (rows - 1) * matrix
    return dense


def is_mixed(layer: LoRALayer) -> bool:
    """PEFT's A of a grouped convolution, when it reads all channels."""
    return not layer.kind.stacked and layer.groups * layer.lora_B.shape[1] != layer.r


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
    return None if layer.kind.matrix else f"the weight of a {layer.kind.name} with DoRA is not one matrix"


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
    stacks = {path for path in factors if place_at(base_model, path, told).kind.stacked}
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
