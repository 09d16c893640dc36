"""Which kernels a run computes with: those that apply are tried on the user's model against transformers' own layers.

choose_kernels    what applies -> tried, compared -> `Kernels`, with a description for the run's header: compiled
                  layers if the rest of the run pays for compiling and they are faster here, else the Llama kernels,
                  else the layers of transformers. All processes of a run choose the same.
use_kernels       within the block the model computes with them
share_kept        how much compiled layers keep for the backward, of what others keep
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tailora.core.attach import Adapted, evaluating
from tailora.core.device import synchronize
from tailora.core.layer import LoRALayer
from tailora.data.dataset import Example
from tailora.errors import ConfigError
from tailora.kernels.compiled_layers import (
    COMPILER_ERRORS,
    CompiledLayers,
    compiled_gain,
    decoder_layers,
    expected_seconds,
    note_compiled,
    obstacle_to_compiling,
)
from tailora.kernels.cpu_attention import BLOCK, BLOCKS_ONLY, FLASH_ONLY, flash_thresholds
from tailora.kernels.device_attention import PROVIDERS
from tailora.kernels.llama import eligible, fast_layers, obstacle_to_layers
from tailora.kernels.loss import choose_form, own_form
from tailora.train.config import TrainConfig
from tailora.train.loss import CAUSAL_LM, HEAD, BatchLayout, Task, make_batch, token_losses
from tailora.train.memory import ACTIVATION_MEMORY
from tailora.train.model_loading import pad_id
from tailora.train.packing import choose_packing, random_documents
from tailora.train.parallel import first_of_ranks
from tailora.train.trainable import Trainable, trained_module

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-5}  # float64: transformers computes norms in float32
HALF_TOLERANCE = 0.1  # bfloat16, float16
TIMED_TOKENS = 256  # of a layer whose time is measured, in two documents like those that are compared
TIMES = 3  # that it is measured, of which the shortest counts
LLAMA_GAIN = 0.17  # share of the time of transformers' layers that the Llama kernels save, in bfloat16 with AMX
SPREAD = 0.02  # standard deviation of factors that start at zero, while gradients are compared

PLAIN, LLAMA, COMPILED = "plain", "llama", "compiled"
T = TypeVar("T")


@dataclass(frozen=True)
class Kernels:
    layers: str  # PLAIN: those of transformers; LLAMA: one autograd Function each; COMPILED: by torch.compile
    description: str  # for the run's header: decoder layers; attention; loss
    compiled: CompiledLayers | None = None

    @property
    def record(self) -> bool | str:
        """What a checkpoint remembers; the booleans are from before layers were compiled."""
        if self.compiled is None:
            return self.layers == LLAMA
        return f"{COMPILED}, activation_memory {self.compiled.activation_memory:g}"


@dataclass(frozen=True)
class Work:
    """What is left of a run."""

    tokens: float  # of this rank
    sample: Example  # of the run's data, because half precision computes random tokens with large errors in any order


def choose_layout(
    config: TrainConfig,
    model: Trainable,
    tokenizer: PreTrainedTokenizerBase | None,
    note: Callable[[str], None],
    *,
    compare: bool = True,
    task: Task = CAUSAL_LM,
) -> BatchLayout:
    """Returns packed or padded batches, and how the loss is computed; both are tried on the model itself.

    All ranks of a run choose the same.
    note: called with the reason if the model cannot do what is fastest.
    compare: False for a model without contents, whose structure alone decides.
    task: for one that `is_plain` nothing is tried.
    Raises ConfigError for packing = 'on' if it would change results.
    """
    base = cast(PreTrainedModel, model.base_model)
    if task.is_plain:
        if config.packing == "on":
            raise ConfigError(f"--packing on: rows are padded, each for itself, for {task.description}; leave it out")
        return BatchLayout(packed=False, loss=HEAD, pad_id=pad_id(tokenizer))
    with evaluating(model):
        attention, packing_note = choose_packing(base, config.packing, compare=compare)
        packed, own = attention is not None, own_form(base)
        layout = BatchLayout(packed, own, pad_id(tokenizer), attention)
        with layout.used_by(base):
            batch = make_batch(short_examples(base), layout, base.device)
            loss, obstacle = own, None
            if config.fast != "off":
                agree = {"agree": first_of_ranks} if compare else {}  # the structure is the same on every rank
                loss, obstacle = choose_form(base, batch, compare, **agree)
    if packing_note:
        note(packing_note)
    if obstacle:
        note(f"the loss is computed {loss}, which takes more memory: {obstacle}")
    return replace(layout, loss=loss)


def short_examples(base: PreTrainedModel) -> list[Example]:
    """Returns two short examples of random tokens, of different lengths, partly supervised."""
    ids = np.random.default_rng(0).integers(base.config.get_text_config().vocab_size, size=24).astype(np.int32)
    return [Example.of_text(part, np.arange(len(part)) % 3 > 0) for part in (ids[:10], ids[10:])]


def choose_kernels(
    config: TrainConfig, model: Trainable, layout: BatchLayout, work: Work, recorded: bool | str | None = None
) -> Kernels:
    """Returns the kernels of a run, whose description says why others are not used.

    recorded: the choice of the run that is resumed. It is used again, because the adapter's tensors are not restored
        yet and nothing could be compared.
    Raises ConfigError if compiled layers are asked for and there is an obstacle.
    """
    base, reasons = cast(PreTrainedModel, model.base_model), []
    if layout.loss == HEAD:
        if asks_for_compiled_layers(config):
            raise ConfigError("--fast compile and --activation-memory are for language models: leave them out")
        return Kernels(PLAIN, f"layers: plain; attention: {base.config._attn_implementation}; loss: {layout.loss}")
    if config.fast != "off":
        kernels, obstacle = _try_compiled(config, model, layout, work, recorded)
        if kernels is not None:
            return kernels
        if asks_for_compiled_layers(config):
            name = "--fast compile" if config.fast == "compile" else "--activation-memory"
            raise ConfigError(f"{name} needs compiled layers, which this run cannot have: {obstacle}; leave it out")
        if isinstance(recorded, str):
            raise ConfigError(
                f"the run was started with layers that are {recorded}, which it cannot have now: {obstacle}; resume it "
                "where and as it was started, or start again in another --output-dir"
            )
        reasons.append(f"compiled layers: {obstacle}")
    obstacle = first_of_ranks(obstacle_to_llama_kernels(config.fast, base, layout))
    check = "as when the run was started"
    if obstacle is None and recorded is None:
        obstacle, check = _compared(model, _parts(work.sample, base), layout, None)
        obstacle = first_of_ranks(obstacle)
    elif obstacle is None and recorded is not True:
        obstacle = "the run was started without"
    return llama_or_plain_kernels(base, layout, obstacle, check, reasons)


def asks_for_compiled_layers(config: TrainConfig) -> bool:
    return config.fast == "compile" or config.activation_memory < 1


def _try_compiled(
    config: TrainConfig, model: Trainable, layout: BatchLayout, work: Work, recorded: bool | str | None
) -> tuple[Kernels | None, str | None]:
    """Returns kernels with compiled layers, or why there are none."""
    base, budget = cast(PreTrainedModel, model.base_model), config.activation_memory
    asked = asks_for_compiled_layers(config)
    if config.gradient_checkpointing:
        return None, "--gradient-checkpointing computes each layer again"
    if obstacle := first_of_ranks(obstacle_to_compiling(base, base.device)):
        return None, obstacle
    compiled = CompiledLayers(budget)
    kernels = Kernels(COMPILED, "", compiled)
    if recorded is not None and recorded != kernels.record:
        return None, "the run was started without them, or with another --activation-memory"
    if recorded is None and not asked and (obstacle := _costs_more_than_it_saves(model, work, layout)):
        return None, obstacle
    obstacle, check, time_share = _compile(model, work, layout, compiled, resumed=recorded is not None)
    if obstacle is not None:
        return None, obstacle
    if recorded is None:
        share, others = broadcast_object_list([time_share])[0]
        speed = f"a layer takes {share:.2f} of the time of {others}"
        if share >= 1 and not asked:
            return None, f"they were compiled, but {speed}"
        check = f"{speed}, {check}"
    kept = "" if budget == 1 else f", keeping {budget:.0%} of the activations"
    text = f"decoder layers: compiled{kept}, {check}; attention: {_attention(base, layout)}; loss: {layout.loss}"
    return replace(kernels, description=text), None


def _costs_more_than_it_saves(model: Trainable, work: Work, layout: BatchLayout) -> str | None:
    """Returns why the rest of the run does not pay for compiling. Times are those of the first process.

    What compiling saves is a known share of the time of the layers as they are, which is measured on this model.
    """
    base = cast(PreTrainedModel, model.base_model)
    layers, share, obstacle = decoder_layers(base), compiled_gain(base.device, base.dtype), None
    if obstacle_to_llama_kernels("auto", base, layout) is None:
        share -= LLAMA_GAIN
    if share <= 0:
        place = "this CPU" if base.device.type == "cpu" else base.device.type
        dtype = str(base.dtype).removeprefix("torch.")
        obstacle = f"no gain is known on {place} in {dtype}; --fast compile tries them"
    if (obstacle := first_of_ranks(obstacle)) is not None:
        return obstacle
    with layout.used_by(base):
        calls = _layer_calls(model, layers, _timed_examples(work), layout)
        seconds = min(_seconds(*calls[-1]) for _ in range(TIMES)) if calls else 0.0
    saved = share * seconds * len(calls) * work.tokens / TIMED_TOKENS
    compiling = expected_seconds(layers, 1.0, has_dropout(base))
    if saved < compiling:
        obstacle = f"they would save about {saved:.0f} s of this run, and compiling takes about {compiling:.0f} s"
    return cast("str | None", broadcast_object_list([obstacle])[0])


def _timed_examples(work: Work) -> list[Example]:
    ids = np.resize(work.sample.input_ids, TIMED_TOKENS)
    return [Example.of_text(part) for part in np.split(ids, [TIMED_TOKENS // 2 - 8])]  # of different lengths


def _seconds(layer: nn.Module, inputs: tuple[Any, ...], arguments: dict[str, Any]) -> float:
    """Returns the time of the layer's forward and backward."""
    device = inputs[0].device
    synchronize(device)
    started = time.perf_counter()
    _outputs_and_gradients(layer, inputs, arguments)
    synchronize(device)
    return time.perf_counter() - started


