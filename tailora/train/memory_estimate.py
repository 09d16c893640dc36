"""The memory of a run, estimated from config.json, the settings and the largest forward, without weights.

    fake_model            the model that would be trained, made of tensors without contents
    largest_step          its largest forward and backward, under a MemoryTracker -> StepCost: activations, logits
    estimate_memory       the memory of the whole run, part by part; of the process itself by measured constants
    check_fits            raises an error if such a step needs more than is free, which `train` calls before the first

A process needs most memory either while it reads the weights, in a step, or while it reads back what was saved.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._mode_utils import no_dispatch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from tailora.core.adapter import adapter_dtype
from tailora.core.device import device_name
from tailora.core.layer_types import CONV1D, layer_type_of
from tailora.core.quantization import named_stored_tensors
from tailora.data.dataset import Example
from tailora.data.labels import Labels
from tailora.data.schemas import SEQ2SEQ
from tailora.errors import ConfigError, MemoryLimitError
from tailora.formats.hub import local_folder
from tailora.formats.load import lora_config_of, read_any_format
from tailora.kernels.attention import CPU
from tailora.kernels.compiled_layers import decoder_layers
from tailora.kernels.loss import CHUNKED
from tailora.model import LoRAModel
from tailora.train.classification import label_task
from tailora.train.config import TASK_TYPES, TrainConfig
from tailora.train.defaults import RunConfig
from tailora.train.image_text_to_text import ImageTextToText
from tailora.train.kernel_choice import (
    PLAIN,
    Kernels,
    choose_layout,
    plain_kernels,
    use_kernels,
)
from tailora.train.loss import CAUSAL_LM, SEQ2SEQ_TASK, BatchLayout, Task, make_batch
from tailora.train.memory import (
    MemoryTracker,
    available_bytes,
    fake_tensors,
    format_bytes,
    needs_contents,
    total_bytes,
)
from tailora.train.model_loading import new_model, precision_of
from tailora.train.quantize import (
    METHODS,
    Stored,
    bits_in_files,
    check_full_training,
    check_unquantized,
    format_of,
    stays_quantized,
    stored_quantization,
)
from tailora.train.trainable import FullModel, Trainable, trained_module, trains_on_pixels

# ---- The model without its weights
#
# It is made by the code that makes the real one, on fake tensors, from config.json. What a run decides by comparing
# numbers is predicted from the model's structure, and may turn out otherwise.


@dataclass(frozen=True)
class Weights:
    """Bytes of the base's weights.

    On a CPU, files in the precision asked for are not copied but mapped into memory, and the mapping of a file stays as
    long as one of its tensors.
    """

    stored: int
    while_read: int  # in addition, until all are read
    left_mapped: int  # in addition, afterwards: of a quantized base the files' weights that were quantized
    dense: int  # in addition, while a quantized layer computes: the largest dense weight
    is_quantized: bool
    layers: tuple[int, ...]  # of `stored`, each decoder layer, which FSDP2 shards

    @property
    def sharded(self) -> int:
        return sum(self.layers)

    @property
    def outside(self) -> int:
        """Of `stored`, what FSDP2 leaves whole on every rank: embeddings, head, last norm; scales of quantization."""
        return self.stored - self.sharded

    @property
    def largest_layer(self) -> int:
        return max(self.layers, default=0)

    def on_rank(self, shards: int) -> int:
        """Of `stored`, what one of `shards` ranks keeps."""
        return self.outside + math.ceil(self.sharded / shards)


@dataclass(frozen=True, eq=False)
class FakeModel:
    """What a run would train, without contents."""

    model: Trainable
    task: Task
    layout: BatchLayout
    kernels: Kernels
    weights: Weights
    notes: list[str]  # what was predicted about the run, and may turn out otherwise

    @property
    def base(self) -> PreTrainedModel:
        return cast(PreTrainedModel, self.model.base_model)


@dataclass(frozen=True)
class AbsentDevice:
    """A device that is not here.

    Its tensors are on "meta", since autograd takes none of an absent device. There SDPA keeps all scores, as on MPS. On
    CUDA and XPU a run finds flash attention, which keeps one sum a token and head, as the CPU's operator does.
    """

    type: str  # of the device, in torch
    precision: torch.dtype  # of the base

    @property
    def keeps_scores(self) -> bool:
        return self.type == "mps"


@contextmanager
def fake_model(
    config: TrainConfig, shape: PretrainedConfig, device: torch.device | AbsentDevice, task: Task | None = None
) -> Iterator[FakeModel]:
    """Yields the model that `config` would train, without contents. Raises ConfigError, TargetError, FormatError.

    task: what it learns; by default what the settings say.
    """
    if config.quantize is not None:
        check_unquantized(shape, config.model, config.quantize)
    with fake_tensors():
        model, weights = fake_trainable(config, shape, device)
        base, notes = cast(PreTrainedModel, model.base_model), list[str]()
        without_adapter = model.disable_adapter() if isinstance(model, LoRAModel) else nullcontext()  # changes neither
        with torch.no_grad(), without_adapter:
            task = task or task_of_shape(config, shape)
            layout = choose_layout(config, model, None, notes.append, compare=False, task=task)
        if isinstance(device, AbsentDevice) and not task.is_plain:
            if layout.packed and not device.keeps_scores:
                layout = replace(layout, attention=CPU)
            attention = "SDPA, all scores" if device.keeps_scores else "flash, no scores"
            kernels = Kernels(PLAIN, f"decoder layers: plain; attention: {attention} kept; loss: {layout.loss}")
        else:
            kernels = plain_kernels(config, base, layout)
        yield FakeModel(model, task, layout, kernels, weights, notes)


def task_of_shape(config: TrainConfig, shape: PretrainedConfig) -> Task:
    """Returns the training task; labels come from the model's config."""
    if config.task == SEQ2SEQ:
        return SEQ2SEQ_TASK
    if config.task not in TASK_TYPES:
        return CAUSAL_LM
    names = [shape.id2label[index] for index in range(shape.num_labels)]
    return label_task(Labels.of_config(config.task, names, shape.problem_type))


