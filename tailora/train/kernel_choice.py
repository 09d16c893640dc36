"""Which kernels a run computes with. Each kind is tried on the user's model (`train.kernel_comparison`).

choose_layout     packed or padded batches; what computes attention (`choose_packing`), and the loss (`choose_form`);
                  16-bit products in float32 where that is faster
choose_kernels    compiled layers if the rest of the run pays for compiling and they are faster here, else the layers
                  of transformers. All processes choose the same.
use_kernels       within the block the model computes with them
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tailora.core.attach import evaluating
from tailora.core.device import HALF, synchronize
from tailora.core.float32_products import checkpoint_contexts, fastest_products
from tailora.core.quantization import is_quantized
from tailora.data.dataset import Example
from tailora.errors import ConfigError
from tailora.kernels.attention import CPU
from tailora.kernels.compiled_layers import (
    COMPILER_ERRORS,
    CompiledLayers,
    decoder_layers,
    layer_kind,
    obstacle_to_compiling,
    paying_tokens,
)
from tailora.kernels.cpu_attention import BLOCK
from tailora.kernels.device_attention import PROVIDERS
from tailora.kernels.loss import FROZEN, HEAD, RECOMPUTED, Batch, LossForm, own_form
from tailora.kernels.recompute import Recomputing, recomputed
from tailora.patches import attention_of
from tailora.train.config import TrainConfig
from tailora.train.kernel_comparison import (
    LayerCall,
    calls_of_layers,
    compare_layers,
    obstacle_to_form,
    obstacle_to_provider,
    obstacle_to_sharing,
    outputs_and_gradients,
    parts_of_sample,
    short_examples,
)
from tailora.train.loss import CAUSAL_LM, BatchLayout, Task, make_batch
from tailora.train.model_loading import pad_id
from tailora.train.parallel import first_of_ranks
from tailora.train.trainable import Trainable

TIMED_TOKENS = 256  # of a layer whose time is measured, in two documents like those that are compared
TIMES = 3  # number of measurements; the shortest counts

PLAIN, COMPILED = "plain", "compiled"


@dataclass(frozen=True)
class Kernels:
    layers: str  # PLAIN: layers of transformers; COMPILED: by torch.compile
    description: str  # for the run's header: decoder layers; attention; loss
    compiled: CompiledLayers | None = None
    recomputes: bool = False  # True: what is cheap to compute again is not kept for the backward


def choose_layout(
    config: TrainConfig,
    model: Trainable,
    tokenizer: PreTrainedTokenizerBase | None,
    note: Callable[[str], None],
    *,
    compare: bool = True,
    trains: bool = True,
    task: Task = CAUSAL_LM,
) -> BatchLayout:
    """Returns packed or padded batches, and how the loss is computed; both are tried unless the task `is_plain`.

    note: called with the reason if the model cannot do what is fastest.
    compare: False for a model without contents, whose structure alone decides.
    trains: False if only outputs count, not gradients.
    Raises ConfigError for packing = 'on' if it would change results.
    """
    base = cast(PreTrainedModel, model.base_model)
    float32_from = None
    if compare and config.fast != "off":
        float32_from = cast("int | None", broadcast_object_list([fastest_products(base)])[0])
    if task.is_plain:
        if config.packing == "on":
            raise ConfigError(f"--packing on is not supported for {task.description}; remove --packing")
        return BatchLayout(False, HEAD, pad_id(tokenizer), float32_from=float32_from)
    with evaluating(model):
        attention, packing_note = choose_packing(base, config.packing, compare=compare, trains=trains)
        packed, own = attention is not None, own_form(base)
        may_share = attention == CPU and compare and config.fast != "off"
        sharing_obstacle = obstacle_to_sharing(base, CPU) if may_share else None
        shares = may_share and sharing_obstacle is None
        layout = BatchLayout(packed, own, pad_id(tokenizer), attention, float32_from, shares)
        with layout.used_by(base):
            batch = make_batch(short_examples(base), layout, base.device)
            loss, obstacle = own, None
            if config.fast != "off":
                loss, obstacle = choose_form(base, batch, compare)
    if packing_note:
        note(packing_note)
    if sharing_obstacle:
        note(f"shared prefixes are computed separately for each document: {sharing_obstacle}")
    if obstacle:
        note(f"the loss is computed {loss}, which takes more memory: {obstacle}")
    return replace(layout, loss=loss)


def choose_packing(
    model: PreTrainedModel, setting: str, *, compare: bool = True, trains: bool = True
) -> tuple[str | None, str | None]:
    """Returns what computes attention of packed rows, or None, and why not something better. Raises ConfigError."""
    if setting == "off":
        return None, None
    obstacles: dict[str, str] = {}
    device_type = model.device.type
    for provider in candidates(device_type) if compare else [predicted_provider(device_type, model.dtype)]:
        obstacle = obstacle_to_provider(model, provider, compare=compare, trains=trains)
        if obstacle is None:
            passed_over = "; ".join(f"{name} is not used, because {reason}" for name, reason in obstacles.items())
            return provider, f"attention is computed by {provider}; {passed_over}" if passed_over else None
        obstacles[provider] = obstacle
    reasons = "; ".join(dict.fromkeys(obstacles.values()))
    if setting == "on":
        raise ConfigError(f"packing='on' is not possible: {reasons}. Use 'auto', or 'off' for padded batches")
    return None, f"using padded batches instead of packed rows: {reasons}"


def candidates(device_type: str) -> list[str]:
    return [CPU] if device_type == "cpu" else [*PROVIDERS]


def predicted_provider(device_type: str, dtype: torch.dtype) -> str:
    """Returns the provider to assume for a model without weights."""
    if device_type == "cpu":
        return CPU
    return "varlen_attn" if device_type == "cuda" and dtype in HALF else "sdpa"


def choose_form(model: Any, batch: Batch, compare: bool = True) -> tuple[LossForm, str | None]:
    """Returns the form of least memory that is right, and why it is not chunked. compare: see `choose_layout`."""
    own, chunked = own_form(model), RECOMPUTED
    head = model.get_output_embeddings()
    if type(head) is nn.Linear and not is_quantized(head) and not any(p.requires_grad for p in head.parameters()):
        chunked = FROZEN  # an adapted or quantized layer is not a plain one
    obstacle = obstacle_to_form(model, batch, chunked, own, compare=compare)
    return (own, f"{type(model).__name__} {obstacle}") if obstacle else (chunked, None)


def choose_kernels(
    config: TrainConfig,
    model: Trainable,
    layout: BatchLayout,
    tokens: float,
    sample: Example,
    recorded: str | None = None,
) -> Kernels:
    """Returns the kernels of a run, whose description says why others are not used.

    tokens: what is left of the run on this rank.
    sample: from the run's data, because half precision computes random tokens with large errors in any order.
    recorded: the choice of the run that is resumed (`Kernels.layers`). It is used again, because the adapter's
        tensors are not restored yet and nothing could be compared.
    Raises ConfigError if compiled layers are asked for and there is an obstacle.
    """
    base = cast(PreTrainedModel, model.base_model)
    if layout.loss == HEAD:
        if config.fast == "compile":
            raise ConfigError("--fast compile only applies to language models; remove it")
        return plain_kernels(config, base, layout)
    reason = ""
    if config.fast != "off":
        kernels, obstacle = _try_compiled(config, model, layout, tokens, sample, recorded)
        if kernels is not None:
            return kernels
        if config.fast == "compile":
            raise ConfigError(
                f"--fast compile needs compiled layers, which are not possible in this run: {obstacle}; remove it"
            )
        if recorded == COMPILED:
            raise ConfigError(
                f"the run was started with compiled layers, which are not possible now: {obstacle}; resume on the same "
                "machine with the same settings, or start over in a different --output-dir"
            )
        reason = f" (compiled layers: {obstacle})"
    return plain_kernels(config, base, layout, reason)


def _try_compiled(
    config: TrainConfig, model: Trainable, layout: BatchLayout, tokens: float, sample: Example, recorded: str | None
) -> tuple[Kernels | None, str | None]:
    """Returns kernels with compiled layers, or why there are none."""
    base = cast(PreTrainedModel, model.base_model)
    if config.gradient_checkpointing:
        return None, "--gradient-checkpointing recomputes each layer"
    if obstacle := first_of_ranks(obstacle_to_compiling(base, base.device)):
        return None, obstacle
    compiled = CompiledLayers()
    kernels = Kernels(COMPILED, "", compiled)
    if recorded == PLAIN:
        return None, "the run was started without them"
    must_pay = recorded is None and config.fast != "compile"
    if must_pay and (obstacle := first_of_ranks(_obstacle_to_gain(base, tokens))):
        return None, obstacle
    checked = "checked when the run was started"
    if recorded is None:
        parts = parts_of_sample(sample, base)
        obstacle, checked = _try_on_all_ranks(lambda: compare_layers(model, parts, layout, compiled))
        if obstacle is not None:
            return None, obstacle
    obstacle, speed = _try_on_all_ranks(lambda: _compare_time(model, sample, layout, compiled, must_pay))
    if obstacle is not None:
        return None, obstacle
    text = f"decoder layers: compiled, {speed}, {checked}; attention: {_attention(base, layout)}"
    return replace(kernels, description=f"{text}; loss: {layout.loss}{_products(base, layout)}"), None


def _obstacle_to_gain(base: PreTrainedModel, tokens: float) -> str | None:
    """Returns why the rest of the run, of `tokens`, does not pay for compiling."""
    needed = paying_tokens(base.device, base.dtype, decoder_layers(base))
    if needed is None:
        place = "this CPU" if base.device.type == "cpu" else base.device.type
        dtype = str(base.dtype).removeprefix("torch.")
        return f"no speedup is known on {place} in {dtype}; use --fast compile to try them"
    if tokens < needed:
        return (
            f"compiling would take longer than it saves over {tokens:,.0f} tokens; it pays off from {needed:,} tokens"
        )
    return None


def _try_on_all_ranks(trial: Callable[[], tuple[str | None, str]]) -> tuple[str | None, str]:
    """Returns the obstacle that the trial finds on any rank, and what it shows on this one."""
    try:
        obstacle, result = trial()
    except COMPILER_ERRORS as error:
        cause = " ".join(str(error).split("\n\n")[0].split())  # what follows are hints for torch's developers
        obstacle, result = f"torch.compile fails on them ({cause})", ""
    return first_of_ranks(obstacle), result


def _compare_time(
    model: Trainable, sample: Example, layout: BatchLayout, compiled: CompiledLayers, must_pay: bool
) -> tuple[str | None, str]:
    """Compiles the layers as the run calls them, with their dropout; returns an obstacle, and how fast they are."""
    base = cast(PreTrainedModel, model.base_model)
    ids = np.resize(sample.input_ids, TIMED_TOKENS)
    documents = [Example.of_text(part) for part in np.split(ids, [TIMED_TOKENS // 2 - 8])]  # of different lengths
    ours, theirs = [], []
    with layout.used_by(base):
        calls = {layer_kind(call[0]): call for call in calls_of_layers(model, decoder_layers(base), documents, layout)}
        if not calls:
            return "the model does not call them for text", ""
        for _ in range(1 + TIMES):  # in turns; the first of each is not counted
            with compiled.used_by([layer for layer, *_ in calls.values()]):
                ours.append(_seconds(calls.values()))
            theirs.append(_seconds(calls.values()))
    share = min(ours[1:]) / min(theirs[1:])
    speed = f"a layer takes {share:.2f} times as long as without compiling"
    return f"they were compiled, but {speed}" if must_pay and share >= 1 else None, speed


def _seconds(calls: Iterable[LayerCall]) -> float:
    started = time.perf_counter()
    for layer, inputs, arguments in calls:
        outputs_and_gradients(layer, inputs, arguments)
        synchronize(inputs[0].device)
    return time.perf_counter() - started


def plain_kernels(config: TrainConfig, base: PreTrainedModel, layout: BatchLayout, reason: str = "") -> Kernels:
    """Returns the layers of transformers. reason: why others are not used.

    On a CPU cheap activations are recomputed. With checkpointing each layer is computed again anyway, and on a device
    calls of torch cost more.
    """
    recomputes = base.device.type == "cpu" and config.fast != "off" and not config.gradient_checkpointing
    layers = "plain, with cheap activations recomputed" if recomputes else "plain"
    text = f"decoder layers: {layers}{reason}; attention: {_attention(base, layout)}; loss: {layout.loss}"
    return Kernels(PLAIN, text + _products(base, layout), recomputes=recomputes)


def _products(base: PreTrainedModel, layout: BatchLayout) -> str:
    """Returns how products of 16-bit numbers are computed on a CPU, for the run's header."""
    if base.device.type != "cpu" or base.dtype not in HALF:
        return ""
    dtype = str(base.dtype).removeprefix("torch.")
    if layout.float32_from is None:
        return f"; matrix products: {dtype}"
    return f"; matrix products: float32 for {layout.float32_from} tokens or more (faster here than {dtype})"


