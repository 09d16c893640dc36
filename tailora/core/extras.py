"""Parts that an adapter trains in addition to its low-rank updates: biases of layers, and rows of an embedding.

    TrainedBias    replaces a layer's bias
    TokenRows      rows of an embedding
    TokenHead      the output head tied to that embedding
    extra_targets  the biases, rows and heads that a config selects

An adapted layer calls their `add_to`, as it does for a LoRALayer. A merge adds `bias_change` or `row_change` to the
layer's tensors.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tailora.core import patterns
from tailora.core.attach import AdapterPart
from tailora.core.config import LoRAConfig
from tailora.core.layer_types import CONV1D, EMBEDDING, is_called, layer_type_of, obstacle, weight_of, whole_tensor
from tailora.errors import nearest

Modules = Mapping[str, nn.Module]  # of the whole model, by path

# Classes that add their bias to their output, grouped by the output dimension of the bias
BIAS_SECOND = (nn.GroupNorm, nn.modules.batchnorm._NormBase)
BIAS_BEFORE_KERNEL = (nn.modules.conv._ConvNd,)
ADD_THEIR_BIAS = (nn.Linear, nn.LayerNorm, *BIAS_SECOND, *BIAS_BEFORE_KERNEL)  # and CONV1D


def biases_of(module: nn.Module) -> list[str]:
    """Returns the names of the biases among the module's direct parameters."""
    return [name for name, parameter in module.named_parameters(recurse=False) if "bias" in name]


class TrainedBias(nn.Module, AdapterPart):
    """Replaces a layer's bias without changing the layer's own. strength: adjustable factor, default 1."""

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


class TokenRows(nn.Module, AdapterPart):
    """Trained rows of an embedding; the others stay frozen (`trainable_token_indices`).

    trainable_tokens_delta: Parameter (n, dim), the rows themselves in the order of the indices; the name is PEFT's.
    strength: adjustable factor, default 1.
    padding: position of the padding token in the indices, or None. As in torch and PEFT, its row gets no gradient from
        the embedding, but does from a tied head.
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
        """y, output: (..., dim), the embedding of ids (...)."""
        trained_ids = self.indices[self.order]
        position = torch.searchsorted(trained_ids, ids.long()).clamp(max=len(trained_ids) - 1)
        vectors = F.embedding(self.order[position], self.trainable_tokens_delta, self.padding)
        scale = getattr(layer, "embed_scale", None)
        vectors = vectors if scale is None else vectors * scale
        change = (vectors - output) * self.strength
        return y + torch.where((trained_ids[position] == ids)[..., None], change, 0).to(output.dtype)

    def row_change(self, layer: nn.Module) -> tuple[Tensor, Tensor]:
        """Returns the indices (n,) of the changed rows of the layer's weight, and their changes (n, dim)."""
        return self.indices, (self.trainable_tokens_delta - weight_of(layer)[self.indices]) * self.strength


class TokenHead(nn.Module, AdapterPart):
    """Applies the trained rows to the output head tied to the embedding. Has no parameters."""

    token_rows: TokenRows

    def __init__(self, token_rows: TokenRows) -> None:
        super().__init__()
        self.__dict__["token_rows"] = token_rows  # a reference; registered with the embedding

    def add_to(self, y: Tensor, output: Tensor, x: Tensor, layer: nn.Module) -> Tensor:
        """y, output: (..., vocabulary), the head's output for x (..., dim)."""
        indices, change = self.row_change(layer)
        logits = F.linear(x, change.to(x.dtype)).to(output.dtype)  # (..., n)
        return y + torch.zeros_like(output).index_copy(-1, indices, logits)

    def row_change(self, layer: nn.Module) -> tuple[Tensor, Tensor]:
        return self.token_rows.row_change(layer)


Extra = TrainedBias | TokenRows | TokenHead


# ---- Selection by a config


@dataclass(frozen=True)
class ExtraTargets:
    """Trained parameters besides the low-rank updates."""

    biases: list[str] = field(default_factory=list)  # paths of layers without an update but with a trained bias
    tokens: dict[str, list[int]] = field(default_factory=dict)  # path of an embedding -> the rows to train
    heads: dict[str, str] = field(default_factory=dict)  # path of a head -> path of the embedding it is tied to