def fake_trainable(
    config: TrainConfig, shape: PretrainedConfig, device: torch.device | AbsentDevice
) -> tuple[Trainable, Weights]:
    """Returns what is trained, and the bytes of its base. Raises as `fake_model`."""
    if isinstance(device, AbsentDevice):
        place, dtype = torch.device("meta"), cast(torch.dtype | str, device.precision)
    else:
        place, dtype = device, precision_of(config.dtype, device)
    shape = copy.deepcopy(shape)  # new models change it
    stored = getattr(shape, "dtype", None) or torch.float32  # according to config.json
    files: torch.dtype = getattr(torch, stored) if isinstance(stored, str) else stored
    with place, no_init_weights():  # torch draws some weights again until they are in range, which never ends here
        precision = files if dtype == "auto" else dtype
        base = new_model(shape, config.model, config.task, dtype=precision).eval()
        base.tie_weights()  # which no_init_weights leaves out
    form, settings = format_of(shape, config.model), stored_quantization(shape)
    storage = form.stored(settings) if form else METHODS[config.quantize].stored if config.quantize else None
    if storage is None and (config.quantize or stays_quantized(shape, config.model)):
        method = f"--quantize {config.quantize}" if config.quantize else f"this {settings['quant_method']} model"
        raise ConfigError(f"cannot estimate the memory of {method}; choose a different quantization")
    weights = _weights(base, files, storage, settings)
    if config.method == "full":
        check_full_training(shape, config.model)
        return FullModel(base, cast(Any, None), lambda: base).train(), weights
    if config.adapter is None:
        return LoRAModel(base, config.lora(), fresh=False).train(), weights
    with no_dispatch():  # its files have contents
        stored_adapter = read_any_format(local_folder(config.adapter), base)
    return LoRAModel(base, lora_config_of(stored_adapter, base), fresh=False).train(), weights


