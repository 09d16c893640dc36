"""Which kernels a run computes with: those that apply are tried on the user's model against transformers' own layers.

choose_kernels    what applies -> tried, compared -> `Kernels`, with a description for the run's header
use_kernels       within the block the model computes with them
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tailora.core.attach import Adapted, evaluating
from tailora.core.layer import LoRALayer
from tailora.data.dataset import Example
from tailora.errors import ConfigError
from tailora.kernels.attention import packed_rows, padded_rows
from tailora.kernels.cpu_attention import BLOCK, BLOCKS_ONLY, FLASH_ONLY, flash_thresholds
from tailora.kernels.device_attention import PROVIDERS
from tailora.kernels.llama import eligible, fast_layers, obstacle_to_layers
from tailora.train.loss import BatchLayout, token_losses
from tailora.train.packing import random_documents
from tailora.train.trainable import Trainable, trained_module

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-5}  # float64: transformers computes norms in float32
HALF_TOLERANCE = 0.1  # bfloat16, float16
SPREAD = 0.02  # standard deviation of factors that start at zero, while gradients are compared


@dataclass(frozen=True)
class Kernels:
    layers: bool  # decoder layers of the Llama family as one autograd Function each
    description: str  # for the run's header: decoder layers; attention; loss


def choose_kernels(
    fast: str, model: Trainable, layout: BatchLayout, sample: Example, recorded: bool | None = None
) -> Kernels:
    """Returns the kernels of a run.

    fast: auto or off. If `auto` cannot use the fused layers, or they give other results, the description says why.
    sample: an example of the run's data, because half precision computes random tokens with large errors in any order.
    recorded: the choice of the run that is resumed. It is used again, because the adapter's tensors are not restored
        yet and nothing could be compared.
    """
    base = cast(PreTrainedModel, model.base_model)
    obstacle, check = obstacle_to_kernels(fast, base, layout), "as when the run was started"
    if obstacle is None and recorded is None:
        # two documents from the start of the sample, longer than a sliding window unless that is long
        lengths = [len(document.input_ids) for document in random_documents(base.config)]
        parts = np.split(sample.input_ids[: sum(lengths)], [min(lengths[0], len(sample.input_ids) // 2)])
        difference = largest_difference(model, [Example(ids, ids.copy()) for ids in parts], layout)
        allowed = TOLERANCE.get(base.dtype, HALF_TOLERANCE)
        if difference is None:
            obstacle = "they do not call every adapted layer, and the fused ones would"
        elif not difference <= allowed:
            obstacle = f"the fused ones differ from them by {difference:.0e} (allowed: {allowed:.0e})"
        else:
            check = (
                "checked against the layers of transformers: outputs and gradients differ by at most "
                f"{difference:.0e} (relative, allowed: {allowed:.0e})"
            )
    elif obstacle is None and not recorded:
        obstacle = "the run was started with them"
    return described_kernels(base, layout, obstacle, check)


def obstacle_to_kernels(fast: str, base: PreTrainedModel, layout: BatchLayout) -> str | None:
    """Returns why the fused layers are not even tried; None if they can be."""
    if fast == "off":
        return "--fast off asks for them"
    if not layout.packed:
        return "fused ones need packed batches, and these are padded"
    if base.device.type != "cpu":
        return f"fused ones were not measured on {base.device.type}"
    return obstacle_to_layers(base)


def described_kernels(base: PreTrainedModel, layout: BatchLayout, obstacle: str | None, check: str) -> Kernels:
    """Returns the fused layers if nothing prevents them, else those of transformers.

    check: how it is known that the fused layers give the same results.
    """
    fused = obstacle is None
    layers = f"fused for speed, {check}" if fused else f"those of transformers, because {obstacle}"
    return Kernels(fused, f"decoder layers: {layers}; attention: {_attention(base, layout)}; loss: {layout.loss}")


def _attention(base: PreTrainedModel, layout: BatchLayout) -> str:
    """Returns how attention is computed, for the run's header."""
    if not layout.packed:
        return f"{base.config._attn_implementation} with a padding mask"
    if layout.attention in PROVIDERS:
        return PROVIDERS[layout.attention].description
    thresholds = flash_thresholds(base.dtype)
    if thresholds == BLOCKS_ONLY:
        return f"batched products over blocks of {BLOCK} queries"
    if thresholds == FLASH_ONLY:
        return "torch's flash attention for CPUs, documents of similar length together"
    length = f"{thresholds.forward:,} tokens and more"
    return f"torch's flash attention for documents of {length}, blocks of {BLOCK} queries for shorter ones"


