"""What a run will take of memory and work: pure functions of the model's shape, the settings and the largest forward.

    parts that stand through the run    weights, adapters, gradients, optimiser: counted
    the largest moment of a step        activations, logits: the run's own code on tensors without contents
    the process                         interpreter, libraries, what an allocator keeps: measured constants

The largest moment of the process is one of three: reading the weights, a step, or reading back what was saved.
"""

import time
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from tailora.core.attach import evaluating
from tailora.core.layer_types import CONV1D, layer_type_of
from tailora.core.quantization import held_parts
from tailora.data.dataset import Example
from tailora.errors import ConfigError
from tailora.formats.load import lora_config_of, read_any_format
from tailora.kernels import attention
from tailora.kernels.attention import packed_rows
from tailora.kernels.loss import FORMS, foreseen_form, own_form
from tailora.model import LoRAModel
from tailora.train.config import TrainConfig
from tailora.train.kernel_choice import Kernels, described, obstacle_to_kernels, running
from tailora.train.loss import BatchLayout, as_batch
from tailora.train.model_loading import STORED, Stored, check_unquantized, precision_of
from tailora.train.packing import choose, packed_logits, probes
from tailora.train.setup import some_examples
from tailora.train.trainable import FullModel, Trainable, trained

# ---- What a piece of code would hold in memory and compute, found by running it on tensors without contents.
#
# torch's fake tensors have shape, type and device but no memory; every operator of the code runs on them as it is,
# forward and backward. The ledger enters what an operator makes and strikes it out when it is freed. So it knows the
# largest moment, temporaries included, of whatever code it is shown: no second description of it could be wrong.
#
# What an operator holds within itself, and how an allocator rounds and keeps blocks, it does not see.


NameOf = Callable[[Tensor], str]  # the part that a new tensor is counted under