def _compile(
    model: Trainable, work: Work, layout: BatchLayout, compiled: CompiledLayers, *, resumed: bool
) -> tuple[str | None, str, tuple[float, str]]:
    """Compiles the layers. Returns why they are not right on some rank, how it is known that they are, and their time.

    The time is a share of that of others, and their name. A resumed run is only called: see `choose_kernels`.
    """
    base, no_time = cast(PreTrainedModel, model.base_model), (0.0, "")
    parts = _parts(work.sample, base)

    def compile_for_training() -> tuple[None, None]:
        _compile_for_training(model, parts, layout, compiled)
        return None, None

    def measure() -> tuple[str | None, tuple[float, str]]:
        if has_dropout(base):
            compile_for_training()
        time_share = _time_share(model, work, layout, compiled)
        return ("text does not reach them", no_time) if time_share is None else (None, time_share)

    if resumed:
        obstacle, _ = _on_all_ranks(compile_for_training)
        return obstacle, "as when the run was started", no_time
    obstacle, check = _on_all_ranks(lambda: _compared(model, parts, layout, compiled))
    if obstacle is not None:
        return obstacle, "", no_time
    obstacle, time_share = _on_all_ranks(measure)
    if obstacle is None:
        note_compiled(decoder_layers(base), compiled.activation_memory)
    return obstacle, check or "", time_share or no_time


