"""Before any training: what would be trained, whether it fits, how long it takes.

    config.json -> the model without weights -> the run's own adapter, batches and kernels on it -> memory, work
    --measure   -> a few real steps in a process of their own -> memory and time as they were

Full fine-tuning of the same model stands beside it. Lengths and steps come from the data, where it is given.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from transformers import PretrainedConfig

from tailora.core.adapter import SummaryRow, layer_key
from tailora.core.config import AdaLoRA, LoRAConfig
from tailora.core.layer import LoRALayer
from tailora.core.layer_types import host_path, layer_type_of
from tailora.core.patterns import layer_index
from tailora.core.targets import selected_candidates
from tailora.data.dataset import Example
from tailora.formats.run_folder import write_report
from tailora.model import LoRAModel
from tailora.train.config import TrainConfig
from tailora.train.dataloader import largest_forward, read_data, split_by_tokens, step_shape
from tailora.train.estimate import (
    SHARE,
    Memory,
    StepCost,
    estimate_memory,
    fake_model,
    products_per_second,
    simulate_step,
)
from tailora.train.memory import available_bytes, used_bytes
from tailora.train.model_loading import load_tokenizer, read_config
from tailora.train.setup import start_accelerator
from tailora.train.subprocess_worker import StepsMeasured, measure_steps

# ---- What the steps of a run read, before it: from the data, or from the longest examples that the settings allow.


MOST = 4096  # examples of a batch that are asked about, where the data does not say how many there are


@dataclass(frozen=True, eq=False)
class Batches:
    """The largest forward, and what is known of the rest.    at: batch size -> its largest forward."""

    heaviest: list[Example]
    at: Callable[[int], list[Example]]
    most: int  # examples that a batch can have
    tokens: int | None
    steps: int | None
    tokens_per_step: float
    notes: list[str]

    @classmethod
    def of(cls, config: TrainConfig, shape: PretrainedConfig, accelerator: Accelerator) -> "Batches":
        """Raises DataError with all that is wrong with the data."""
        given = "data" in config.model_fields_set
        return (_from_data if given else _assumed)(config, shape, accelerator)


def _from_data(config: TrainConfig, shape: PretrainedConfig, accelerator: Accelerator) -> Batches:
    tokenizer = load_tokenizer(config.model)
    rows = shape.get_text_config().vocab_size
    known = read_data(config, rows, tokenizer, accelerator)
    size = step_shape(config, accelerator)
    if known.prepared is None or config.streaming:
        notes = ["the data is streamed: lengths are those of its first batch"]
        tokens_per_step = float(known.largest_size.tokens * config.gradient_accumulation_steps)
        return Batches(
            known.largest,
            lambda count: _repeated(known.largest, count, size.token_limit),
            MOST,
            None,
            known.max_steps,
            tokens_per_step,
            notes,
        )
    train = known.prepared.train
    mean = float(train.lengths.mean()) * min(size.examples_per_step, len(train))
    return Batches(
        heaviest=known.largest,
        at=lambda count: largest_forward(train, replace(size, batch_size=count)),
        most=len(train),
        tokens=round(mean * known.max_steps),
        steps=known.max_steps,
        tokens_per_step=mean,
        notes=[],
    )


def _assumed(config: TrainConfig, shape: PretrainedConfig, accelerator: Accelerator) -> Batches:
    """Examples of max_length tokens, all of them learned."""
    size = step_shape(config, accelerator)
    ids = np.arange(config.max_length, dtype=np.int32) % shape.get_text_config().vocab_size
    example = Example(ids, ids)

    def at(count: int) -> list[Example]:
        return _repeated([example], count, size.token_limit)

    per_step = float(size.examples_per_step * config.max_length)
    return Batches(
        heaviest=at(size.batch_size),
        at=at,
        most=MOST,
        tokens=None if config.max_steps is None else round(per_step * config.max_steps),
        steps=config.max_steps,
        tokens_per_step=per_step,
        notes=[
            f"without --data every example is taken to have --max-length {config.max_length:,} tokens, all of them "
            "learned: shorter ones take less"
        ],
    )


def _repeated(examples: list[Example], count: int, limit: int | None) -> list[Example]:
    """The largest part of a batch of so many."""
    batch = [examples[place % len(examples)] for place in range(count)]
    places = max(split_by_tokens([len(each.input_ids) for each in batch], limit), key=len)
    return [batch[place] for place in places]


def in_parts(batches: Batches) -> list[str]:
    """A note where large batches take no more memory."""
    largest = batches.at(batches.most)
    if len(largest) == batches.most:
        return []
    return [f"memory stops growing with the batch size at {tokens_of(largest):,} tokens: more go through in parts"]


def tokens_of(examples: list[Example]) -> int:
    return sum(len(example.input_ids) for example in examples)


# ---- What a configuration adapts, in groups of like layers, and what it leaves alone, with the reason.


@dataclass(frozen=True)
class Module:
    """A layer with a low-rank update."""

    path: str
    kind: str
    in_features: int
    out_features: int
    r: int
    alpha: float
    parameters: int


@dataclass(frozen=True)
class Group:
    """Like layers: in `path` a range stands for the number that tells them apart.

    shape: (in, out), of what is trained whole that of the parameter; r, alpha: None there.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    r: int | None
    alpha: float | None
    count: int
    parameters: int