EQUAL, ITEM = torch.ops.aten.equal.default, torch.ops.aten._local_scalar_dense.default


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it, storages that operators make are counted, by the part that `name_of` puts them under.

    known: tensors whose storages are counted elsewhere.
    now, peak: bytes of each part, at present and at the moment of the largest sum.    flops: of all products.
    """

    def __init__(self, known: Iterable[Tensor], name_of: NameOf) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.flops = 0.0
        self._name_of = name_of
        self._held = {id(tensor.untyped_storage()): ("", 0) for tensor in known}
        self._most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.flops += work(func, args, kwargs, out)
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for leaf in made:
            self._enter(leaf)
        if torch.Tag.pointwise in func.tags:
            self._widened([leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)], made)
        return out

    def _widened(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """On a CPU an operator on several dtypes copies all to the widest, for as long as it runs."""
        several = [tensor for tensor in (*inputs, *outputs) if tensor.ndim and tensor.is_floating_point()]
        if len({tensor.dtype for tensor in several}) < 2 or several[0].device.type != "cpu":
            return
        widest = max((tensor.dtype for tensor in several), key=lambda dtype: dtype.itemsize)
        size = sum(tensor.numel() * widest.itemsize for tensor in several if tensor.dtype != widest)
        if self.now.total() + size > self._most:
            name = self._name_of(several[0])
            self._most, self.peak = self.now.total() + size, self.now + Counter({name: size})

    def _enter(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in self._held:
            return
        name, size = self._name_of(tensor), storage.nbytes()
        self._held[id(storage)] = name, size
        weakref.finalize(storage, self._strike, id(storage))
        self.now[name] += size
        if self.now.total() > self._most:
            self._most, self.peak = self.now.total(), self.now.copy()

    def _strike(self, key: int) -> None:
        name, size = self._held.pop(key)
        self.now[name] -= size


class _Contents(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Real tensors stay real: lengths, masks and indices decide what is computed. Of others one hopes for the best."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if inputs and not any(isinstance(each, FakeTensor) for each in inputs):
            with no_dispatch():
                return func(*args, **kwargs)
        if func is EQUAL or (func is ITEM and inputs[0].dtype == torch.bool):
            return True  # the same, finite
        return func(*args, **kwargs)


@contextmanager
def without_contents() -> Iterator[None]:
    """Within the block, tensors that are made have no contents."""
    attention.arranged.cache_clear()  # what is remembered of real rows would be mixed with these, and the reverse
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _Contents(), warnings.catch_warnings():  # type: ignore[no-untyped-call]
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")  # in deepcopy
            yield
    finally:
        attention.arranged.cache_clear()


def tensors_of(*modules: nn.Module) -> Iterator[Tensor]:
    """Parameters, their gradients, and buffers."""
    for module in modules:
        for parameter in module.parameters():
            yield parameter
            if parameter.grad is not None:
                yield parameter.grad
        yield from module.buffers()


# ---- work


def work(func: Any, args: Any, kwargs: Any, out: Any) -> float:
    """Multiplications and additions of one operator, products and attention alone."""
    if func in OWN:
        return OWN[func](*args, **kwargs)
    packet = getattr(func, "_overloadpacket", None)
    return float(flop_registry[packet](*args, **kwargs, out_val=out)) if packet in flop_registry else 0.0


def _causal(q: Tensor, k: Tensor, *_: Any, **__: Any) -> float:
    """Scores and their product with the values, of half of the pairs."""
    return 2.0 * q.numel() * k.shape[-2]


def _product(_: Tensor, a: Tensor, b: Tensor, **__: Any) -> float:
    """Of matrices, or of as many pairs of them."""
    return 2.0 * a.numel() * b.shape[-1]


OWN: dict[Any, Callable[..., float]] = {  # what torch's own table lacks
    torch.ops.aten.addmm_.default: _product,
    torch.ops.aten.baddbmm_.default: _product,
    attention.attention.default: _causal,
    attention.attention_backward.default: lambda _gradient, q, k, *_, **__: 2.5 * _causal(q, k),
}


# ---- The run's model without its weights: what would be trained, how it would be computed, what its weights would
# take.
#
# Everything is made by the code that makes the real one, on tensors without contents (`train.ledger`), from config.json
# alone. What a run decides by comparing numbers is foreseen from the model's structure, and may turn out otherwise.


@dataclass(frozen=True)
class Weights:
    """Bytes of the base. On a CPU, what the files hold in the precision asked for is not copied but mapped, page by
    page, and a mapping stays as long as one tensor of it does.
    """

    held: int  # as stored
    while_read: int  # on top, until all is there
    left_mapped: int  # on top, afterwards: of a quantised base what was quantised


@dataclass(frozen=True, eq=False)
class Skeleton:
    """model: what trains.    notes: what was foreseen about how."""

    model: Trainable
    rows: BatchLayout
    kernels: Kernels
    weights: Weights
    notes: list[str]

    @property
    def base(self) -> PreTrainedModel:
        return cast(PreTrainedModel, self.model.base_model)


@contextmanager
def skeleton(config: TrainConfig, shape: PretrainedConfig, device: torch.device) -> Iterator[Skeleton]:
    """The model of this shape that `config` would train on `device`; nothing has contents within the block.

    Raises ConfigError, TargetError, FormatError.
    """
    if config.quantize is not None:
        check_unquantized(shape, config.model, config.quantize)
    with without_contents():
        model, weights = subject(config, shape, device)
        base = cast(PreTrainedModel, model.base_model)
        rows, notes = _rows(config, model)
        reason = obstacle_to_kernels(config.fast, base, rows, device)
        kernels = described(base, rows, device, reason, "to be verified")
        yield Skeleton(model, rows, kernels, weights, notes)


def subject(config: TrainConfig, shape: PretrainedConfig, device: torch.device) -> tuple[Trainable, Weights]:
    """What trains, and what its base takes. Raises as `skeleton`."""
    base = _base(config, shape, device)
    weights = _weights(base, _stored_in(shape), None if config.quantize is None else STORED[config.quantize])
    return _subject(config, base), weights


def _base(config: TrainConfig, shape: PretrainedConfig, device: torch.device) -> PreTrainedModel:
    precision = precision_of(config.dtype, device.type)
    try:
        with device:
            base: PreTrainedModel = AutoModelForCausalLM.from_config(shape, dtype=precision)
    except ValueError as error:
        raise ConfigError(f"model {config.model!r} is no causal language model: {error}") from error
    return base.eval()


def _subject(config: TrainConfig, base: PreTrainedModel) -> Trainable:
    if config.method == "full":
        return FullModel(base, cast(Any, None), lambda: base).train()
    own = lora_config_of(read_any_format(Path(config.adapter), base), base) if config.adapter else config.lora()
    return LoRAModel(base, own, fresh=False).train()


def _rows(config: TrainConfig, model: Trainable) -> tuple[BatchLayout, list[str]]:
    """How examples will be read and losses computed, as far as the model's structure tells."""
    base = cast(PreTrainedModel, model.base_model)
    plain = model.disable_adapter() if isinstance(model, LoRAModel) else nullcontext()  # they change neither
    with evaluating(model), torch.no_grad(), plain:
        packing = choose(base, config.packing, _refusal)
        batch, _ = as_batch(some_examples(base), packing.on, 0, base.device)
        with packed_rows(base) if packing.on else nullcontext():
            loss, obstacle = foreseen_form(base, batch) if config.fast == "auto" else (own_form(base), None)
    told = [packing.note, obstacle and f"the loss is computed {loss}, which takes more memory: {obstacle}"]
    return BatchLayout(packing.on, loss, 0), [note for note in told if note]