def _weights(base: PreTrainedModel, files: torch.dtype, stored: Stored | None, settings: dict[str, Any]) -> Weights:
    """Returns the bytes of the weights. Linear layers of a quantized base compute as such from here on.

    files: precision of the files.
    stored: how a quantized base is stored.
    settings: quantization_config of files that are quantized already, else empty.
    """
    quantized: dict[int, int] = {}  # id of the plain weight -> bytes
    codes: dict[int, int] = {}  # the same without the scales
    for layer in list(base.modules()) if stored else []:
        layer_type = layer_type_of(layer)
        if stored and layer_type and layer_type.is_linear and layer is not base.get_output_embeddings():
            weight = cast(Tensor, layer.weight)
            codes[id(weight)] = stored.codes(weight)
            quantized[id(weight)] = codes[id(weight)] + stored.scales(weight)
            layer.__class__ = _quantized_class(type(layer))  # type: ignore[arg-type]
            layer.__dict__["stored"] = stored
    tensors = [tensor for _, tensor, _ in named_stored_tensors(base)]
    total = sum(quantized.get(id(tensor), tensor.nbytes) for tensor in tensors)
    dense = max((tensor.nbytes for tensor in tensors if id(tensor) in quantized), default=0)
    layers = tuple(
        sum(codes.get(id(tensor), tensor.nbytes) for tensor in layer.parameters()) for layer in decoder_layers(base)
    )
    parts: dict[str, Any] = {"is_quantized": bool(quantized), "layers": layers}
    if settings:  # mapped as they are, or dequantized from files that stay mapped
        dims = (3,) if settings["quant_method"] == "mxfp4" else (2, 3)  # only experts, or all matrices
        matrices = (weight for layer in decoder_layers(base) for weight in layer.parameters() if weight.ndim in dims)
        read = 0 if stored else int(sum(weight.numel() for weight in matrices) * bits_in_files(settings) / 8)
        return Weights(total, read, read, dense, **parts)
    if base.dtype != files:  # converted, and the files are closed
        read = sum(parameter.numel() for parameter in base.parameters()) * files.itemsize
        return Weights(total, read, 0, dense, **parts)
    originals = sum(tensor.nbytes for tensor in tensors if id(tensor) in quantized)
    return Weights(total, originals, originals, dense, **parts)


class _QuantizedLinear:
    """A linear layer that makes its dense weight again for every product, as quantized layers do."""

    is_same_as_linear = True  # see `computes_as_its_type`
    stored: Stored

    def forward(self, x: Tensor) -> Tensor:
        layer = cast(Any, self)
        columns = layer_type_of(layer) is CONV1D
        y: Tensor = _DequantizedLinear.apply(x, layer.weight.T if columns else layer.weight, layer.bias, self.stored)  # type: ignore[no-untyped-call]
        return y


class _DequantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stored: Stored) -> Tensor:
        dense = torch.empty_like(weight)
        ctx.save_for_backward(*([dense] if stored.keeps_dense else []))
        ctx.like = weight
        y = F.linear(x, dense, bias)
        del dense
        torch.empty(int(stored.per_output * y.numel()), dtype=torch.uint8, device=y.device)  # freed at once
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dense = ctx.saved_tensors[0] if ctx.saved_tensors else torch.empty_like(ctx.like)
        return gradients[0] @ dense, None, None, None


@cache
def _quantized_class(cls: type[nn.Module]) -> type[nn.Module]:
    return type(f"Quantized{cls.__name__}", (_QuantizedLinear, cls), {"__module__": __name__})


# Of a process on a CPU, on top of what torch allocates; benchmarks/memory/plan.py compares the sums with whole runs:
LIBRARIES = 130 * 10**6  # code that is loaded when it is first called, threads, caches; holes left by loading
LIBRARIES_16_BIT = 40 * 10**6  # code that oneDNN compiles for 16-bit products, at most 64 of them
FRAGMENTATION = 0.1  # share of a step's memory that the allocator keeps in addition; on a device never measured
# The same with sharded layers: buffers come and go between activations that stay, and leave holes of other sizes
FRAGMENTATION_SHARDED = 0.2
WORKSPACE = 32 * 2**20  # of a device, for products: what torch gives cuBLAS on an H100; others take less
LOGITS, ACTIVATIONS, GRADIENTS = "logits", "activations", "gradients"


