"""What an adapter trains beside its low-rank updates: biases of layers, and rows of an embedding.

Each is a part that an adapted layer adds up like any other: `change` is what it adds to the layer's output, and
`bias_change` or `row_change` what it adds to the layer's tensors when it is merged.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tailora.core.layer_types import weight_of

# Classes whose bias is added to all else, by what dimension of the output it runs along.
LAST = (nn.Linear, nn.LayerNorm)
CHANNEL = (nn.GroupNorm, nn.modules.batchnorm._NormBase)
KERNEL = (nn.modules.conv._ConvNd,)
LAST_NAMES = ("transformers.pytorch_utils.Conv1D",)


def adds_its_bias(module: nn.Module) -> bool:
    names = {f"{cls.__module__}.{cls.__qualname__}" for cls in type(module).__mro__}
    return isinstance(module, (*LAST, *CHANNEL, *KERNEL)) or not names.isdisjoint(LAST_NAMES)


def biases_of(module: nn.Module) -> list[str]:
    """Names of the module's own parameters that are biases."""
    return [name for name, parameter in module.named_parameters(recurse=False) if "bias" in name]


class TrainedBias(nn.Module):
    """A bias in the place of a layer's own, which stays as it is.

    bias: Parameter, shaped as the layer's.    strength: run-time dial, 1 unless set.
    """

    strength: Tensor

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        own = cast(Tensor, layer.bias)
        self.bias = nn.Parameter(own.detach().to(dtype, copy=True))
        self.register_buffer("strength", torch.ones((), device=own.device, dtype=dtype), persistent=False)

    def added(self, y: Tensor, base: Tensor, x: Tensor, layer: nn.Module) -> Tensor:
        return y + self.change(base, x, layer)

    def change(self, base: Tensor, _: Tensor, layer: nn.Module) -> Tensor:
        change = self.bias_change(layer).to(base.dtype)
        if isinstance(layer, KERNEL):
            change = change[(..., *[None] * len(cast(Any, layer).kernel_size))]
        elif isinstance(layer, CHANNEL):
            change = change[(..., *[None] * (base.ndim - 2))]
        return change.expand_as(base)

    def bias_change(self, layer: nn.Module) -> Tensor:
        return (self.bias - cast(Tensor, layer.bias)) * self.strength


class TokenRows(nn.Module):
    """Rows of an embedding, trained; the others stay frozen (`trainable_token_indices`).

    trainable_tokens_delta: Parameter (n, dim), the rows themselves, in the order of the indices; the name is PEFT's.
    strength: run-time dial, 1 unless set.
    """

    indices: Tensor
    order: Tensor
    strength: Tensor

    def __init__(self, layer: nn.Module, indices: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__()
        weight = weight_of(layer).detach()
        given = torch.tensor(indices, device=weight.device)
        self.register_buffer("order", given.argsort(), persistent=False)
        self.register_buffer("indices", given, persistent=False)  # (n,)
        self.register_buffer("strength", torch.ones((), device=weight.device, dtype=dtype), persistent=False)
        self.trainable_tokens_delta = nn.Parameter(weight[given].to(dtype))

    def added(self, y: Tensor, base: Tensor, x: Tensor, layer: nn.Module) -> Tensor:
        return y + self.change(base, x, layer)

    def change(self, base: Tensor, ids: Tensor, layer: nn.Module) -> Tensor:
        """base, (..., dim): the embedding's output for ids (...)."""
        known = self.indices[self.order]
        place = torch.searchsorted(known, ids.long()).clamp(max=len(known) - 1)
        rows = F.embedding(self.order[place], self.trainable_tokens_delta)
        scale = getattr(layer, "embed_scale", None)
        rows = rows if scale is None else rows * scale
        change = (rows - base) * self.strength
        return torch.where((known[place] == ids)[..., None], change, 0).to(base.dtype)

    def row_change(self, layer: nn.Module) -> tuple[Tensor, Tensor]:
        """Which rows of the layer's weight change, (n,), and by what, (n, dim)."""
        return self.indices, (self.trainable_tokens_delta - weight_of(layer)[self.indices]) * self.strength


class TokenHead(nn.Module):
    """The output head that is tied to an embedding follows the rows that are trained there. Has no parameters."""

    def __init__(self, rows: TokenRows) -> None:
        super().__init__()
        self.__dict__["rows"] = rows  # registered once, with the embedding

    def added(self, y: Tensor, base: Tensor, x: Tensor, layer: nn.Module) -> Tensor:
        return y + self.change(base, x, layer)

    def change(self, base: Tensor, x: Tensor, layer: nn.Module) -> Tensor:
        """base, (..., vocabulary): the head's output for x (..., dim)."""
        indices, moved = self.row_change(layer)
        logits = F.linear(x, moved.to(x.dtype)).to(base.dtype)  # (..., n)
        return torch.zeros_like(base).index_copy(-1, indices, logits)

    def row_change(self, layer: nn.Module) -> tuple[Tensor, Tensor]:
        return cast(TokenRows, self.__dict__["rows"]).row_change(layer)


Extra = TrainedBias | TokenRows | TokenHead


def rows_behind(part: nn.Module) -> TokenRows | None:
    return part if isinstance(part, TokenRows) else part.__dict__["rows"] if isinstance(part, TokenHead) else None
