"""Which kernels a run takes: what applies is tried on the user's model against the plain path, and said aloud."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from tailora.core.attach import Adapted, evaluating
from tailora.core.layer import LoRALayer
from tailora.data.dataset import Example
from tailora.errors import ConfigError
from tailora.kernels.attention import BLOCKS, SHORT, TORCHS, best_ways, packed_rows
from tailora.kernels.llama import eligible, fast_layers, obstacle_to_layers
from tailora.train.loss import BatchLayout, token_losses
from tailora.train.packing import probes
from tailora.train.trainable import Trainable, trained

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-5}  # float64: transformers computes norms in float32
HALF_TOLERANCE = 0.1  # bfloat16, float16
MIXED = "torch's forward of long documents, else grouped, in blocks"
WAYS = {BLOCKS: "grouped, in blocks", TORCHS: "torch's, by length"}  # of attention within the layer kernels
SPREAD = 0.02  # of factors that start at zero, while gradients are compared


@dataclass(frozen=True)
class Kernels:
    """What was chosen, and why."""

    layers: bool  # whole layers as one Function
    words: str  # for the run's header


def choose_kernels(
    fast: str, model: Trainable, rows: BatchLayout, sample: Example, device: torch.device, before: bool | None = None
) -> Kernels:
    """`fast` is auto or off. Where `auto` finds that the layer kernels do not apply, or differ, `words` says why.

    sample: of the run's own data, since half precision computes random tokens with large errors in any order.
    before: what the run that goes on chose; its factors are not there yet, so nothing is tried again.
    """
    base = cast(PreTrainedModel, model.base_model)
    reason = obstacle_to_kernels(fast, base, rows, device)
    verdict = ""
    if reason is None and before is not None:
        verdict, reason = "as before", None if before else "as before"
    elif reason is None:
        apart = disagreement(model, documents(sample, base.config), rows, device)
        allowed = TOLERANCE.get(base.dtype, HALF_TOLERANCE)
        verdict = f"verified ({apart:.0e} apart)"
        if not apart <= allowed:
            reason = f"they differ from the plain path by {apart:.1e}, allowed {allowed:.0e}"
    return described(base, rows, device, reason, verdict)


def described(
    base: PreTrainedModel, rows: BatchLayout, device: torch.device, reason: str | None, verdict: str
) -> Kernels:
    """reason: why the layer kernels are off, or None."""
    layers = f"Llama family, {verdict}" if reason is None else f"off, {reason}"
    attention = _attention(base, rows, device) if reason else WAYS.get(best_ways(base.dtype), MIXED)
    return Kernels(reason is None, f"layer kernels: {layers}; attention: {attention}; loss: {rows.loss}")


def obstacle_to_kernels(fast: str, base: PreTrainedModel, rows: BatchLayout, device: torch.device) -> str | None:
    """Why the layer kernels are not even tried, or None."""
    if fast == "off":
        return "as asked"
    if not rows.packed:
        return "batches are padded"
    if device.type != "cpu":
        return f"not measured on {device.type}"
    return obstacle_to_layers(base)


def _attention(base: PreTrainedModel, rows: BatchLayout, device: torch.device) -> str:
    if not rows.packed:
        return f"{base.config._attn_implementation}, padded"
    in_blocks = device.type == "cpu" and base.dtype == torch.bfloat16
    return f"grouped bf16 up to {SHORT} tokens, else SDPA" if in_blocks else "SDPA per document"


def documents(sample: Example, config: PretrainedConfig) -> list[Example]:
    """Two documents from the start of the sample, long enough to show a sliding window where it is."""
    lengths = [len(probe.input_ids) for probe in probes(config)]
    parts = np.split(sample.input_ids[: sum(lengths)], [min(lengths[0], len(sample.input_ids) // 2)])
    return [Example(ids, ids.copy()) for ids in parts]


def disagreement(model: Trainable, examples: Sequence[Example], rows: BatchLayout, device: torch.device) -> float:
    """Of each layer's kernel from its own forward on the same input: the largest relative difference of all layers.

    Compared are what the layer adds to its input, and the gradients of the input and of the factors.
    """
    base = cast(PreTrainedModel, model.base_model)
    largest = 0.0
    with evaluating(model), stirred(model), packed_rows(base):
        for layer, x, given in _calls(model, examples, rows, device):
            plain = _tried(layer, x, given)
            with fast_layers(layer):
                fast = _tried(layer, x, given)
            apart = [(a - b).norm() / a.norm() for a, b in zip(plain, fast, strict=True) if a.any()]
            largest = max(largest, *(float(each) for each in apart))
    return largest


Call = tuple[nn.Module, Tensor, dict[str, Any]]  # a layer, its input (1, tokens, hidden), its other arguments


def _calls(model: Trainable, examples: Sequence[Example], rows: BatchLayout, device: torch.device) -> list[Call]:
    """What each layer that the kernels take is called with."""
    calls: list[Call] = []

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], given: dict[str, Any]) -> None:
        calls.append((layer, inputs[0].detach(), given))

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in eligible(model.base_model)]
    try:
        with torch.no_grad():
            token_losses(model, examples, rows, device)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _tried(layer: nn.Module, x: Tensor, given: dict[str, Any]) -> list[Tensor]:
    """What the layer adds to x, and the gradients of x, likewise, and of the factors within it."""
    adapted = [module for module in layer.modules() if isinstance(module, Adapted)]
    factors = [parameter for module in adapted for part in module.active_adapters for parameter in part.parameters()]
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    with torch.enable_grad():
        x = x.requires_grad_()
        y = layer(x, **given)
        dx, *gradients = torch.autograd.grad(y, [x, *factors], weights)
    return [(y - x).detach().float(), (dx - weights).float(), *gradients]


@contextmanager
def stirred(model: Trainable) -> Iterator[None]:
    """Within the block, factors that are zero are random, so that every gradient is there to be compared."""
    layers = [layer for layer in trained(model).modules() if isinstance(layer, LoRALayer)]
    factors = [factor for layer in layers for factor in (layer.lora_A, layer.lora_B, layer.lora_E)]
    zeros = [factor for factor in factors if factor is not None and not factor.any()]
    generator = torch.Generator().manual_seed(0)
    try:
        for factor in zeros:
            factor.data.copy_(torch.randn(factor.shape, generator=generator).mul_(SPREAD))
        yield
    finally:
        for factor in zeros:
            factor.data.zero_()


@contextmanager
def running(
    base: PreTrainedModel, rows: BatchLayout, kernels: Kernels, *, checkpointed: bool = False
) -> Iterator[None]:
    """The model reads these rows by these kernels; afterwards it is what it was. Raises ConfigError."""
    with ExitStack() as stack:
        if rows.packed:
            stack.enter_context(packed_rows(base))
        if kernels.layers:
            stack.enter_context(fast_layers(base, checkpointed=checkpointed))
        elif checkpointed:
            stack.enter_context(checkpointed_layers(base))
        yield


@contextmanager
def checkpointed_layers(base: PreTrainedModel) -> Iterator[None]:
    """Within the block every layer keeps its input only and computes the rest again. Raises ConfigError.

    transformers also makes the embedding's output ask for gradients, which is for the reentrant kind and would send
    the backward through layers below the first adapted one; that is undone.
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