@dataclass(frozen=True)
class Memory:
    """Bytes at the largest moment of a run."""

    weights: int  # of the base, as stored
    adapters: int  # trained parameters besides the weights; in full fine-tuning of 16 bits the float32 masters
    gradients: int
    optimizer: int  # two moments of AdamW, a copy of before the step, and of the best where evaluations choose
    activations: int  # kept for the backward, and temporaries, at the largest moment
    logits: int  # at that moment
    process: int  # interpreter, libraries, a card's context, and what the allocator keeps beyond what is allocated
    gathered: int = 0  # of sharded weights, what a rank has whole while it computes with them
    growing: int = 0  # of activations and logits, what grows with the tokens of a forward; logits in chunks do not

    @property
    def total(self) -> int:
        return sum(asdict(replace(self, growing=0)).values())

    def with_total(self, total: int) -> "Memory":
        """Returns the same with another total: `process` gets the difference, and below zero the activations."""
        rest = self.process + total - self.total
        less = min(rest, 0)
        activations, growing = self.activations + less, self.growing + less
        return replace(self, process=max(rest, 0), activations=activations, growing=growing)

    def to_dict(self) -> dict[str, int]:
        parts = asdict(self)
        del parts["growing"]
        return {**parts, "total": self.total}


@dataclass(frozen=True)
class StepCost:
    """Bytes of one forward and backward at its largest moment, without what stays through the run."""

    activations: int
    logits: int
    gradients: int  # of 16-bit weights, on their way to the float32 masters
    kept: int  # from the forward for the backward
    malloc_overhead: int = 0  # because its small and its large blocks are not largest at the same moment

    @property
    def bytes(self) -> int:
        return self.activations + self.logits + self.gradients


def simulate_step(fake: FakeModel, examples: Sequence[Example], *, checkpointed: bool) -> StepCost:
    """Runs the forward and backward of these examples in one batch, within `fake_model`'s block."""
    model, base, trained = fake.model, fake.base, trained_module(fake.model)
    vocabulary = base.config.get_text_config().vocab_size
    trained_shapes = {parameter.shape for parameter in base.parameters() if parameter.requires_grad}

    def part_of(tensor: Tensor) -> str:
        if tensor.ndim > 1 and tensor.shape[-1] == vocabulary:
            return LOGITS
        return GRADIENTS if tensor.shape in trained_shapes else ACTIVATIONS

    task = fake.task
    with no_dispatch():  # the processor of images needs their contents
        batch = make_batch(examples, fake.layout, base.device, task)
    for parameter in trained.parameters():  # as in a run, where gradients are views of a flat buffer
        parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in trained.parameters() if parameter.grad is not None]
    weights = [tensor for module in (base, trained) for tensor in (*module.parameters(), *module.buffers())]
    tracker = MemoryTracker([*weights, *gradients], part_of)
    try:
        kernels = use_kernels(base, fake.layout, fake.kernels, checkpointed=checkpointed)
        with kernels, torch.enable_grad(), tracker:
            (batch,) = task.complete_step(model, [batch], fake.layout, lambda sums: sums)
            loss = task.outputs(model, batch, fake.layout).losses.sum()
            kept = tracker.now.total()
            loss.backward()  # type: ignore[no-untyped-call]
    finally:
        trained.zero_grad()
    peak = tracker.peak
    return StepCost(
        activations=peak[ACTIVATIONS],
        logits=peak[LOGITS],
        gradients=peak[GRADIENTS],
        kept=kept,
        malloc_overhead=tracker.sum_of_peaks - peak.total() if base.device.type == "cpu" else 0,
    )


def largest_step(config: TrainConfig, fake: FakeModel, examples: Sequence[Example]) -> StepCost:
    """Returns the cost of a run's largest forward and backward.

    Image towers run only if a part of them is trained, because frozen ones keep nothing for the backward.
    """
    step: StepCost | None = None
    simulate = partial(simulate_step, fake, checkpointed=config.gradient_checkpointing)
    if isinstance(fake.task, ImageTextToText):
        if trains_on_pixels(fake.model):
            try:
                step = simulate(examples)
            except RuntimeError as error:
                if not needs_contents(error):
                    raise
                fake.notes.append(
                    "the activations of the image tower cannot be simulated and are missing; use --measure"
                )
        examples = [fake.task.as_text(example) for example in examples]
    step = step or simulate(examples)
    if config.fast == "compile":
        step = with_compiled_layers(step, fake)
        fake.notes.append("the memory of compiled layers is estimated from one measurement, not simulated")
    return step


