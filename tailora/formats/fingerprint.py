"""Recognizes the base model of an adapter by the shapes and a few weights of the adapted layers.

It stores values, not a hash, so that a checkpoint loaded in another precision or quantized is recognized. Values of
a quantized weight are dequantized, and stored with their largest distance from the weight before quantization.
"""

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import cast

import torch
from pydantic import BaseModel, FiniteFloat
from torch import Tensor, nn

from tailora.core.extras import input_embedding
from tailora.core.layer_types import LINEAR, LayerType, layer_of, whole_tensor
from tailora.core.quantization import PLAIN, dense_shape, dense_weight, in_file_layout, quantized_layers, storage_of

SAMPLES = 8  # weights per layer
TOLERANCE = 2.0**-7  # relative: rounding to bfloat16, once on either side
SMALL = 1e-6  # absolute, for weights near 0


class LayerFingerprint(BaseModel):
    """Shape and evenly spaced values of one weight of the base."""

    shape: list[int]
    weights: list[float]
    spread: list[FiniteFloat] = []  # how far each value may be from the one before quantization, if it is quantized


def fingerprint(base_model: nn.Module, layer_types: Mapping[str, LayerType]) -> dict[str, LayerFingerprint]:
    """Returns the fingerprint of the weight at every path; `layer_types` has the type of its layer."""
    result = {}
    for path, layer_type in layer_types.items():
        layer = layer_of(base_model, path)
        storage, weight, spread = storage_of(layer), dense_weight(layer, layer_type.weight_name), list[float]()
        if storage is not PLAIN and layer_type.weight_name == "weight":
            spread = _sample(in_file_layout(layer, storage.spread(layer, weight).expand(dense_shape(layer))))
            weight = in_file_layout(layer, weight)
        result[path] = LayerFingerprint(shape=list(weight.shape), weights=_sample(weight), spread=spread)
    return result


def model_fingerprint(model: nn.Module) -> dict[str, LayerFingerprint]:
    """Returns the fingerprint of every parameter by name, and of every quantized layer by path."""
    quantized = quantized_layers(model)
    plain = {
        name: parameter if parameter.ndim else parameter[None]
        for name, parameter in model.named_parameters()
        if name.rpartition(".")[0] not in quantized and parameter.numel()
    }
    return {
        **fingerprint(model, dict.fromkeys(quantized, LINEAR)),
        **{name: LayerFingerprint(shape=list(p.shape), weights=_sample(p)) for name, p in plain.items()},
    }


def vocabulary_size(base_model: nn.Module) -> int | None:
    _, embedding = input_embedding(base_model) or ("", None)
    return None if embedding is None else embedding.num_embeddings


def fingerprint_differences(
    stored: Mapping[str, LayerFingerprint], current: Mapping[str, LayerFingerprint], *, exact: bool = False
) -> list[str]:
    """Returns how the layers in both differ. exact: in the same precision, where only quantization may explain it."""
    differences = (_difference(path, stored[path], layer, exact) for path, layer in current.items() if path in stored)
    return [difference for difference in differences if difference]


def _difference(path: str, stored: LayerFingerprint, current: LayerFingerprint, exact: bool) -> str | None:
    if stored.shape != current.shape:
        return f"{path}: expected a weight of shape {tuple(stored.shape)}, got {tuple(current.shape)}"
    if len(stored.weights) != SAMPLES or len(stored.spread) not in (0, SAMPLES):
        return f"{path}: expected a fingerprint of {SAMPLES} weights, got {len(stored.weights)}"
    before, now = stored.weights, current.weights
    no_spread = [0.0] * SAMPLES
    spread = [sum(both) for both in zip(stored.spread or no_spread, current.spread or no_spread, strict=True)]
    rounding = [0.0 if exact else SMALL + TOLERANCE * abs(weight) for weight in before]
    # Lists of 8 numbers: tensors of them take ten times as long, and there are hundreds of layers
    excess = [abs(b - a) - (r + s) for a, b, r, s in zip(before, now, rounding, spread, strict=True)]
    if all(value <= 0 for value in excess):
        return None
    worst = next((i for i, value in enumerate(excess) if math.isnan(value)), excess.index(max(excess)))
    explained = f"; quantization explains {spread[worst]:.2g} of the difference" if any(spread) else ""
    sampled = f"a sampled weight is {now[worst]:.9g}, expected {before[worst]:.9g}{explained}"
    return f"{path}: the weights differ ({sampled})"


def _sample(weight: Tensor) -> list[float]:
    """Returns SAMPLES values, evenly spaced in the order of a file. A sharded weight is gathered first."""
    weight = whole_tensor(weight.detach())
    return cast(list[float], weight[_sample_index(weight.shape, weight.device)].float().tolist())


@lru_cache
def _sample_index(shape: torch.Size, device: torch.device) -> tuple[Tensor, ...]:
    index = torch.linspace(0, shape.numel() - 1, SAMPLES, dtype=torch.float64, device="cpu").long()
    return torch.unravel_index(index.to(device), shape)