@dataclass(frozen=True)
class Left:
    """Like layers that stay as they are. parameters: of all of them; 0 where they are counted elsewhere (tied)."""

    path: str
    kind: str
    count: int
    parameters: int
    reason: str


def modules_of(model: LoRAModel) -> list[Module]:
    """Those with a low-rank update, in the model's order."""
    return [_module(row, model) for row in model.summary().rows if row.r is not None]


def _module(row: SummaryRow, model: LoRAModel) -> Module:
    layer = cast(LoRALayer, model.lora_layers[layer_key(row.path)])
    return Module(
        row.path, row.layer_type, layer.in_features, layer.out_features, layer.r, layer.lora_alpha, row.parameters
    )


def groups_of(model: LoRAModel) -> list[Group]:
    """All that is trained."""
    found: dict[tuple[Any, ...], list[tuple[str, int]]] = {}
    dims = {each.path: (each.in_features, each.out_features) for each in modules_of(model)}
    for row in model.summary().rows:
        shape = row.shape if row.r is None else dims[row.path]
        found.setdefault((starred(row.path), row.layer_type, shape, row.r, row.lora_alpha), []).append(
            (row.path, row.parameters)
        )
    return [
        Group(ranged([path for path, _ in each]), kind, shape, r, alpha, len(each), sum(count for _, count in each))
        for (_, kind, shape, r, alpha), each in found.items()
    ]


def left_alone(model: LoRAModel) -> list[Left]:
    """Modules with weights of their own that the active adapter neither adapts nor trains."""
    base, config = model.base_model, model.adapters[model.active_adapters[0]]
    rows = [row.path for row in model.summary().rows]
    touched = {*rows, *(host_path(base, path) for path in rows)}
    why = _Reasons(base, config)
    found: dict[tuple[str, str, str], list[tuple[str, int]]] = {}
    seen: set[int] = set()
    for path, module in base.named_modules():
        own = list(module.parameters(recurse=False))
        if not own or any(path == each or path.startswith(f"{each}.") for each in touched):
            continue
        count = sum(parameter.numel() for parameter in own if id(parameter) not in seen)
        seen |= {id(parameter) for parameter in own}
        reason = why(path, module) + ("" if count else "; tied to another weight")
        found.setdefault((starred(path), _name(module), reason), []).append((path, count))
    return [
        Left(ranged([path for path, _ in each]), kind, len(each), sum(count for _, count in each), reason)
        for (_, kind, reason), each in found.items()
    ]


def _name(module: nn.Module) -> str:
    return type(module).__name__.removeprefix("Thawing")


class _Reasons:
    """Why a module is not among what the config adapts."""

    def __init__(self, base: nn.Module, config: LoRAConfig) -> None:
        modules = dict(base.named_modules())
        find = getattr(base, "get_output_embeddings", None)
        self._head = find() if callable(find) else None
        self._all_linear = config.target_modules == "all-linear"
        without = {
            "exclude_modules takes it away": {"exclude_modules": None},
            "its layer is not in layers_to_transform": {"layers_to_transform": None},
        }
        self._lifted = {
            reason: set(selected_candidates(base, modules, config.replaced(**change)))
            for reason, change in without.items()
        }

    def __call__(self, path: str, module: nn.Module) -> str:
        kind = layer_type_of(module)
        if kind is None:
            return "no low-rank form: not a matrix"
        if lifted := next((reason for reason, paths in self._lifted.items() if path in paths), None):
            return lifted
        if self._all_linear and module is self._head:
            return "the output head, which all-linear leaves out: name it to adapt it"
        if self._all_linear and not kind.is_linear:
            return "not linear: name it to adapt it"
        return "not among target_modules"


