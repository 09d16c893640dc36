"""Before any training: what would be trained, whether it fits, how long it takes.

    config.json -> the model without weights -> the run's own adapter, batches and kernels on it -> memory, work

Full fine-tuning of the same model stands beside it. Lengths and steps come from the data, where it is given.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers import PretrainedConfig

from tailora.core.config import AdaLoRA, LoRAConfig
from tailora.data.store import Example
from tailora.formats.atomic import write_file
from tailora.model import LoRAModel
from tailora.study.adapted import Group, Left, Module, groups_of, left_alone, modules_of
from tailora.study.report import report_if_possible
from tailora.train.config import TrainConfig
from tailora.train.estimate import Memory, Step, memory_of, step_of
from tailora.train.feed import Feed, feed, heaviest, shape_of
from tailora.train.load import load_tokenizer, read_config
from tailora.train.memory import available_bytes, held_now
from tailora.train.setup import start_accelerator
from tailora.train.skeleton import Skeleton, skeleton
from tailora.train.speed import SHARE, products_per_second
from tailora.train.steps import parts

REPORT = "report.json"
MOST = 4096  # examples of a batch that are asked about, where the data does not say how many there are
FULL_RATE = 5e-5
OF_ADAPTER = {*LoRAConfig.model_fields, *AdaLoRA.model_fields, "adapter", "loraplus_lr_ratio", "quantize"}


@dataclass(frozen=True)
class Full:
    """Full fine-tuning of the same model on the same batches."""

    trainable_parameters: int
    memory: Memory
    batch_size_that_fits: int


@dataclass(frozen=True)
class Plan:
    """What a run of these settings would be. Bytes and seconds; basis: how memory and time were found."""

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
    seconds_per_step: float | None
    seconds: float | None  # of all steps
    basis: dict[str, str]
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
    *,
    memory: int | None = None,
    output_dir: Path | None = None,
) -> Plan:
    """Where `config` names no data, every example has max_length tokens, all learned, and steps are not known.

    memory: bytes to fit into, instead of what is free.
    output_dir: folder for report.json and, with the extra `study`, report.html; nothing is written without it.

    Raises ConfigError, TargetError, DataError, FormatError.
    """
    accelerator = start_accelerator(config.replaced(report_to=[]))
    shape = read_config(config.model)
    batches = _Batches.of(config, shape, accelerator)
    found = _planned(config, shape, batches, accelerator.device, memory)
    if output_dir is not None:
        write_file(output_dir / REPORT, json.dumps({"kind": "plan", **found.to_dict()}, indent=1).encode())
        report_if_possible(output_dir)
    return found


def _planned(
    config: TrainConfig, shape: PretrainedConfig, batches: "_Batches", device: torch.device, memory: int | None
) -> Plan:
    process = held_now(device)
    room = available_bytes(device) + process if memory is None else memory  # what this process holds comes free
    with skeleton(config, shape, device) as bare:
        estimate = _Estimate.of(config, bare, batches, process)
        summary, model = bare.model.summary(), bare.model
        lora = model if isinstance(model, LoRAModel) else None
        found = Plan(
            model=config.model,
            method=config.method,
            dtype=str(bare.base.dtype).removeprefix("torch."),
            device=str(device),
            trainable_parameters=summary.trainable_parameters,
            total_parameters=summary.total_parameters,
            modules=modules_of(lora) if lora else [],
            groups=groups_of(lora) if lora else [],
            left=left_alone(lora, config.lora()) if lora else [],
            memory=estimate.memory,
            full=None,
            available_bytes=room,
            batch_size=config.per_device_train_batch_size,
            batch_size_that_fits=estimate.batch_size_within(room),
            largest_forward={"examples": len(batches.heaviest), "tokens": _tokens(batches.heaviest)},
            kernels=bare.kernels.words,
            tokens=batches.tokens,
            steps=batches.steps,
            seconds_per_step=None,
            seconds=None,
            basis={"memory": "estimated", "time": "estimated"},
            notes=[*batches.notes, *bare.notes, *_in_parts(batches)],
            settings=config.model_dump(mode="json", exclude_unset=True),
        )
        flops, dtype = estimate.step.flops, bare.base.dtype
    found = replace(found, **_time(shape, flops, dtype, batches, device))
    return replace(found, full=_full(config, shape, batches, device, process, room)) if lora else found


def _full(
    config: TrainConfig,
    shape: PretrainedConfig,
    batches: "_Batches",
    device: torch.device,
    process: int,
    room: int,
) -> Full:
    with skeleton(fully(config), shape, device) as bare:
        estimate = _Estimate.of(fully(config), bare, batches, process)
        count = bare.model.summary().trainable_parameters
        return Full(count, estimate.memory, estimate.batch_size_within(room))


def fully(config: TrainConfig) -> TrainConfig:
    """The same run with all weights trained."""
    given = config.model_dump(exclude_unset=True, exclude=OF_ADAPTER)
    return TrainConfig(**{**given, "method": "full", "learning_rate": FULL_RATE})


# ---- what a step reads


@dataclass(frozen=True, eq=False)
class _Batches:
    """The largest forward, and what is known of the rest.    at: batch size -> its largest forward."""

    heaviest: list[Example]
    at: Callable[[int], list[Example]]
    most: int  # examples that a batch can have
    tokens: int | None
    steps: int | None
    tokens_per_step: float
    notes: list[str]

    @classmethod
    def of(cls, config: TrainConfig, shape: PretrainedConfig, accelerator: Accelerator) -> "_Batches":
        given = "data" in config.model_fields_set
        return (_from_data if given else _assumed)(config, shape, accelerator)


def _from_data(config: TrainConfig, shape: PretrainedConfig, accelerator: Accelerator) -> _Batches:
    tokenizer = load_tokenizer(config.model)
    rows = shape.get_text_config().vocab_size
    known: Feed = feed(config, rows, tokenizer, accelerator)
    size = shape_of(config, accelerator)
    if known.prepared is None or config.streaming:
        notes = ["the data is streamed: lengths are those of its first batch"]
        tokens_per_step = float(known.largest.tokens * config.gradient_accumulation_steps)
        return _Batches(
            known.heaviest,
            lambda count: _repeated(known.heaviest, count, size.token_limit),
            MOST,
            None,
            known.max_steps,
            tokens_per_step,
            notes,
        )
    train = known.prepared.train
    mean = float(train.lengths.mean()) * min(size.examples_per_step, len(train))
    return _Batches(
        heaviest=known.heaviest,
        at=lambda count: heaviest(train, replace(size, batch_size=count)),
        most=len(train),
        tokens=round(mean * known.max_steps),
        steps=known.max_steps,
        tokens_per_step=mean,
        notes=[],
    )


def _assumed(config: TrainConfig, shape: PretrainedConfig, accelerator: Accelerator) -> _Batches:
    """Examples of max_length tokens, all of them learned."""
    size = shape_of(config, accelerator)
    ids = np.arange(config.max_length, dtype=np.int32) % shape.get_text_config().vocab_size
    example = Example(ids, ids)

    def at(count: int) -> list[Example]:
        return _repeated([example], count, size.token_limit)

    per_step = float(size.examples_per_step * config.max_length)
    return _Batches(
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
    places = max(parts([len(each.input_ids) for each in batch], limit), key=len)
    return [batch[place] for place in places]


def _in_parts(batches: _Batches) -> list[str]:
    largest = batches.at(batches.most)
    if len(largest) == batches.most:
        return []
    return [f"memory stops to grow with the batch size at {_tokens(largest):,} tokens: larger ones go through in parts"]


def _tokens(examples: list[Example]) -> int:
    return sum(len(example.input_ids) for example in examples)


# ---- memory


@dataclass(frozen=True, eq=False)
class _Estimate:
    """The memory of the run, and how it grows with the batch: activations in proportion to the tokens of a forward."""

    batches: _Batches
    step: Step
    memory: Memory

    @classmethod
    def of(cls, config: TrainConfig, bare: Skeleton, batches: _Batches, process: int) -> "_Estimate":
        step = step_of(bare, batches.heaviest, checkpointed=config.gradient_checkpointing)
        return cls(batches, step, memory_of(config, bare, step, process))

    def total_at(self, batch_size: int) -> float:
        tokens, known = (_tokens(each) for each in (self.batches.at(batch_size), self.batches.heaviest))
        return self.memory.total + self.memory.activations * (tokens / known - 1)

    def batch_size_within(self, room: int) -> int:
        """The largest that fits; 0 when none does."""
        low, high = 0, 1
        while high <= self.batches.most and self.total_at(high) <= room:
            low, high = high, high * 2
        high = min(high, self.batches.most + 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.total_at(middle) <= room else (low, middle)
        return low


# ---- time


def _time(
    shape: PretrainedConfig, flops: float, dtype: torch.dtype, batches: _Batches, device: torch.device
) -> dict[str, Any]:
    """flops: of the largest forward and its backward."""
    text, tokens = shape.get_text_config(), _tokens(batches.heaviest)
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    speed = SHARE * products_per_second(tokens, text.hidden_size, inner, dtype, device)
    per_step = flops / tokens * batches.tokens_per_step / speed
    seconds = None if batches.steps is None else per_step * batches.steps
    basis = f"{flops / tokens / 1e9:.2f} GFLOP a token at {speed / 1e9:,.0f} GFLOP/s, a rough rule"
    return {"seconds_per_step": per_step, "seconds": seconds, "basis": {"memory": "estimated", "time": basis}}
