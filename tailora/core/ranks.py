"""Other ranks for an adapter that exists, at the scales that its layers have."""

import math
from collections.abc import Mapping

from tailora.core.config import LoRAConfig
from tailora.core.layer import LoRALayer
from tailora.core.patterns import exactly


def with_ranks(config: LoRAConfig, layers: Mapping[str, LoRALayer], ranks: Mapping[str, int]) -> LoRAConfig:
    """The config that gives each of these paths its rank of `ranks`, at the scale that its layer is configured to."""
    alphas = {path: scale_kept(layers[path], r) for path, r in ranks.items()}
    return config.replaced(
        rank_pattern={exactly(path): r for path, r in ranks.items() if r != config.r},
        alpha_pattern={exactly(path): alpha for path, alpha in alphas.items() if alpha != config.lora_alpha},
    )


def scale_kept(layer: LoRALayer, r: int) -> float:
    """The alpha that gives rank r the scale that the layer has from its own."""
    return layer.lora_alpha * (math.sqrt(r / layer.r) if layer.use_rslora else r / layer.r)
