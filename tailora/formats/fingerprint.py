"""Which base model an adapter was made for: names, shapes and a few weights of the adapted layers.

Values instead of a hash, because one checkpoint loaded in another precision must still be recognised.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from tailora.formats.notes import LayerPrint

SAMPLES = 8  # weights per layer
TOLERANCE = 2.0**-7  # rounding to bfloat16, once on either side


def fingerprint(weights: Mapping[str, Tensor]) -> dict[str, LayerPrint]:
    """Path -> shape and evenly spaced numbers of the layer's weight."""
    return {path: LayerPrint(shape=list(weight.shape), weights=_sample(weight)) for path, weight in weights.items()}


def differences(stored: Mapping[str, LayerPrint], weights: Mapping[str, Tensor]) -> list[str]:
    """What of the stored fingerprint does not hold for these layers; [] when the base is the same."""
    return [
        problem
        for path, weight in weights.items()
        if path in stored and (problem := _difference(path, stored[path], weight))
    ]


def _difference(path: str, stored: LayerPrint, weight: Tensor) -> str | None:
    if stored.shape != list(weight.shape):
        return f"{path}: made for a weight of shape {tuple(stored.shape)}, here it is {tuple(weight.shape)}"
    if len(stored.weights) != SAMPLES:
        return f"{path}: its fingerprint has {len(stored.weights)} weights, not {SAMPLES}"
    then, now = torch.tensor(stored.weights), torch.tensor(_sample(weight))
    if torch.allclose(now, then, rtol=TOLERANCE, atol=1e-6):
        return None
    worst = int((now - then).abs().argmax())
    return f"{path}: made for other weights (a sampled one was {then[worst]:.5g}, here it is {now[worst]:.5g})"


def _sample(weight: Tensor) -> list[float]:
    flat = weight.detach().reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, SAMPLES, dtype=torch.float64).long()
    return [float(value) for value in flat[index.to(flat.device)].float().cpu()]
