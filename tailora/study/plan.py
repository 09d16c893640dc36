"""Plans a run without training: what would be trained, whether it fits into memory, how many steps it takes.

plan -> Plan          (study/plan_result.py)
  read_run            the model's shape, and
    place_of          the device: one of this machine, or a graphics card by name
    read_batches      the batches: from the data, or examples of max_length tokens
  simulate            the run's adapter and kernels on the model without weights -> memory
    checkpointing, quantization   settings that need less memory
  full_fine_tuning    the same for full fine-tuning of this model, if asked for
  measure_steps       with `measure`: a few real steps in a separate process -> measured memory and time
"""

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers import PretrainedConfig

from tailora.core.device import choose_device
from tailora.data.dataset import Example, Examples, warnings_of
from tailora.data.labels import Labels
from tailora.data.schemas import FEEDBACK, PREFERENCE
from tailora.errors import ConfigError
from tailora.formats.run_folder import write_report
from tailora.model import LoRAModel
from tailora.study.cards import CONTEXT, LONGEST_NAME, Card, find_cards
from tailora.study.config import ADAPTER_SETTINGS, FIRST_RATES, FULL
from tailora.study.model_layout import trained_groups
from tailora.study.plan_result import FullFineTuning, Option, Plan, Ranks
from tailora.train import memory_estimate as estimate
from tailora.train.config import GRPO, PREFERENCE_FIELDS, TASK_TYPES, TrainConfig
from tailora.train.dataloader import TrainingData, epoch_steps, largest_forward, read_data, steps_per_epoch
from tailora.train.defaults import RunConfig, with_numbers
from tailora.train.image_text_to_text import ImageTextToText, language_model_task
from tailora.train.loss import CAUSAL_LM, Task
from tailora.train.measure_steps import StepsMeasured, measure_steps
from tailora.train.memory import available_bytes, format_bytes, used_bytes
from tailora.train.memory_estimate import CHECKPOINTING, QUANTIZATION, Memory
from tailora.train.model_loading import check_can_be_sharded, load_tokenizer, read_config, reads_images
from tailora.train.preference import preference_task
from tailora.train.quantize import dequantization_note, stays_quantized
from tailora.train.rollouts import Prompts
from tailora.train.setup import find_labels, shape_of, start_accelerator
from tailora.train.step import StepShape, split_by_tokens, step_shape, token_limit
from tailora.train.trainable import trained_parts