def check_fits(
    config: TrainConfig,
    shape: PretrainedConfig,
    task: Task,
    examples: Sequence[Example],
    device: torch.device,
    advice: str,
) -> None:
    """Raises MemoryLimitError if the largest step of a loaded model needs more than is free.

    Some models cannot be simulated. They are not checked.
    """
    try:
        with fake_model(config, shape, device, task) as fake:
            needed = largest_step(config, fake, examples).bytes
    except Exception:  # noqa: BLE001 - the code of a model may fail in any way on tensors without contents
        return
    available = available_bytes(device)
    if needed > available:
        memory = f"{device} ({device_name(device)}, {format_bytes(total_bytes(device))} in total)"
        free = f"{format_bytes(available)} are free{'' if device.type == 'cpu' else f' on {memory}'}"
        cause = f"a step needs about {format_bytes(needed)}, but only {free}"
        raise MemoryLimitError(f"out of memory before the first step: {cause}\n{advice}")


CHECKPOINTING, QUANTIZATION = "--gradient-checkpointing", "--quantize nf4"


def can_checkpoint(config: TrainConfig) -> bool:
    return not (config.gradient_checkpointing or config.fast == "compile")


def can_quantize(config: TrainConfig, shape: PretrainedConfig) -> bool:
    """Returns whether a run with a 4-bit base is an alternative."""
    return not (config.method == "full" or config.quantize or stored_quantization(shape))


def saves_memory(
    config: TrainConfig, shape: PretrainedConfig, device: torch.device | AbsentDevice, **changes: Any
) -> bool:
    """Returns whether the base needs less memory with these changes, while it is read and in a step.

    False where that cannot be estimated. On a CPU, files that are converted or quantized are in memory, too.
    """

    def needed(config: TrainConfig) -> int:
        with fake_tensors():
            _, weights = fake_trainable(config, shape, device)
        read, kept = (weights.while_read, weights.left_mapped) if device.type == "cpu" else (weights.dense, 0)
        return weights.stored + max(read, kept + weights.dense)

    try:
        return needed(config.replaced(**changes)) < needed(config)
    except Exception:  # noqa: BLE001 - the code of a model may fail in any way on tensors without contents
        return False