def _refusal(base: PreTrainedModel) -> str | None:
    found = packed_logits(base, probes(base.config))
    return found if isinstance(found, str) else None


# ---- weights, and quantised layers by what they take


def _stored_in(shape: PretrainedConfig) -> torch.dtype:
    """The precision of the files, as config.json tells it."""
    told = getattr(shape, "dtype", None) or torch.float32
    dtype: torch.dtype = getattr(torch, told) if isinstance(told, str) else told
    return dtype


def _weights(base: PreTrainedModel, stored_in: torch.dtype, stored: Stored | None) -> Weights:
    """With `stored`, lets the linear layers compute as quantised ones do."""
    head = base.get_output_embeddings()
    layers = [module for module in base.modules() if stored and module is not head and _linear(module)]
    packed = {id(layer.weight): stored.bytes(cast(Tensor, layer.weight)) for layer in layers if stored}
    for layer in layers:
        layer.__class__ = _thawing(type(layer))
        layer.__dict__["stored"] = stored
    tensors = [tensor for _, tensor, _ in held_parts(base)]
    held = sum(packed.get(id(tensor), tensor.nbytes) for tensor in tensors)
    if base.dtype != stored_in:  # converted, and the files let go
        return Weights(held, sum(parameter.numel() for parameter in base.parameters()) * stored_in.itemsize, 0)
    apart = sum(tensor.nbytes for tensor in tensors if id(tensor) in packed)
    return Weights(held, apart, apart)


def _linear(module: nn.Module) -> bool:
    layer_type = layer_type_of(module)
    return layer_type is not None and layer_type.is_linear


class _Thawing:
    """A linear layer that makes its dense weight anew for every product."""

    stored: Stored

    def forward(self, x: Tensor) -> Tensor:
        layer = cast(Any, self)
        columns = layer_type_of(layer) is CONV1D
        y: Tensor = _Thawed.apply(x, layer.weight.T if columns else layer.weight, layer.bias, self.stored)  # type: ignore[no-untyped-call]
        return y


class _Thawed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stored: Stored) -> Tensor:
        dense = torch.empty_like(weight)
        ctx.save_for_backward(*([dense] if stored.keeps_dense else []))
        ctx.like = weight
        y = F.linear(x, dense, bias)
        del dense
        torch.empty(int(stored.per_output * y.numel()), dtype=torch.uint8, device=y.device)  # gone at once
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dense = ctx.saved_tensors[0] if ctx.saved_tensors else torch.empty_like(ctx.like)
        return gradients[0] @ dense, None, None, None


def _derive(cls: type[nn.Module]) -> type[nn.Module]:
    return type(f"Thawing{cls.__name__}", (_Thawing, cls), {"__module__": __name__})


_thawing: Callable[[type[nn.Module]], type[nn.Module]] = cast(Any, cache(_derive))


# ----


MOMENTS = 2  # of AdamW
# Of a process on a CPU, beside what torch is asked for; benchmarks/plan.py shows what these make of whole runs:
LIBRARIES = 90 * 10**6  # code that is only loaded when it is called, threads, what caches hold
LIBRARIES_16_BIT = 40 * 10**6  # what oneDNN compiles for 16-bit products, at most 64 of them
SPLIT = 0.1  # of a step's memory that the allocator holds on top, in pieces
LOGITS, ACTIVATIONS, GRADIENTS = "logits", "activations", "gradients"