# ---- paths


def starred(path: str) -> str:
    """The path with * for its first number: like layers have the same."""
    split_by_tokens = path.split(".")
    place = next((place for place, part in enumerate(split_by_tokens) if part.isdecimal()), None)
    return path if place is None else ".".join([*split_by_tokens[:place], "*", *split_by_tokens[place + 1 :]])


def ranged(paths: Sequence[str]) -> str:
    """Like paths as one: model.layers.{0-29}.self_attn.q_proj."""
    numbers = [index for path in paths if (index := layer_index(path)) is not None]
    if len(paths) == 1 or not numbers:
        return paths[0]
    spans = ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in _spans(sorted(set(numbers))))
    return starred(paths[0]).replace("*", f"{{{spans}}}", 1)


def _spans(numbers: Iterable[int]) -> Iterator[tuple[int, int]]:
    first = last = None
    for number in numbers:
        if last is not None and first is not None and number != last + 1:
            yield first, last
            first = None
        first = number if first is None else first
        last = number
    if first is not None and last is not None:
        yield first, last


# ----


FULL_RATE = 5e-5
OF_ADAPTER = {*LoRAConfig.model_fields, *AdaLoRA.model_fields, "adapter", "loraplus_lr_ratio", "quantize"}


@dataclass(frozen=True)
class Full:
    """Full fine-tuning of the same model on the same batches, unquantised. Never measured."""

    trainable_parameters: int
    memory: Memory
    batch_size_that_fits: int


@dataclass(frozen=True)
class Plan:
    """What a run of these settings would be. Memory in bytes, time in seconds."""

    model: str
    method: str
    dtype: str
    device: str
    trainable_parameters: int
    total_parameters: int
    modules: list[Module]
    groups: list[Group]
    left: list[Left]
    memory: Memory
    full: Full | None  # None where the run itself is one
    available_bytes: int
    batch_size: int
    batch_size_that_fits: int  # 0: not even one example
    largest_forward: dict[str, int]  # examples, tokens
    kernels: str
    tokens: int | None  # of all steps
    steps: int | None
    seconds_per_step: float
    seconds: float | None  # of all steps
    measured: StepsMeasured | None
    basis: dict[str, str]  # how memory and time were found
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.available_bytes

    def to_dict(self) -> dict[str, Any]:
        full = None if self.full is None else {**asdict(self.full), "memory": self.full.memory.to_dict()}
        reasons = {each.path: each.reason for each in self.left}
        return {**asdict(self), "memory": self.memory.to_dict(), "full": full, "left_alone": reasons, "fits": self.fits}