def _attention(base: PreTrainedModel, layout: BatchLayout) -> str:
    """Returns how attention is computed, for the run's header."""
    if not layout.packed:
        return f"{attention_of(base.config)} with a padding mask"
    if layout.attention in PROVIDERS:
        return PROVIDERS[layout.attention].description
    once = ", shared prefixes only once" if layout.shares_beginnings else ""
    return f"documents by flash attention or in blocks of {BLOCK} queries{once}"


@contextmanager
def use_kernels(
    base: PreTrainedModel, layout: BatchLayout, kernels: Kernels, *, checkpointed: bool = False
) -> Iterator[Recomputing | None]:
    """Computes with this layout and these kernels within the block. Yields what decides which tensors are kept.

    Raises ConfigError if the model does not support checkpointing.
    """
    with ExitStack() as stack:
        recomputing = stack.enter_context(recomputed()) if kernels.recomputes and not checkpointed else None
        stack.enter_context(layout.used_by(base))
        if kernels.compiled is not None:
            stack.enter_context(kernels.compiled.used_by(decoder_layers(base)))
        elif checkpointed:
            stack.enter_context(checkpointed_layers(base))
        yield recomputing


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
        enable({"use_reentrant": False, "context_fn": checkpoint_contexts})
    except ValueError as error:
        raise ConfigError(f"gradient_checkpointing is not supported: {error}; remove it") from None
    base.disable_input_require_grads()
    try:
        yield
    finally:
        disable()