@dataclass(frozen=True)
class Memory:
    """Bytes at the largest moment of a run."""

    weights: int  # of the base, as stored
    adapters: int  # what is trained beside the weights: in full fine-tuning of 16 bits, float32 masters
    gradients: int
    optimizer: int  # two moments of AdamW, a copy of before the step, and of the best where evaluations choose
    activations: int  # kept for the backward, and temporaries, at the largest moment
    logits: int  # at that moment
    process: int  # interpreter, libraries, and what the allocator holds beyond what is asked of it

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def with_total(self, total: int) -> "Memory":
        """The same parts where that is the whole: the process has what they leave over; if nothing, they have less."""
        rest = self.process + total - self.total
        return replace(self, process=max(rest, 0), activations=self.activations + min(rest, 0))

    def to_dict(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class Step:
    """One forward and backward at its largest moment, beside what stands; and its work."""

    activations: int
    logits: int
    gradients: int  # of 16-bit weights, on their way to the float32 ones
    kept: int  # from the forward for the backward
    flops: float

    @property
    def held(self) -> int:
        return self.activations + self.logits + self.gradients


def step_of(bare: Skeleton, examples: Sequence[Example], *, checkpointed: bool) -> Step:
    """The forward and backward of these examples in one batch."""
    model, base, device = bare.model, bare.base, bare.base.device
    vocabulary = base.config.get_text_config().vocab_size
    shapes = {parameter.shape for parameter in base.parameters() if parameter.requires_grad}

    def part_of(tensor: Tensor) -> str:
        if tensor.ndim > 1 and tensor.shape[-1] == vocabulary:
            return LOGITS
        return GRADIENTS if tensor.shape in shapes else ACTIVATIONS

    batch, _ = as_batch(examples, bare.rows.packed, bare.rows.pad_id, device)
    with _gradients(trained(model)):
        ledger = Ledger(tensors_of(base, trained(model)), part_of)
        with running(base, bare.rows, bare.kernels, checkpointed=checkpointed), torch.enable_grad(), ledger:
            loss = FORMS[bare.rows.loss](model, batch).sum()
            kept = ledger.now.total()
            loss.backward()  # type: ignore[no-untyped-call]
    held = ledger.peak
    return Step(held[ACTIVATIONS], held[LOGITS], held[GRADIENTS], kept, ledger.flops)


class _gradients:
    """Within the block every trained parameter has its gradient, as in a run, where it is a view of a flat one."""

    def __init__(self, module: nn.Module) -> None:
        self._parameters = list(module.parameters())

    def __enter__(self) -> None:
        for parameter in self._parameters:
            parameter.grad = torch.zeros_like(parameter)

    def __exit__(self, *_: object) -> None:
        for parameter in self._parameters:
            parameter.grad = None


def memory_of(config: TrainConfig, bare: Skeleton, step: Step, process: int) -> Memory:
    """Of a run whose largest forward is `step`, in a process that holds `process` before its model is there."""
    parameters = list(trained(bare.model).parameters())
    wide = sum(parameter.nbytes for parameter in parameters)
    own = {id(parameter) for parameter in bare.base.parameters()}  # a float32 model is its own master
    memory = Memory(
        weights=bare.weights.held,
        adapters=sum(parameter.nbytes for parameter in parameters if id(parameter) not in own),
        gradients=wide + step.gradients,
        optimizer=wide * (MOMENTS + (2 if config.eval_steps else 1)),
        activations=step.activations,
        logits=step.logits,
        process=process,
    )
    return _on_cpu(config, bare, step, memory) if bare.base.device.type == "cpu" else memory


def _on_cpu(config: TrainConfig, bare: Skeleton, step: Step, memory: Memory) -> Memory:
    """With what the process holds beyond what torch is asked for. A device's allocator counts what it is asked for.

    Where another moment is larger than that of the step, the process has the difference.
    """
    own = LIBRARIES + (LIBRARIES_16_BIT if bare.base.dtype == torch.bfloat16 else 0)
    stepping = replace(memory, process=memory.process + bare.weights.left_mapped + own + int(SPLIT * step.held))
    reading = memory.process + bare.weights.held + bare.weights.while_read
    saved = stepping.total - step.held + (bare.weights.held if config.method == "full" else 0)  # read back
    return stepping.with_total(max(stepping.total, reading, saved))


# ---- How long a step will take, before any: its work over what this machine multiplies in a second.
#
# A rough rule: products of the model's own width are timed for a moment, and a step reaches SHARE of that speed.


SHARE = 0.6  # of the products' speed that a step reaches; see benchmarks/plan.py
TURNS = 5


def products_per_second(tokens: int, width: int, inner: int, dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of (tokens, width) x (width, inner), a median of a few."""
    x = torch.ones(tokens, width, dtype=dtype, device=device)
    weight = torch.ones(inner, width, dtype=dtype, device=device)
    seconds = []
    for _ in range(1 + TURNS):
        started = time.perf_counter()
        torch.mm(x, weight.T)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return 2.0 * tokens * width * inner / median(seconds[1:])
