"""Layers that pack their weights in the same way as gptqmodel, for tests without this package.

They have the same attributes, and a base class of the same name, by which tailora recognizes them.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BITS = 4
GROUP = 64
IN_ORDER, OF_AWQ = range(8), (0, 2, 4, 6, 1, 3, 5, 7)  # of the numbers in an int32


def quantized(weight: Tensor, group: int = GROUP) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the codes (out, in) of a weight, and scales and zero points (out, groups)."""
    group = min(group, weight.shape[1])
    blocks = weight.float().unflatten(1, (-1, group))
    low, high = blocks.amin(-1, keepdim=True).clamp(max=0), blocks.amax(-1, keepdim=True).clamp(min=0)
    scales = ((high - low) / (2**BITS - 1)).to(weight.dtype)
    zeros = (-low / scales.float()).round().clamp(1, 2**BITS - 1)
    codes = (blocks / scales.float() + zeros).round().clamp(0, 2**BITS - 1)
    return codes.flatten(1).long(), scales[..., 0], zeros[..., 0].long()


def packed(codes: Tensor, dim: int, order: Sequence[int] = IN_ORDER) -> Tensor:
    """Packs 8 codes along `dim` into an int32; missing ones are 0."""
    codes = codes.transpose(dim, -1)
    codes = F.pad(codes, (0, -codes.shape[-1] % 8)).unflatten(-1, (-1, 8))
    words = sum(codes[..., number] << (BITS * position) for position, number in enumerate(order))
    return torch.as_tensor(words).to(torch.int32).transpose(dim, -1).contiguous()


def unpacked(words: Tensor, dim: int, size: int, order: Sequence[int] = IN_ORDER) -> Tensor:
    codes = torch.stack([(words.transpose(dim, -1) >> (BITS * order.index(n))) & 15 for n in range(8)], -1).flatten(-2)
    return codes[..., :size].transpose(dim, -1)


class BaseQuantLinear(nn.Module):
    __module__ = "gptqmodel.nn_modules.qlinear"


class GptqLinear(BaseQuantLinear):
    """gptqmodel's layer for GPTQ; a subclass for AWQ."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits = layer.in_features, layer.out_features, BITS
        for name, tensor in self.pack(layer.weight.detach()).items():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        return gptq_tensors(weight)

    def dequantize_weight(self) -> Tensor:
        """(in, out)"""
        buffers: Any = self
        codes = unpacked(buffers.qweight, 0, self.in_features)
        zeros = unpacked(buffers.qzeros, 1, self.out_features) + 1
        groups = buffers.g_idx.long()
        return (codes - zeros[groups]) * buffers.scales[groups]

    def forward(self, x: Tensor) -> Tensor:
        bias: Any = self.bias
        y = x @ self.dequantize_weight().to(x.dtype)
        return y if bias is None else y + bias


class AwqLinear(GptqLinear):
    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        return awq_tensors(weight)

    def dequantize_weight(self) -> Tensor:
        buffers: Any = self
        codes = unpacked(buffers.qweight, 1, self.out_features, OF_AWQ)
        zeros = unpacked(buffers.qzeros, 1, self.out_features, OF_AWQ)
        groups = torch.arange(self.in_features) // -(-self.in_features // len(zeros))
        return (codes - zeros[groups]) * buffers.scales[groups]


class InferenceLinear(GptqLinear):
    """A kernel for inference: no gradient reaches its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


class BlockLinear(GptqLinear):
    """A layer that sums the products of its blocks, so that its weight is nowhere in one piece."""

    def forward(self, x: Tensor) -> Tensor:
        buffers: Any = self
        zeros = unpacked(buffers.qzeros, 1, self.out_features) + 1
        codes = unpacked(buffers.qweight, 0, self.in_features).unflatten(0, (len(zeros), -1))
        weight = (codes - zeros[:, None]) * buffers.scales[:, None]  # (groups, inputs of a group, out)
        return torch.einsum("...gi,gio->...o", x.unflatten(-1, weight.shape[:2]), weight)


def gptq_tensors(weight: Tensor) -> dict[str, Tensor]:
    """Returns the tensors that a GPTQ checkpoint has for a weight: zero points are stored minus 1."""
    codes, scales, zeros = quantized(weight)
    groups = torch.arange(weight.shape[1], dtype=torch.int32) // -(-weight.shape[1] // scales.shape[1])
    codes, zeros = packed(codes.T, 0), packed((zeros - 1).T, 1)
    return {"qweight": codes, "qzeros": zeros, "scales": scales.T.contiguous(), "g_idx": groups}


def awq_tensors(weight: Tensor) -> dict[str, Tensor]:
    codes, scales, zeros = quantized(weight)
    scales = scales.T.contiguous()
    return {"qweight": packed(codes.T, 1, OF_AWQ), "qzeros": packed(zeros.T, 1, OF_AWQ), "scales": scales}