def extra_targets(
    model: nn.Module, modules: Modules, config: LoRAConfig, adapted: Collection[str], saved: Collection[str]
) -> tuple[ExtraTargets, list[str]]:
    """Returns what the config selects, and all problems. adapted, saved: paths with updates, with copies."""
    tokens, problems = _token_targets(model, modules, config)
    heads = {
        path: embedding
        for embedding in tokens
        for path, module in modules.items()
        if path != embedding and module._parameters.get("weight") is modules[embedding].weight
    }
    for path in (*tokens, *heads):
        if owner := next((owner for owner in (*adapted, *saved) if patterns.inside(path, owner)), None):
            setting = "target_modules" if owner in adapted else "modules_to_save"
            tie = f", tied to {heads[path]}" if path in heads else ""
            problems.append(f"{path}{tie} is in both trainable_token_indices and {setting}; remove it from one of them")
    if unsupported := [path for path in heads if not isinstance(modules[path], nn.Linear)]:
        problems.append(
            f"trainable_token_indices: unsupported tied modules, neither embedding nor linear: {', '.join(unsupported)}"
        )
    biases: list[str] = []
    if config.bias == "all":
        biases, bias_problems = _bias_targets(modules, adapted, saved)
        problems += bias_problems
        if both := [path for path in biases if path in heads]:
            problems.append(f"bias='all' and trainable_token_indices both train {', '.join(both)}; use only one")
    return ExtraTargets(biases, tokens, heads), problems


def _token_targets(model: Any, modules: Modules, config: LoRAConfig) -> tuple[dict[str, list[int]], list[str]]:
    """Returns path of an embedding -> its rows to train, and all problems. A list means the input embedding."""
    by_name = config.trainable_token_indices
    if by_name is None:
        return {}, []
    if isinstance(by_name, list):
        embedding = input_embedding(model)
        if embedding is None:
            return {}, [
                "trainable_token_indices is a list, but the model's input embedding is unknown; use {'path': [...]}"
            ]
        by_name = {embedding[0]: by_name}
    tokens: dict[str, list[int]] = {}
    problems = []
    for name, indices in by_name.items():
        paths = [path for path in modules if patterns.ends_with(name, path)]
        if not paths:
            embeddings = [path for path, module in modules.items() if layer_type_of(module) is EMBEDDING]
            problems.append(f"trainable_token_indices: {name!r} matches no module{nearest(name, embeddings)}")
        for path in paths:
            if any(
                modules[path]._parameters.get("weight") is modules[embedding].weight and rows == indices
                for embedding, rows in tokens.items()
            ):
                continue  # a head tied to an embedding with the same rows follows it
            tokens[path], module = indices, modules[path]
            at = f"trainable_token_indices: {path}"
            if layer_type_of(module) is not EMBEDDING:
                problems.append(f"{at}: expected an embedding, got {type(module).__name__}")
                continue
            if reason := obstacle(module):
                problems.append(f"{at}: {reason}")
            size = cast(nn.Embedding, module).num_embeddings
            if outside := [index for index in indices if not 0 <= index < size]:
                existing = f"expected 0..{size - 1} (call resize_token_embeddings before adding the adapter)"
                problems.append(f"{at}: row indices {outside[:5]} are out of range; {existing}")
    return ({}, problems) if problems else (tokens, [])


def input_embedding(model: Any) -> tuple[str, nn.Embedding] | None:
    """Returns path and layer of a transformers model's input embedding; None if it has none."""
    get_embedding = getattr(model, "get_input_embeddings", None)
    try:
        embedding = get_embedding() if callable(get_embedding) else None
    except NotImplementedError:  # some models of transformers have none
        return None
    modules = model.named_modules()
    return next(
        ((path, module) for path, module in modules if module is embedding and isinstance(module, nn.Embedding)), None
    )


def _bias_targets(modules: Modules, adapted: Collection[str], saved: Collection[str]) -> tuple[list[str], list[str]]:
    """Returns the paths of layers without an update but with a bias to train (bias="all"), and all problems."""
    biases, problems = [], []
    for path, module in modules.items():
        names = biases_of(module)
        if not names or any(patterns.inside(path, saved_path) for saved_path in saved):
            continue
        adds_its_bias = isinstance(module, ADD_THEIR_BIAS) or layer_type_of(module) is CONV1D
        if "forward" in vars(module):
            problems.append(
                f"bias='all': cannot train the bias of {path}, because its forward was replaced on the instance"
            )
        elif names == ["bias"] and (adds_its_bias or path in adapted) and is_called(module):
            biases += [path] if path not in adapted else []
        else:
            problems.append(
                f"bias='all': {path or 'the model'} is a {type(module).__name__} that does not add its "
                f"{', '.join(names)} to its output; use bias='lora_only', or add this module to modules_to_save"
            )
    if not biases and not problems and not any(biases_of(modules[path]) for path in adapted):
        problems.append("bias='all': the model has no bias; use bias='none' or lora_bias=True")
    return biases, problems
