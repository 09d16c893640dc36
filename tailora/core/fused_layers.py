"""Parts of a fused layer: which outputs of its matrix are q, k and v, or gate and up.

A layout lists the sizes of the parts in the order of the outputs, repeated until all outputs are used. {"q": 64,
"k": 64, "v": 64} means [q|k|v] for 192 outputs, and four heads of [q|k|v] for 768 outputs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

Layout = Mapping[str, int]


@dataclass(frozen=True)
class OutputSlice:
    """The outputs start..stop of every period, out of `total` outputs."""

    start: int
    stop: int
    period: int
    total: int

    @property
    def size(self) -> int:
        return (self.stop - self.start) * (self.total // self.period)

    def spread(self, y: Tensor) -> Tensor:
        """(..., size) -> (..., total), with zeros in all other outputs."""
        blocks = y.reshape(*y.shape[:-1], -1, self.stop - self.start)
        return F.pad(blocks, (self.start, self.period - self.stop)).flatten(-2)

    def take(self, y: Tensor) -> Tensor:
        """(..., total) -> (..., size)."""
        return y.reshape(*y.shape[:-1], -1, self.period)[..., self.start : self.stop].flatten(-2)


def _thirds(_: Any, total: int) -> Layout:
    return dict.fromkeys("qkv", total // 3)


def _gpt2(parent: Any, total: int) -> Layout:
    return dict.fromkeys("kv", total // 2) if parent.is_cross_attention else _thirds(parent, total)


def _heads(parent: Any, _: int) -> Layout:
    """One [q|k|v] per head."""
    return dict.fromkeys("qkv", getattr(parent, "head_size", None) or parent.head_dim)


def _grouped(parent: Any, total: int) -> Layout:
    """[q|k|v] with fewer key and value heads than query heads."""
    kv = parent.num_key_value_heads * parent.head_dim
    return {"q": total - 2 * kv, "k": kv, "v": kv}


def _falcon(parent: Any, total: int) -> Layout:
    """[its q heads|k|v] for each key-value group; or all q heads, one k and one v; or [q|k|v] for each head."""
    size = parent.head_dim
    if parent.new_decoder_architecture:
        return {"q": parent.num_heads // parent.num_kv_heads * size, "k": size, "v": size}
    return {"q": parent.num_heads * size, "k": size, "v": size} if parent.multi_query else _heads(parent, total)


def _bigcode(parent: Any, total: int) -> Layout:
    """[q|k|v] if all heads share one k and v; otherwise [q|k|v] for each head."""
    if parent.is_cross_attention:
        return {}
    kv = parent.kv_dim
    return {"q": parent.embed_dim, "k": kv, "v": kv} if parent.multi_query else _heads(parent, total)


def _gate_up(_: Any, total: int) -> Layout:
    return dict.fromkeys(("gate", "up"), total // 2)


# By class of the parent and name of the layer in it. For other layers, users set LoRAConfig.fused_parts.
LAYOUTS: dict[str, Callable[[Any, int], Layout]] = {
    "GPT2Attention.c_attn": _gpt2,
    "DecisionTransformerGPT2Attention.c_attn": _gpt2,
    "GPTBigCodeAttention.c_attn": _bigcode,
    "Phi3Attention.qkv_proj": _grouped,
    "Phi3MLP.gate_up_proj": _gate_up,
    "Phi4MultimodalAttention.qkv_proj": _grouped,
    "Phi4MultimodalMLP.gate_up_proj": _gate_up,
    "GlmMLP.gate_up_proj": _gate_up,
    "Glm4MLP.gate_up_proj": _gate_up,
    "GPTNeoXAttention.query_key_value": _heads,
    "BloomAttention.query_key_value": _heads,
    "PersimmonAttention.query_key_value": _heads,
    "FalconAttention.query_key_value": _falcon,
    "MptAttention.Wqkv": _thirds,
    "ModernBertAttention.Wqkv": _thirds,
}


def layout_of(parent: nn.Module, name: str, total: int) -> Layout:
    """Returns the layout of the layer that `parent` calls `name`, with `total` outputs; {} if unknown or unfit."""
    layouts = [LAYOUTS[key] for cls in type(parent).__mro__ if (key := f"{cls.__name__}.{name}") in LAYOUTS]
    if not layouts:
        return {}
    try:
        layout = layouts[0](parent, total)
    except AttributeError:  # a different class with the same name
        return {}
    return layout if _divides(layout, total) else {}


def output_slices(layout: Layout, total: int) -> dict[str, OutputSlice]:
    """Returns part -> its outputs. Raises ValueError if the sizes do not divide the layer's `total` outputs."""
    period, start, slices = sum(layout.values()), 0, {}
    if not _divides(layout, total):
        raise ValueError(f"the parts {dict(layout)} add up to {period} rows, which must divide the layer's {total}")
    for part, size in layout.items():
        slices[part] = OutputSlice(start, start + size, period, total)
        start += size
    return slices


def _divides(layout: Layout, total: int) -> bool:
    period = sum(layout.values())
    return period > 0 and total % period == 0