def largest_difference(model: Trainable, examples: Sequence[Example], layout: BatchLayout) -> float | None:
    """Returns the largest relative difference of a fused layer from the layer's own forward on the same input.

    Compared are what the layer adds to its input, and the gradients of the input and of the factors. None if the own
    forward of a layer does not use all of its factors.
    """
    base = cast(PreTrainedModel, model.base_model)
    largest = 0.0
    with evaluating(model), zeros_randomized(model), packed_rows(base, layout.attention):
        for layer, x, arguments in _layer_calls(model, examples, layout):
            plain = _outputs_and_gradients(layer, x, arguments)
            with fast_layers(layer):
                fused = _outputs_and_gradients(layer, x, arguments)
            if plain is None or fused is None:
                return None
            differences = [(a - b).norm() / a.norm() for a, b in zip(plain, fused, strict=True) if a.any()]
            largest = max(largest, *map(float, differences))
    return largest


def _layer_calls(
    model: Trainable, examples: Sequence[Example], layout: BatchLayout
) -> list[tuple[nn.Module, Tensor, dict[str, Any]]]:
    """Returns each layer that can be fused, its input (1, tokens, hidden), and the other arguments of its call."""
    calls = []

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], arguments: dict[str, Any]) -> None:
        calls.append((layer, inputs[0].detach(), arguments))

    with ExitStack() as hooks, torch.no_grad():
        for layer in eligible(model.base_model):
            hooks.enter_context(layer.register_forward_pre_hook(note, with_kwargs=True))
        token_losses(model, examples, layout)
    return calls


def _outputs_and_gradients(layer: nn.Module, x: Tensor, arguments: dict[str, Any]) -> list[Tensor] | None:
    """Returns what the layer adds to x, what it adds to the gradient of x, and the gradients of its factors.

    None if the layer does not use all of its factors.
    """
    adapted = [module for module in layer.modules() if isinstance(module, Adapted)]
    factors = [parameter for module in adapted for part in module.active_adapters for parameter in part.parameters()]
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(x)
    with torch.enable_grad():
        x = x.requires_grad_()
        y = layer(x, **arguments)
        dx, *gradients = torch.autograd.grad(y, [x, *factors], weights, allow_unused=True)
    if any(gradient is None for gradient in gradients):
        return None
    return [(y - x).detach().float(), (dx - weights).float(), *gradients]


@contextmanager
def zeros_randomized(model: Trainable) -> Iterator[None]:
    """Within the block, factors that are zero are random, so that no gradient that is compared is zero."""
    layers = [layer for layer in trained_module(model).modules() if isinstance(layer, LoRALayer)]
    factors = [factor for layer in layers for factor in (layer.lora_A, layer.lora_B, layer.lora_E)]
    zeros = [factor for factor in factors if factor is not None and not factor.any()]
    generator = torch.Generator().manual_seed(0)
    try:
        for factor in zeros:
            factor.data.copy_(torch.randn(factor.shape, generator=generator, device="cpu").mul_(SPREAD))
        yield
    finally:
        for factor in zeros:
            factor.data.zero_()


@contextmanager
def use_kernels(
    base: PreTrainedModel, layout: BatchLayout, kernels: Kernels, *, checkpointed: bool = False
) -> Iterator[None]:
    """Within the block the model computes batches of this layout with these kernels; then it is restored.

    checkpointed: with gradient checkpointing. Raises ConfigError if the model does not support it.
    """
    with ExitStack() as stack:
        stack.enter_context(packed_rows(base, layout.attention) if layout.packed else padded_rows(base))
        if kernels.layers:
            stack.enter_context(fast_layers(base, checkpointed=checkpointed))
        elif checkpointed:
            stack.enter_context(checkpointed_layers(base))
        yield


@contextmanager
def checkpointed_layers(base: PreTrainedModel) -> Iterator[None]:
    """Within the block every layer keeps only its input and computes the rest again. Raises ConfigError.

    transformers also makes the embedding's output require gradients, which only reentrant checkpointing needs. The
    backward would then go through the layers below the first adapted one, so this is undone.
    """
    new = hasattr(base, "activation_checkpointing_enable")  # the name since transformers 5.2x
    enable = base.activation_checkpointing_enable if new else base.gradient_checkpointing_enable
    disable = base.activation_checkpointing_disable if new else base.gradient_checkpointing_disable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise ConfigError(f"gradient_checkpointing: {error}; leave it out") from None
    base.disable_input_require_grads()
    try:
        yield
    finally:
        disable()