def _on_all_ranks(trial: Callable[[], tuple[str | None, T]]) -> tuple[str | None, T | None]:
    """Returns the obstacle that the trial of a rank finds, and the result of this rank's; None if there is none.

    That torch.compile refuses the layers is an obstacle, too.
    """
    try:
        obstacle, result = trial()
    except COMPILER_ERRORS as error:
        cause = " ".join(str(error).split("\n\n")[0].split())  # what follows are hints for torch's developers
        return first_of_ranks(f"torch.compile refuses them ({cause})"), None
    return first_of_ranks(obstacle), result


def _time_share(
    model: Trainable, work: Work, layout: BatchLayout, compiled: CompiledLayers
) -> tuple[float, str] | None:
    """Returns the time of a compiled layer as a share of that of what is used otherwise, and what that is.

    None if no layer is called. The layer is as the run calls it, with its dropout.
    """
    base = cast(PreTrainedModel, model.base_model)
    with layout.used_by(base):
        calls = _layer_calls(model, decoder_layers(base), _timed_examples(work), layout)
        if not calls:
            return None
        layer = calls[-1][0]
        is_llama = obstacle_to_llama_kernels("auto", base, layout) is None and bool(eligible(layer))
        ours, theirs = [], []
        for _ in range(1 + TIMES):  # in turns; the first of each is not counted
            with compiled.used_by([layer]):
                ours.append(_seconds(*calls[-1]))
            with fast_layers(layer) if is_llama else nullcontext():
                theirs.append(_seconds(*calls[-1]))
    return min(ours[1:]) / min(theirs[1:]), "the Llama kernels" if is_llama else "those of transformers"


