"""What an adapter trains beside its low-rank updates: biases of layers, and rows of an embedding.

    TrainedBias    replaces a layer's bias
    TokenRows      rows of an embedding
    TokenHead      the output head that is tied to that embedding

An adapted layer calls their `add_to`, as that of a LoRALayer. A merge adds `bias_change` or `row_change` to the layer's
tensors.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tailora.core.layer_types import qualified_name, weight_of, whole_tensor

# Classes that add their bias to the rest of their output, by the dimension of the output that it runs along.
BIAS_LAST = (nn.Linear, nn.LayerNorm)
BIAS_SECOND = (nn.GroupNorm, nn.modules.batchnorm._NormBase)
BIAS_BEFORE_KERNEL = (nn.modules.conv._ConvNd,)
BIAS_LAST_NAMES = ("transformers.pytorch_utils.Conv1D",)


def adds_its_bias(module: nn.Module) -> bool:
    names = set(map(qualified_name, type(module).__mro__))
    classes = (*BIAS_LAST, *BIAS_SECOND, *BIAS_BEFORE_KERNEL)
    return isinstance(module, classes) or not names.isdisjoint(BIAS_LAST_NAMES)


def biases_of(module: nn.Module) -> list[str]:
    """Returns the names of the module's own parameters that are biases."""
    return [name for name, parameter in module.named_parameters(recurse=False) if "bias" in name]


class TrainedBias(nn.Module):
    """Replaces the bias of a layer, whose own bias is not changed.

    bias: Parameter, shaped as the layer's.    strength: run-time dial, 1 unless set.
    """

    def __init__(self, layer: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        bias = whole_tensor(cast(Tensor, layer.bias).detach())
        self.bias = nn.Parameter(bias.to(dtype, copy=True))
        self.strength = 1.0

    def add_to(self, y: Tensor, output: Tensor, _x: Tensor, layer: nn.Module) -> Tensor:
        change = self.bias_change(layer).to(output.dtype)
        if isinstance(layer, BIAS_BEFORE_KERNEL):
            change = change[(..., *[None] * len(cast(Any, layer).kernel_size))]
        elif isinstance(layer, BIAS_SECOND):
            change = change[(..., *[None] * (output.ndim - 2))]
        return y + change

    def bias_change(self, layer: nn.Module) -> Tensor:
        return (self.bias - cast(Tensor, layer.bias)) * self.strength


class TokenRows(nn.Module):
    """Trained rows of an embedding; the others stay frozen (`trainable_token_indices`).

    trainable_tokens_delta: Parameter (n, dim), the rows themselves, in the order of the indices; the name is PEFT's.
    strength: run-time dial, 1 unless set.
    padding: position of the padding token among the indices, or None. As in torch and PEFT, the embedding gives its row
        no gradient; a head that is tied to the embedding does.
    """

    indices: Tensor
    order: Tensor

    def __init__(self, layer: nn.Module, indices: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__()
        weight = weight_of(layer).detach()
        ids = torch.tensor(indices, device=weight.device)
        self.register_buffer("order", ids.argsort(), persistent=False)
        self.register_buffer("indices", ids, persistent=False)  # (n,)
        self.strength = 1.0
        self.trainable_tokens_delta = nn.Parameter(weight[ids].to(dtype))
        padding = getattr(layer, "padding_idx", None)
        self.padding = indices.index(padding) if padding is not None and padding in indices else None

    def add_to(self, y: Tensor, output: Tensor, ids: Tensor, layer: nn.Module) -> Tensor:
        """y, output (..., dim): of the embedding for ids (...)."""
        trained_ids = self.indices[self.order]
        position = torch.searchsorted(trained_ids, ids.long()).clamp(max=len(trained_ids) - 1)
        vectors = F.embedding(self.order[position], self.trainable_tokens_delta, self.padding)
        scale = getattr(layer, "embed_scale", None)
        vectors = vectors if scale is None else vectors * scale
        change = (vectors - output) * self.strength
        return y + torch.where((trained_ids[position] == ids)[..., None], change, 0).to(output.dtype)

    def row_change(self, layer: nn.Module) -> tuple[Tensor, Tensor]:
        """Returns which rows of the layer's weight change, (n,), and by how much, (n, dim)."""
        return self.indices, (self.trainable_tokens_delta - weight_of(layer)[self.indices]) * self.strength


class TokenHead(nn.Module):
    """Lets the output head that is tied to an embedding follow the trained rows. Has no parameters."""

    def __init__(self, token_rows: TokenRows) -> None:
        super().__init__()
        self.__dict__["token_rows"] = token_rows  # a reference: it is registered with the embedding

    def add_to(self, y: Tensor, output: Tensor, x: Tensor, layer: nn.Module) -> Tensor:
        """y, output (..., vocabulary): of the head for x (..., dim)."""
        indices, change = self.row_change(layer)
        logits = F.linear(x, change.to(x.dtype)).to(output.dtype)  # (..., n)
        return y + torch.zeros_like(output).index_copy(-1, indices, logits)

    def row_change(self, layer: nn.Module) -> tuple[Tensor, Tensor]:
        return cast(TokenRows, self.__dict__["token_rows"]).row_change(layer)


Extra = TrainedBias | TokenRows | TokenHead


def token_rows_of(part: nn.Module) -> TokenRows | None:
    """Returns the trained rows that a TokenRows or TokenHead adds; None for any other part."""
    if isinstance(part, TokenHead):
        return cast(TokenRows, part.__dict__["token_rows"])
    return part if isinstance(part, TokenRows) else None