def plan(
    config: TrainConfig,
    measure: bool = False,
    *,
    full: bool = False,
    memory: int | None = None,
    nproc: int = 1,
    output_dir: Path | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Plans the run of `config`. Without data, it assumes examples of max_length tokens, all of them trained.

    config: its device may also be the name of a graphics card, such as "H100 80GB".
    measure: also run a few real steps, in a separate process.
    full: also estimate the memory of full fine-tuning.
    memory: limit in bytes; default: the free memory.
    nproc: number of processes of the run.
    output_dir: folder for report.json; nothing is written without it.

    Raises ConfigError, TargetError, DataError, FormatError; with `measure` any error of a run.
    """
    run = read_run(config, memory, nproc, measure=measure)
    simulated = simulate(run)
    comparison = full_fine_tuning(run, simulated.fake.notes) if full else None
    measured = None
    if measure:
        log("measuring a few real steps")
        measured = measure_steps(run.config, with_data="data" in config.model_fields_set)
    result = plan_of(run, simulated, comparison, measured)
    if output_dir is not None:
        write_report(output_dir, "plan", result.to_dict())
    return result


@dataclass(frozen=True, eq=False)
class PlannedRun:
    """A run with the shape of its model, its device and its batches."""

    config: RunConfig
    shape: PretrainedConfig
    place: "Place"
    batches: "Batches"
    available: int  # bytes that a process may use
    nproc: int

    def memory_of(self, config: TrainConfig, fake: estimate.FakeModel, step: estimate.StepCost) -> Memory:
        return estimate.estimate_memory(config, fake, step, self.place.process, self.nproc if config.fsdp else 1)


def read_run(config: TrainConfig, memory: int | None, nproc: int, *, measure: bool) -> PlannedRun:
    """Reads what the run would read, except for the weights. Arguments and errors are described in `plan`."""
    place = place_of(config)
    check_can_be_planned(config, place, nproc, measure=measure)
    device = "cpu" if isinstance(place.device, estimate.AbsentDevice) else config.device
    in_one = {"fsdp": False, "report_to": [], "device": device}
    accelerator = start_accelerator(config.replaced(**in_one))
    available = place.available if memory is None else memory
    if nproc > 1 and place.device == torch.device("cpu"):
        available //= nproc
        place.notes.append(f"the {nproc} processes share this machine's free memory equally")
    shape, labels = read_shape(config)
    if config.fsdp:
        check_can_be_sharded(shape, config.model, config.quantize)
    batches = read_batches(config, shape, accelerator, token_limit(place.device.type), nproc, labels)
    return PlannedRun(batches.config, shape, place, batches, available, nproc)


@dataclass(frozen=True, eq=False)
class Simulated:
    """What the largest step shows on the model without weights."""

    fake: estimate.FakeModel
    memory: dict[str, Memory]  # settings -> of the run with them; first as they are


def simulate(run: PlannedRun) -> Simulated:
    """Returns the memory of the run, and of the run with settings that need less."""
    config = run.config
    with estimate.fake_model(config, run.shape, run.place.device, run.batches.task) as fake:
        step = estimate.largest_step(config, fake, run.batches.largest)
        memory = {AS_SET: run.memory_of(config, fake, step), **checkpointing(run, fake, step)}
        memory |= quantization(run, fake, step)
    return Simulated(fake, memory)


def plan_of(run: PlannedRun, simulated: Simulated, full: FullFineTuning | None, measured: StepsMeasured | None) -> Plan:
    config, batches, memory = run.config, run.batches, simulated.memory[AS_SET]
    trained = what_is_trained(simulated.fake)
    seconds_per_step, is_absent = None, isinstance(run.place.device, estimate.AbsentDevice)
    reason = "because this machine does not have the device" if is_absent else "but --measure measures it"
    basis = {"memory": "estimated from the shapes", "time": f"not estimated, {reason}"}
    if measured is not None:
        memory, trained["kernels"] = memory.with_total(measured.peak_bytes), measured.kernels
        basis = dict.fromkeys(basis, f"measured in {measured.steps} steps")
        # completions are as long as in the measured steps
        tokens = batches.tokens_per_step if batches.prompts is None else measured.tokens_per_step
        seconds_per_step = measured.seconds_per_token * tokens
    batch_size, steps = batch_size_that_fits(run.available, memory, batches), batches.steps
    fits, can_shard = memory.total <= run.available, run.nproc > 1 and not config.fsdp
    helps = [] if fits else estimate.remedies(config, run.shape, batch_size, run.place.device, can_shard=can_shard)
    return Plan(
        model=config.model,
        method=config.method,
        device=run.place.name,
        **trained,
        memory=memory,
        available_bytes=run.available,
        batch_size=config.per_device_train_batch_size,
        batch_size_that_fits=batch_size,
        options=[option(run, settings, needed) for settings, needed in simulated.memory.items()],
        remedies=helps,
        largest_forward={"examples": len(batches.largest), "tokens": tokens_of(batches.largest)},
        examples=None if batches.examples is None else len(batches.examples),
        tokens=None if steps is None else round(run.nproc * batches.tokens_per_step * steps),
        steps=steps,
        seconds_per_step=seconds_per_step,
        seconds=None if steps is None or seconds_per_step is None else seconds_per_step * steps,
        basis=basis,
        full=full,
        measured=measured,
        ranks=Ranks(run.nproc, config.fsdp) if run.nproc > 1 else None,
        notes=notes_of(run, simulated.fake, is_measured=measured is not None),
        settings=config.model_dump(mode="json", exclude_unset=True),
    )


def read_shape(config: TrainConfig) -> tuple[PretrainedConfig, Labels | None]:
    """Returns config.json of the model, with the labels of the data for tasks that have some, and the labels."""
    if config.task in (*TASK_TYPES, GRPO) and "data" not in config.model_fields_set:
        what = "prompts" if config.task == GRPO else "labels"
        raise ConfigError(f"--task {config.task} needs the {what} of the data; add --data")
    if config.task not in TASK_TYPES:
        return read_config(config.model), None
    labels, _ = find_labels(config)
    return shape_of(config, labels, load_tokenizer(config.model)), labels


def check_can_be_planned(config: TrainConfig, place: "Place", nproc: int, *, measure: bool) -> None:
    """Raises ConfigError for settings that exclude each other, and if this machine cannot run the steps to measure."""
    if config.fsdp and nproc == 1:
        raise ConfigError("--fsdp shards the base model across processes; set their number with --nproc")
    if not measure:
        return
    if isinstance(place.device, estimate.AbsentDevice):
        raise ConfigError(
            f"--measure runs real steps, but this machine has no {place.name}; remove --measure or --device"
        )
    if learns_preferences(config) and "data" not in config.model_fields_set:
        raise ConfigError("--measure needs data to run real steps on preferences; add --data")
    if nproc > 1:
        raise ConfigError(
            f"--measure runs real steps in one process and cannot be combined with --nproc {nproc}; remove one of them"
        )


def what_is_trained(fake: estimate.FakeModel) -> dict[str, Any]:
    """Returns attributes of the plan: the layers with an update, unless all weights are trained, and their numbers."""
    model, summary = fake.model, fake.model.summary()
    return {
        "dtype": str(fake.base.dtype).removeprefix("torch."),
        "kernels": fake.kernels.description,
        "trainable_parameters": summary.trainable_parameters,
        "total_parameters": summary.total_parameters,
        "parts": trained_parts(model),
        "groups": trained_groups(model) if isinstance(model, LoRAModel) else [],
    }


# ---- The device


@dataclass(frozen=True)
class Place:
    """The device of a run: one of this machine, or a graphics card by name."""

    name: str
    device: torch.device | estimate.AbsentDevice
    process: int  # bytes that a process uses before it loads the model
    available: int  # bytes that a run may use
    notes: list[str] = field(default_factory=list)


def place_of(config: TrainConfig) -> Place:
    """Returns the device of the settings. Raises ConfigError if it is no device of this machine and no known card."""
    name = config.device[:LONGEST_NAME]
    try:
        device = choose_device(name)
    except ConfigError as error:
        try:
            return place_of_card(config, find_cards(name))
        except ConfigError as unknown:
            raise ConfigError(f"{error}; {unknown}") from unknown
    process = used_bytes(device)
    available = available_bytes(device) + process
    return Place(str(device), device, process, available)


def place_of_card(config: TrainConfig, cards: list[Card]) -> Place:
    """Returns the first card as a place, with a note about the others."""
    card, others = cards[0], [card.name for card in cards[1:]]
    notes = [f"not measured on a {card.name}; actual memory may be a few percent higher"]
    if others:
        notes.append(f"assuming {card.name}; similar names: {', '.join(others[:5])}")
    auto = torch.bfloat16 if card.has_bfloat16 else torch.float16
    precision = auto if config.dtype == "auto" else getattr(torch, config.dtype)
    absent = estimate.AbsentDevice(card.device, precision)
    return Place(card.name, absent, CONTEXT, card.available_bytes, notes)


# ---- Batches

MOST_EXAMPLES = 4096  # per batch, if the number of examples is unknown


@dataclass(frozen=True, eq=False)
class Batches:
    """The batches of one rank. With a stream or without data, the number of examples is unknown."""

    config: RunConfig
    task: Task  # without its reference model
    largest: list[Example]  # of the largest forward pass
    shape: StepShape
    steps: int | None
    tokens_per_step: float
    notes: list[str]
    examples: Examples | None = None
    prompts: Prompts | None = None

    def at(self, batch_size: int) -> list[Example]:
        """Returns the largest forward pass with this batch size."""
        if self.prompts is not None:  # a group of completions at most
            return self.largest
        if self.examples is None:
            return _largest_part(self.largest, batch_size, self.shape.token_limit)
        return largest_forward(self.examples, replace(self.shape, batch_size=batch_size))

    @property
    def most(self) -> int:
        """The largest possible batch size."""
        return MOST_EXAMPLES if self.examples is None else len(self.examples)


def read_batches(
    config: TrainConfig,
    shape: PretrainedConfig,
    accelerator: Accelerator,
    limit: int | None,
    nproc: int,
    labels: Labels | None,
) -> Batches:
    """Returns batches of the data, or without data, of examples with max_length tokens. Raises DataError.

    limit: tokens that go through the model at once on the planned device.
    """
    if "data" not in config.model_fields_set:
        run = with_numbers(config, None)
        batches = assumed_batches(run, shape, replace(step_shape(run, accelerator), token_limit=limit))
    else:
        data = read_data(config, load_tokenizer(config.model, labels), accelerator, labels)
        if data.prompts is None and not config.streaming:  # what suits small data depends on the number of processes
            run = with_numbers(config, data.prepared, nproc)
            data = replace(data, config=run, shape=replace(data.shape, batch_size=run.per_device_train_batch_size))
        step = replace(step_shape(data.config, accelerator), token_limit=limit)
        batches = batches_of(replace(data, shape=replace(data.shape, token_limit=limit)), step, nproc)
    if batches.task.reference is not None:
        batches.notes.append(
            "before the first step, the log-probabilities of all replies are computed once; the time excludes this"
        )
    return replace(batches, task=batches.task.without_reference())


def assumed_batches(config: RunConfig, shape: PretrainedConfig, step: StepShape) -> Batches:
    """Returns batches of examples with max_length tokens."""
    ids = np.arange(config.max_length, dtype=np.int32) % shape.get_text_config().vocab_size
    example, what = Example.of_text(ids), "example"
    task: Task = language_model_task(load_tokenizer(config.model)) if reads_images(shape) else CAUSAL_LM
    if learns_preferences(config):
        task = preference_task(config, FEEDBACK if config.loss == "kto" else PREFERENCE, config.model)
        example, what = Example.of_two(example, example, np.ones(1)), "reply with its prompt"
    note = (
        f"without --data, every {what} is assumed to have --max-length {config.max_length:,} tokens, all of them "
        "trained; shorter ones need less"
    )
    largest = _largest_part([example], step.batch_size, step.token_limit)
    return Batches(
        config, task, largest, step, config.max_steps, step.examples_per_step * len(example.input_ids), [note]
    )


def batches_of(data: TrainingData, step: StepShape, nproc: int) -> Batches:
    """Returns batches of data, or of completions. Of a stream only the first batch is known."""
    config = data.config
    if (prompts := data.prompts) is not None:
        per_epoch = steps_per_epoch(prompts.data.train.epoch_size, replace(step, world=nproc))
        steps = config.max_steps or math.ceil(config.num_train_epochs * per_epoch * config.num_iterations)
        tokens = step.examples_per_step * prompts.tokens_of_group
        notes = ["every completion is assumed to have --max-completion-length tokens"]
        return Batches(config, data.task, data.largest, step, steps, tokens, notes, prompts=prompts)
    if data.prepared is None or config.streaming:
        tokens = data.largest_tokens * config.gradient_accumulation_steps
        notes = ["the data is streamed, so lengths are estimated from the first batch"]
        return Batches(config, data.task, data.largest, step, data.max_steps, tokens, notes)
    train, task = data.prepared.train, data.task
    notes = [f"{name}: {text}" for name, text in warnings_of(data.prepared.report.to_dict()).items()]
    if isinstance(task, ImageTextToText) and (images := int(task.is_image(train.input_ids).sum())):
        notes.append(f"{images:,} of {len(train.input_ids):,} tokens of the training examples are images")
    steps = config.max_steps or epoch_steps(config, train.epoch_size, nproc)
    tokens_per_step = train.mean_length * min(step.examples_per_step, train.epoch_size / nproc)
    return Batches(config, task, data.largest, step, steps, tokens_per_step, notes, train)


def learns_preferences(config: TrainConfig) -> bool:
    """Whether the settings ask for preference training. With data, its rows decide."""
    return config.task == PREFERENCE or bool(config.changed(PREFERENCE_FIELDS))


def _largest_part(examples: list[Example], count: int, limit: int | None) -> list[Example]:
    """Returns the largest forward pass of a batch of `count` examples made by repeating these."""
    batch = [examples[index % len(examples)] for index in range(count)]
    passes = split_by_tokens([len(example.input_ids) for example in batch], limit)
    return [batch[index] for index in max(passes, key=len)]


def tokens_of(examples: list[Example]) -> int:
    return sum(len(example.input_ids) for example in examples)


def notes_of(run: PlannedRun, fake: estimate.FakeModel, *, is_measured: bool) -> list[str]:
    """Returns all notes, also on sampling, and on examples that do not go through the model at once."""
    batches, dequantized = run.batches, dequantization_note(run.shape, run.config.model)
    notes = [*([dequantized] if dequantized else []), *run.place.notes, *batches.notes, *fake.notes]
    if batches.prompts is not None:
        cache = format_bytes(batches.prompts.cache_bytes(run.shape, fake.base.dtype))
        notes.append(f"sampling needs a cache of {cache} between the steps")
        if is_measured:
            notes.append("the time excludes evaluations, which usually take longer than the steps")
    largest = batches.at(batches.most)
    if len(largest) < batches.most:
        passes = f"passes of at most {tokens_of(largest):,} tokens"
        notes.append(f"larger batches are split into {passes}, so they need little more memory than this one")
    return notes


# ---- Memory


def full_fine_tuning(run: PlannedRun, notes: list[str]) -> FullFineTuning | None:
    """Returns the plan of the same run with all weights trained.

    None if the run does so itself, if its weights cannot be trained, or with a note if its settings need an adapter.
    """
    config = run.config
    if config.method == FULL or stays_quantized(run.shape, config.model):
        return None
    settings = config.model_dump(exclude_unset=True, exclude=ADAPTER_SETTINGS)
    try:
        full = TrainConfig(**{**settings, "method": FULL, "learning_rate": FIRST_RATES[FULL]})
    except ConfigError:
        notes.append("full fine-tuning is not shown, because it does not support all of these settings")
        return None
    with estimate.fake_model(full, run.shape, run.place.device, run.batches.task) as fake:
        memory = run.memory_of(full, fake, estimate.largest_step(full, fake, run.batches.largest))
        parameters = fake.model.summary().trainable_parameters
    return FullFineTuning(parameters, memory, batch_size_that_fits(run.available, memory, run.batches))


AS_SET = "as set"


def checkpointing(run: PlannedRun, fake: estimate.FakeModel, step: estimate.StepCost) -> dict[str, Memory]:
    """Returns the memory with checkpointing, where the run allows it."""
    if not estimate.can_checkpoint(run.config):
        return {}
    cheaper = estimate.with_less_memory(step, fake, tokens_of(run.batches.largest), checkpointed=True)
    return {CHECKPOINTING: run.memory_of(run.config, fake, cheaper)}


def quantization(run: PlannedRun, fake: estimate.FakeModel, step: estimate.StepCost) -> dict[str, Memory]:
    """Returns the memory with a 4-bit base, without and with checkpointing, where the run allows it."""
    if not estimate.can_quantize(run.config, run.shape):
        return {}
    model, weights = estimate.fake_trainable(run.config.replaced(quantize="nf4"), run.shape, run.place.device)
    quantized = replace(fake, model=model, weights=weights)
    cheaper = estimate.with_less_memory(step, quantized, 0, checkpointed=False)
    memory = {QUANTIZATION: run.memory_of(run.config, quantized, cheaper)}
    for settings, both in checkpointing(run, quantized, step).items():
        memory[f"{QUANTIZATION} {settings}"] = both
    return memory


def option(run: PlannedRun, settings: str, memory: Memory) -> Option:
    """Returns the option with its longest example, up to the model's positions."""
    growth = (run.available - memory.total) / max(memory.growing, 1)
    longest = max(int(tokens_of(run.batches.largest) * (1 + growth)), 0)
    positions = getattr(run.shape.get_text_config(), "max_position_embeddings", None) or longest
    batch_size = batch_size_that_fits(run.available, memory, run.batches)
    return Option(settings, memory.total, batch_size, min(longest, positions))


def batch_size_that_fits(available: int, memory: Memory, batches: Batches) -> int:
    """Returns the largest batch that fits, 0 if not even one example does."""

    def needed(batch_size: int) -> int:
        tokens = tokens_of(batches.largest)
        return memory.total + memory.growing * (tokens_of(batches.at(batch_size)) - tokens) // tokens

    return bisect_right(range(1, batches.most + 1), available, key=needed)