def _compared(
    model: Trainable, parts: Sequence[Example], layout: BatchLayout, compiled: CompiledLayers | None
) -> tuple[str | None, str]:
    """Returns why the layers are not right on this model, and how it is known that they are."""
    base = cast(PreTrainedModel, model.base_model)
    difference = largest_difference(model, parts, layout, compiled)
    allowed = TOLERANCE.get(base.dtype, HALF_TOLERANCE)
    if difference is None:
        return "those of transformers do not call every adapted layer, and these would", ""
    if not difference <= allowed:
        return f"they differ from those of transformers by {difference:.0e} (allowed: {allowed:.0e})", ""
    return None, (
        "checked against the layers of transformers: outputs and gradients differ by at most "
        f"{difference:.0e} (relative, allowed: {allowed:.0e})"
    )


def _compile_for_training(
    model: Trainable, parts: Sequence[Example], layout: BatchLayout, compiled: CompiledLayers
) -> None:
    """Compiles the layers as a run with dropout calls them, so that an error shows before the run starts."""
    base = cast(PreTrainedModel, model.base_model)
    layers = decoder_layers(base)
    with layout.used_by(base):
        for layer, inputs, arguments in _layer_calls(model, layers, parts, layout):
            with compiled.used_by([layer]):
                _outputs_and_gradients(layer, inputs, arguments)


