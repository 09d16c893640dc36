"""Before any training: what would be trained, whether it fits, how long it takes.

    config.json -> the model without weights -> the run's own adapter, batches and kernels on it -> memory, work
    --measure   -> a few real steps in a process of their own -> memory and time as they were

Full fine-tuning of the same model stands beside it. Lengths and steps come from the data, where it is given.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from tailora.core.config import AdaLoRA, LoRAConfig
from tailora.formats.io import write_file
from tailora.model import LoRAModel
from tailora.report import CONTENT, report_if_possible
from tailora.study.adapted import Group, Left, Module, groups_of, left_alone, modules_of
from tailora.study.ahead import Batches, in_parts, tokens_of
from tailora.train.config import TrainConfig
from tailora.train.estimate import Memory, Step, memory_of, step_of
from tailora.train.load import read_config
from tailora.train.memory import available_bytes, held_now
from tailora.train.setup import start_accelerator
from tailora.train.skeleton import skeleton
from tailora.train.speed import SHARE, products_per_second
from tailora.train.subprocess_worker import Rehearsal, rehearse

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
    measured: Rehearsal | None
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
    output_dir: folder for report.json and, with the extra `study`, report.html; nothing is written without it.

    Raises ConfigError, TargetError, DataError, FormatError; with `measure` whatever a run raises.
    """
    accelerator = start_accelerator(config.replaced(report_to=[]))
    device, shape = accelerator.device, read_config(config.model)
    batches = Batches.of(config, shape, accelerator)
    process = held_now(device)  # what a run's process holds, too, before its model is there
    room = available_bytes(device) + process if memory is None else memory
    own = _sketch(config, shape, batches, device, process)
    full = None if config.method == "full" else _full(config, shape, batches, device, process, room)
    measured = None
    if measure:
        say("a few real steps are measured")
        measured = rehearse(config, with_data="data" in config.model_fields_set)
    found = _put_together(config, own, full, measured, batches, room, _speed(shape, own, batches, device))
    if output_dir is not None:
        write_file(output_dir / CONTENT, json.dumps({"kind": "plan", **found.to_dict()}, indent=1).encode())
        report_if_possible(output_dir)
    return found


def _put_together(
    config: TrainConfig,
    own: "_Sketch",
    full: Full | None,
    measured: Rehearsal | None,
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
    step: Step
    memory: Memory
    kernels: str
    notes: list[str]


def _sketch(
    config: TrainConfig, shape: PretrainedConfig, batches: Batches, device: torch.device, process: int
) -> _Sketch:
    with skeleton(config, shape, device) as bare:
        model, summary = bare.model, bare.model.summary()
        lora = model if isinstance(model, LoRAModel) else None
        step = step_of(bare, batches.heaviest, checkpointed=config.gradient_checkpointing)
        return _Sketch(
            dtype=bare.base.dtype,
            device=str(device),
            trainable_parameters=summary.trainable_parameters,
            total_parameters=summary.total_parameters,
            modules=modules_of(lora) if lora else [],
            groups=groups_of(lora) if lora else [],
            left=left_alone(lora) if lora else [],
            step=step,
            memory=memory_of(config, bare, step, process),
            kernels=bare.kernels.words,
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
