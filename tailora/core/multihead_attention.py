"""nn.MultiheadAttention, which reads the weights of its projections and never calls them.

Its own forward runs on a shallow copy of the layer, with W + s B A instead of each adapted weight.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tailora.core.experts import adapted_weight, with_weights
from tailora.core.layer_types import LayerType, is_multihead_attention, weight_of


class AttentionMatrix(LayerType):
    """One matrix of nn.MultiheadAttention: q, k and v together or each by itself, or the output projection."""

    replaces_forward = True
    supports_dropout = False

    def __init__(self, weight_name: str) -> None:
        self.name, self.weight_name = f"Attention {weight_name}", weight_name

    def dims(self, layer: Any) -> tuple[int, int]:
        width = layer.embed_dim
        in_features = {"k_proj_weight": layer.kdim, "v_proj_weight": layer.vdim}.get(self.weight_name, width)
        return in_features, 3 * width if self.weight_name == "in_proj_weight" else width

    def forward(self, layer: Any, adapters: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        weights = {}
        for name in dict.fromkeys(adapter.layer_type.weight_name for adapter in adapters):
            dtype = weight_of(layer, name).dtype
            wide = torch.promote_types(dtype, torch.float32)  # round once
            weights[name] = adapted_weight(layer, name, adapters, wide).dense().to(dtype)
        return layer.plain.forward(with_weights(layer, weights), *args, **kwargs)

    def __reduce__(self) -> Any:
        return attention_matrix, (self.weight_name,)


ATTENTION = {
    name: AttentionMatrix("out_proj.weight" if name == "out_proj" else name)
    for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj")
}


def attention_matrix(weight_name: str) -> AttentionMatrix:
    return ATTENTION[weight_name.removesuffix(".weight")]


def projections(layer: nn.Module) -> dict[str, LayerType]:
    """Returns name -> layer type for the matrices of nn.MultiheadAttention; {} for any other layer."""
    if not is_multihead_attention(layer):
        return {}
    packed = layer.in_proj_weight is not None
    inputs = ["in_proj_weight"] if packed else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    return {name: ATTENTION[name] for name in (*inputs, "out_proj")}