def plan(
    config: TrainConfig,
    measure: bool = False,
    *,
    memory: int | None = None,
    output_dir: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Where `config` names no data, every example has max_length tokens, all learned, and steps are not known.

    measure: take a few real steps, too, in a process of their own.    memory: bytes to fit into; else what is free.
    output_dir: folder for report.json; nothing is written without it.

    Raises ConfigError, TargetError, DataError, FormatError; with `measure` whatever a run raises.
    """
    accelerator = start_accelerator(config.replaced(report_to=[]))
    device, shape = accelerator.device, read_config(config.model)
    batches = Batches.of(config, shape, accelerator)
    process = used_bytes(device)  # what a run's process holds, too, before its model is there
    room = available_bytes(device) + process if memory is None else memory
    own = _sketch(config, shape, batches, device, process)
    full = None if config.method == "full" else _full(config, shape, batches, device, process, room)
    measured = None
    if measure:
        say("a few real steps are measured")
        measured = measure_steps(config, with_data="data" in config.model_fields_set)
    found = _put_together(config, own, full, measured, batches, room, _speed(shape, own, batches, device))
    if output_dir is not None:
        write_report(output_dir, "plan", found.to_dict())
    return found


def _put_together(
    config: TrainConfig,
    own: "_Sketch",
    full: Full | None,
    measured: StepsMeasured | None,
    batches: Batches,
    room: int,
    speed: float,
) -> Plan:
    per_token = own.step.flops / tokens_of(batches.heaviest) / speed
    basis = {
        "memory": "estimated from the shapes, and what this process holds now",
        "time": f"a rough rule: {per_token * speed / 1e9:.2g} GFLOP a token at {speed / 1e9:,.0f} GFLOP/s",
    }
    memory = own.memory
    if measured is not None:
        memory, per_token = memory.with_total(measured.peak_bytes), measured.seconds_per_token
        basis = dict.fromkeys(basis, f"measured in {measured.steps} steps")
    per_step = per_token * batches.tokens_per_step
    return Plan(
        model=config.model,
        method=config.method,
        dtype=str(own.dtype).removeprefix("torch."),
        device=own.device,
        trainable_parameters=own.trainable_parameters,
        total_parameters=own.total_parameters,
        modules=own.modules,
        groups=own.groups,
        left=own.left,
        memory=memory,
        full=full,
        available_bytes=room,
        batch_size=config.per_device_train_batch_size,
        batch_size_that_fits=batch_size_within(room, memory, batches),
        largest_forward={"examples": len(batches.heaviest), "tokens": tokens_of(batches.heaviest)},
        kernels=own.kernels if measured is None else measured.kernels,
        tokens=batches.tokens,
        steps=batches.steps,
        seconds_per_step=per_step,
        seconds=None if batches.steps is None else per_step * batches.steps,
        measured=measured,
        basis=basis,
        notes=[*batches.notes, *own.notes, *in_parts(batches)],
        settings=config.model_dump(mode="json", exclude_unset=True),
    )


# ---- one way to train


@dataclass(frozen=True)
class _Sketch:
    """What the model without weights tells."""

    dtype: torch.dtype
    device: str
    trainable_parameters: int
    total_parameters: int
    modules: list[Module]
    groups: list[Group]
    left: list[Left]
    step: StepCost
    memory: Memory
    kernels: str
    notes: list[str]


def _sketch(
    config: TrainConfig, shape: PretrainedConfig, batches: Batches, device: torch.device, process: int
) -> _Sketch:
    with fake_model(config, shape, device) as bare:
        model, summary = bare.model, bare.model.summary()
        lora = model if isinstance(model, LoRAModel) else None
        step = simulate_step(bare, batches.heaviest, checkpointed=config.gradient_checkpointing)
        return _Sketch(
            dtype=bare.base.dtype,
            device=str(device),
            trainable_parameters=summary.trainable_parameters,
            total_parameters=summary.total_parameters,
            modules=modules_of(lora) if lora else [],
            groups=groups_of(lora) if lora else [],
            left=left_alone(lora) if lora else [],
            step=step,
            memory=estimate_memory(config, bare, step, process),
            kernels=bare.kernels.description,
            notes=bare.notes,
        )


def _full(
    config: TrainConfig, shape: PretrainedConfig, batches: Batches, device: torch.device, process: int, room: int
) -> Full:
    other = _sketch(fully(config), shape, batches, device, process)
    return Full(other.trainable_parameters, other.memory, batch_size_within(room, other.memory, batches))


def fully(config: TrainConfig) -> TrainConfig:
    """The same run with all weights trained."""
    given = config.model_dump(exclude_unset=True, exclude=OF_ADAPTER)
    return TrainConfig(**{**given, "method": "full", "learning_rate": FULL_RATE})


# ---- what follows


def batch_size_within(room: int, memory: Memory, batches: Batches) -> int:
    """The largest batch that fits; 0 when not even one example does. Activations grow with a forward's tokens."""

    def fits(batch_size: int) -> bool:
        growth = tokens_of(batches.at(batch_size)) / tokens_of(batches.heaviest) - 1
        return memory.total + memory.activations * growth <= room

    low, high = 0, 1
    while high <= batches.most and fits(high):
        low, high = high, high * 2
    high = min(high, batches.most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _speed(shape: PretrainedConfig, own: _Sketch, batches: Batches, device: torch.device) -> float:
    """Operations a second that a step is expected to reach."""
    text = shape.get_text_config()
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    return SHARE * products_per_second(tokens_of(batches.heaviest), text.hidden_size, inner, own.dtype, device)