def _parts(sample: Example, base: PreTrainedModel) -> list[Example]:
    """Returns two documents from the start of the sample, longer than a sliding window unless that is long."""
    lengths = [len(document.input_ids) for document in random_documents(base.config)]
    parts = np.split(sample.input_ids[: sum(lengths)], [min(lengths[0], len(sample.input_ids) // 2)])
    return [Example.of_text(ids) for ids in parts]


def obstacle_to_llama_kernels(fast: str, base: PreTrainedModel, layout: BatchLayout) -> str | None:
    """Returns why the Llama kernels are not even tried; None if they can be."""
    if fast == "off":
        return "--fast off asks for them"
    if not layout.packed:
        return "fused ones need packed batches, and these are padded"
    if base.device.type != "cpu":
        return f"fused ones were not measured on {base.device.type}"
    return obstacle_to_layers(base)


def llama_or_plain_kernels(
    base: PreTrainedModel, layout: BatchLayout, obstacle: str | None, check: str, reasons: Sequence[str] = ()
) -> Kernels:
    """Returns the Llama kernels if nothing prevents them, else the layers of transformers.

    check: how it is known that the Llama kernels give the same results.    reasons: why others are not used.
    """
    fused = obstacle is None
    layers = f"fused for speed, {check}" if fused else f"those of transformers, because {obstacle}"
    others = "".join(f" ({reason})" for reason in reasons)
    text = f"decoder layers: {layers}{others}; attention: {_attention(base, layout)}; loss: {layout.loss}"
    return Kernels(LLAMA if fused else PLAIN, text)


# Of what plain layers keep for the backward, compiled ones keep this share, times --activation-memory: 141 of 182 MB,
# measured on SmolLM2's shape in bfloat16. Down to .4 the bytes were about proportional. The Llama kernels keep half.
COMPILED_SHARE, LLAMA_SHARE = 0.77, 0.5


def share_kept(kernels: Kernels, activation_memory: float) -> float:
    """Returns what compiled layers keep for the backward, as a share of what the layers of these kernels keep."""
    kept = {PLAIN: 1.0, LLAMA: LLAMA_SHARE, COMPILED: COMPILED_SHARE}[kernels.layers]
    if kernels.compiled is not None:
        kept *= kernels.compiled.activation_memory
    return min(COMPILED_SHARE * activation_memory / kept, 1.0)


def share_kept_instead(config: TrainConfig, base: PreTrainedModel, kernels: Kernels) -> float | None:
    """Returns what ACTIVATION_MEMORY would leave of what these layers keep; None if it is no choice for this run."""
    excluded = config.fast == "off" or config.gradient_checkpointing or config.activation_memory <= ACTIVATION_MEMORY
    return None if excluded or obstacle_to_compiling(base, base.device) else share_kept(kernels, ACTIVATION_MEMORY)


def _attention(base: PreTrainedModel, layout: BatchLayout) -> str:
    """Returns how attention is computed, for the run's header."""
    if not layout.packed:
        return f"{base.config._attn_implementation} with a padding mask"
    if layout.attention in PROVIDERS:
        return PROVIDERS[layout.attention].description
    thresholds = flash_thresholds(base.dtype)
    if thresholds == BLOCKS_ONLY:
        return f"batched products over blocks of {BLOCK} queries, documents of similar length together"
    if thresholds == FLASH_ONLY:
        return "torch's flash attention for CPUs"
    length = f"{thresholds.forward:,} tokens and more"
    return f"torch's flash attention for documents of {length}, blocks of {BLOCK} queries for shorter ones"


def largest_difference(
    model: Trainable, examples: Sequence[Example], layout: BatchLayout, compiled: CompiledLayers | None = None
) -> float | None:
    """Returns the largest relative difference of a layer from its own forward on the same input.

    compiled: code of the layers; None compares the Llama kernels.
    Compared are what the layer adds to its input, and the gradients of the input and of the factors. None if the own
    forward of a layer does not use all the factors that the other uses.
    """
    base = cast(PreTrainedModel, model.base_model)
    layers = eligible(base) if compiled is None else decoder_layers(base)
    largest = 0.0
    with _gradients_computed(model, layout):
        for layer, inputs, arguments in _layer_calls(model, layers, examples, layout):
            plain = _outputs_and_gradients(layer, inputs, arguments)
            with fast_layers(layer) if compiled is None else compiled.used_by([layer]):
                other = _outputs_and_gradients(layer, inputs, arguments)
            if any((a is None) != (b is None) for a, b in zip(plain, other, strict=True)):
                return None
            pairs = [(a, b) for a, b in zip(plain, other, strict=True) if a is not None and b is not None and a.any()]
            largest = max(largest, *(float((a - b).norm() / a.norm()) for a, b in pairs), 0.0)
    return largest


@contextmanager
def _gradients_computed(model: Trainable, layout: BatchLayout) -> Iterator[None]:
    """Within the block layers can be compared: nothing is drawn at random, and no gradient is zero.

    A model without dropout stays in training mode, for which compiled code is made.
    """
    base = cast(PreTrainedModel, model.base_model)
    with ExitStack() as stack:
        if has_dropout(base):
            stack.enter_context(evaluating(model))
        stack.enter_context(zeros_randomized(model))
        stack.enter_context(layout.used_by(base))
        yield


def has_dropout(base: nn.Module) -> bool:
    adapters = (part for module in base.modules() if isinstance(module, Adapted) for part in module.active_adapters)
    return (
        any(isinstance(adapter, LoRALayer) and adapter.lora_dropout > 0 for adapter in adapters)
        or any(isinstance(module, nn.Dropout) and module.p > 0 for module in base.modules())
        or any(getattr(module, "attention_dropout", 0) for module in base.modules())
    )


LayerCall = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]  # its inputs: x (batch, tokens, hidden), others


def _layer_calls(
    model: Trainable, layers: Sequence[nn.Module], examples: Sequence[Example], layout: BatchLayout
) -> list[LayerCall]:
    """Returns the calls of these layers in a forward of the examples."""
    calls: list[LayerCall] = []

    def note(layer: nn.Module, inputs: tuple[Any, ...], arguments: dict[str, Any]) -> None:
        calls.append((layer, inputs, arguments))

    with ExitStack() as hooks, torch.no_grad():
        for layer in layers:
            hooks.enter_context(layer.register_forward_pre_hook(note, with_kwargs=True))
        token_losses(model, examples, layout)
    return calls


def _outputs_and_gradients(layer: nn.Module, inputs: tuple[Any, ...], arguments: dict[str, Any]) -> list[Tensor | None]:
    """Returns what the layer adds to its input, what it adds to the input's gradient, and the gradients of its factors.

    A gradient is None if the layer does not use the factor.
    """
    adapted = [module for module in layer.modules() if isinstance(module, Adapted)]
    factors = [parameter for module in adapted for part in module.active_adapters for parameter in part.parameters()]
    x, others = inputs[0].detach(), inputs[1:]
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(x)
    with torch.enable_grad():
        x = x.requires_grad_()
        y = layer(x, *others, **arguments)
        y = y[0] if isinstance(y, tuple) else y
        dx, *gradients = torch.autograd.grad(y, [x, *factors], weights, allow_unused=True)
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
        stack.enter_context(layout.used_by(base))
        if kernels.compiled is not None:
            stack.enter_context(kernels.compiled.used_by(decoder_layers(base)))
        elif kernels.layers == LLAMA:
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
