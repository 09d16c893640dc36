"""Which base model an adapter was made for: names, shapes and a few weights of the adapted layers.

Values instead of a hash, because one checkpoint loaded in another precision, or quantised, must still be recognised.
A quantised weight is sampled by its dense value, with how far that may be from the one that was quantised.
"""

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor, nn

from tailora.core.quantization import PLAIN, as_loaded, base_of, dense_shape, dense_weight
from tailora.formats.metadata import LayerPrint

SAMPLES = 8  # weights per layer
TOLERANCE = 2.0**-7  # rounding to bfloat16, once on either side
SMALL = 1e-6

Held = tuple[nn.Module, str]  # a layer, and which of its parameters


def fingerprint(places: Mapping[str, Held]) -> dict[str, LayerPrint]:
    """Path -> shape and evenly spaced numbers of the layer's weight."""
    return {path: _print(layer, name) for path, (layer, name) in places.items()}


def _print(layer: nn.Module, name: str) -> LayerPrint:
    base, weight = base_of(layer), dense_weight(layer, name)
    if base is PLAIN or name != "weight":
        return LayerPrint(shape=list(weight.shape), weights=_sample(weight))
    spread = as_loaded(layer, base.spread(layer, weight).expand(dense_shape(layer)))
    weight = as_loaded(layer, weight)
    return LayerPrint(shape=list(weight.shape), weights=_sample(weight), spread=_sample(spread), base=base.name(layer))


def differences(stored: Mapping[str, LayerPrint], places: Mapping[str, Held]) -> list[str]:
    """What of the stored fingerprint does not hold for these layers; [] when the base is the same."""
    return [
        problem
        for path, (layer, name) in places.items()
        if path in stored and (problem := _difference(path, stored[path], _print(layer, name)))
    ]


def _difference(path: str, stored: LayerPrint, found: LayerPrint) -> str | None:
    if stored.shape != found.shape:
        return f"{path}: made for a weight of shape {tuple(stored.shape)}, here it is {tuple(found.shape)}"
    if len(stored.weights) != SAMPLES or len(stored.spread) not in (0, SAMPLES):
        return f"{path}: its fingerprint has {len(stored.weights)} weights, not {SAMPLES}"
    pairs = list(zip(stored.weights, found.weights, strict=True))
    if all(abs(now - then) <= SMALL + TOLERANCE * abs(then) for then, now in pairs):
        return None
    then, now = torch.tensor(stored.weights), torch.tensor(found.weights)
    spread = sum(torch.tensor(each.spread) for each in (stored, found) if each.spread) + torch.zeros(SAMPLES)
    excess = (now - then).abs() - (SMALL + TOLERANCE * then.abs() + spread)
    if (excess <= 0).all():
        return None
    worst = int(excess.argmax())
    was, here = (f" in {each.base}" if each.spread else "" for each in (stored, found))
    explained = f"; quantisation explains {spread[worst]:.2g} of it" if was or here else ""
    values = f"a sampled one was {then[worst]:.5g}{was}, here it is {now[worst]:.5g}{here}{explained}"
    return f"{path}: made for other weights ({values})"


def _sample(weight: Tensor) -> list[float]:
    """Evenly spaced over the numbers in the order of a file, without a copy of them all."""
    sampled: list[float] = weight.detach()[_places(weight.shape, weight.device)].float().tolist()
    return sampled


@lru_cache
def _places(shape: torch.Size, device: torch.device) -> tuple[Tensor, ...]:
    index = torch.linspace(0, shape.numel() - 1, SAMPLES, dtype=torch.float64).long()
    return torch.unravel_index(index.to(device), shape)