def remedies(
    config: RunConfig,
    shape: PretrainedConfig,
    batch_size: int,
    device: torch.device | AbsentDevice,
    *,
    can_shard: bool = False,
) -> list[str]:
    """Returns settings that need less memory. batch_size: a smaller one, 0 if there is none."""
    examples = config.per_device_train_batch_size * config.gradient_accumulation_steps
    accumulation = -(-examples // max(batch_size, 1))
    options = [
        (batch_size > 0, f"--per-device-train-batch-size {batch_size} --gradient-accumulation-steps {accumulation}"),
        (can_shard, "--fsdp"),
        (can_checkpoint(config), CHECKPOINTING),
        (can_quantize(config, shape) and saves_memory(config, shape, device, quantize="nf4"), QUANTIZATION),
        (config.method == "full", "--method lora"),
        (config.max_length > 128, f"--max-length {config.max_length // 2}"),
    ]
    return [*(text for helps, text in options if helps), "a smaller --model"]


# Of what plain layers keep for the backward, on SmolLM2's shape in bfloat16: compiled ones keep this share (141 of 182
# MB), and plain ones the other if cheap activations are recomputed (25.4 of 48.2 MB for 4 layers and 512 tokens).
COMPILED_SHARE, RECOMPUTED_SHARE = 0.77, 0.53


def with_compiled_layers(step: StepCost, fake: FakeModel) -> StepCost:
    """Returns about what the step of `fake` would cost with compiled layers, which cannot be simulated."""
    share = COMPILED_SHARE / (RECOMPUTED_SHARE if fake.kernels.recomputes else 1)
    return replace(step, activations=step.activations - int(step.kept * (1 - share)))


def with_less_memory(step: StepCost, fake: FakeModel, tokens: int, *, checkpointed: bool) -> StepCost:
    """Returns about what a plain step of `tokens` tokens costs with checkpointing, or quantized as `fake` is."""
    text, activations = fake.base.config.get_text_config(), step.activations
    if checkpointed:
        layers = text.num_hidden_layers
        activations = activations // layers + layers * text.hidden_size * fake.base.dtype.itemsize * tokens
    return replace(step, activations=activations + fake.weights.dense)


def estimate_memory(config: TrainConfig, fake: FakeModel, step: StepCost, process: int, shards: int = 1) -> Memory:
    """Returns the memory of a run; of one rank, if FSDP2 shards the base over several.

    process: bytes that the process uses of the device before its model is loaded.

    `Memory.process` also gets what libraries use and allocators keep. If loading the weights takes more than a step, or
    on a CPU reading back what was saved, it gets the difference.
    """
    in_step, is_full = memory_of_step(config, fake, step, process, shards), isinstance(fake.model, FullModel)
    largest = max(in_step.total, memory_of_loading(fake, process, shards))
    if fake.base.device.type == "cpu" and is_full:
        largest = max(largest, in_step.total - step.bytes + fake.weights.stored)
    elif fake.base.device.type == "cpu":  # the adapter's file is mapped, while malloc holds what the steps needed
        largest = max(largest, in_step.total + in_step.adapters)
    return in_step.with_total(largest)


def memory_of_step(config: TrainConfig, fake: FakeModel, step: StepCost, process: int, shards: int = 1) -> Memory:
    """Returns the memory of a run in its largest step; arguments as of `estimate_memory`.

    FSDP2 shards the decoder layers alone. While one computes, its rows arrive in a buffer (on a CPU in one of gloo,
    too), and the whole weights are copied from there; in a backward the next layer's rows arrive meanwhile. In full
    fine-tuning, a layer's full gradient exists twice, once in float32, until its shards are summed.
    """
    weights, is_on_cpu = fake.weights, fake.base.device.type == "cpu"
    parameters = list(trained_module(fake.model).parameters())
    of_base = {id(parameter) for parameter in fake.base.parameters()}  # a float32 model is its own master
    trained = sum(parameter.nbytes for parameter in parameters)
    adapters = sum(parameter.nbytes for parameter in parameters if id(parameter) not in of_base)
    gradients, stored, gathered, fragmentation = step.gradients, weights.stored, 0, FRAGMENTATION
    if shards > 1:
        stored = weights.on_rank(shards)
        gathered = (3 if is_on_cpu else 2) * weights.largest_layer
        fragmentation = FRAGMENTATION_SHARDED if is_on_cpu else FRAGMENTATION
        if isinstance(fake.model, FullModel):
            growth = adapter_dtype(fake.base.dtype).itemsize // fake.base.dtype.itemsize
            outside, on_rank = trained - growth * weights.sharded, math.ceil(growth * weights.sharded / shards)
            adapters = on_rank + (outside if adapters else 0)
            trained, gradients = outside + on_rank, (1 + growth) * weights.largest_layer
    process += step.malloc_overhead + int(fragmentation * (step.bytes + gathered))
    if is_on_cpu:
        process += weights.left_mapped + LIBRARIES + (LIBRARIES_16_BIT if fake.base.dtype == torch.bfloat16 else 0)
    else:
        process += WORKSPACE
    return Memory(
        weights=stored,
        adapters=adapters,
        gradients=trained + gradients,
        optimizer=trained * (4 if config.eval_steps else 3),
        activations=step.activations,
        logits=step.logits,
        process=process,
        gathered=gathered,
        growing=step.activations + (0 if fake.layout.loss in CHUNKED else step.logits),
    )


def memory_of_loading(fake: FakeModel, process: int, shards: int = 1) -> int:
    """Returns the bytes of a process while it loads the base; of one rank, if FSDP2 shards the base over several.

    A rank reads its rows of every weight. It quantizes full weights, so a quantized model is complete before it is
    sharded. On a CPU, the files stay mapped until everything is read; a device gets one weight after the other.
    """
    weights = fake.weights
    stored, while_read = weights.stored, weights.while_read
    if shards > 1 and not weights.is_quantized:
        stored = weights.on_rank(shards)
        while_read = while_read * stored // weights.stored
    return process + stored + (while_read if fake.base.device.type == "cpu" else weights.dense)
