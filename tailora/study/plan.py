"""Plans a run without training: what would be trained, whether it fits into memory, how long it takes.

plan -> Plan          (study/plan_result.py)
  place_of            the device: one of this machine, or a graphics card by name
  read_batches        the batches: from the data, or examples of max_length tokens
  train.memory_estimate  the run's adapter and kernels on the model without weights -> memory, operations
  checkpointing, quantization   settings that need less memory
  full_fine_tuning    the same for full fine-tuning of this model
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
from tailora.study.model_layout import adapted_modules, trained_groups
from tailora.study.plan_result import FullFineTuning, Option, Plan, Ranks
from tailora.train import memory_estimate as estimate
from tailora.train.config import GRPO, PREFERENCE_FIELDS, TASK_TYPES, TrainConfig
from tailora.train.dataloader import TrainingData, epoch_steps, largest_forward, read_data, steps_per_epoch
from tailora.train.defaults import RunConfig, with_numbers
from tailora.train.image_text_to_text import ImageTextToText, language_model_task
from tailora.train.loss import CAUSAL_LM, Task
from tailora.train.measure_steps import measure_steps
from tailora.train.memory import available_bytes, format_bytes, used_bytes
from tailora.train.memory_estimate import CHECKPOINTING, QUANTIZATION, Memory
from tailora.train.model_loading import check_can_be_sharded, load_tokenizer, read_config, reads_images
from tailora.train.preference import preference_task
from tailora.train.quantize import dequantization_note, stays_quantized
from tailora.train.rollouts import Prompts
from tailora.train.setup import check_can_be_offloaded, find_labels, shape_of, start_accelerator
from tailora.train.step import StepShape, split_by_tokens, step_shape, token_limit
from tailora.train.trainable import trained_parts


def plan(
    config: TrainConfig,
    measure: bool = False,
    *,
    memory: int | None = None,
    nproc: int = 1,
    output_dir: Path | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Plans the run of `config`. Without data, it assumes examples of max_length tokens, all of them trained.

    config: its device may also be the name of a graphics card, such as "H100 80GB".
    measure: also run a few real steps, in a separate process.
    memory: limit in bytes; default: the free memory.
    nproc: number of processes of the run.
    output_dir: folder for report.json; nothing is written without it.

    Raises ConfigError, TargetError, DataError, FormatError; with `measure` any error of a run.
    """
    place = replace(place_of(config), shards=nproc if config.fsdp else 1)
    check_can_be_planned(config, place, nproc, measure=measure)
    in_one = {**WITHOUT_FSDP, "report_to": [], **({"device": "cpu"} if place.is_absent else {})}
    accelerator = start_accelerator(config.replaced(**in_one))
    is_shared = nproc > 1 and place.device == torch.device("cpu")
    available = (place.available if memory is None else memory) // (nproc if is_shared else 1)
    shape, labels = read_shape(config)
    if config.fsdp:
        check_can_be_sharded(shape, config.model, config.quantize)
    batches = read_batches(config, shape, accelerator, token_limit(place.device.type), nproc, labels)
    config = batches.config
    with estimate.fake_model(config, shape, place.device, batches.task) as fake:
        trained = what_is_trained(fake)
        step = estimate.largest_step(config, fake, batches.largest)
        needed = place.memory_of(config, fake, step)
        alternatives = {AS_SET: needed, **checkpointing(config, fake, step, batches, place)}
    alternatives |= quantization(config, shape, step, batches, place)
    dequantized = dequantization_note(shape, config.model)
    notes = [*([dequantized] if dequantized else []), *place.notes, *batches.notes, *fake.notes]
    if batches.prompts is not None:
        cache = format_bytes(batches.prompts.cache_bytes(shape, fake.base.dtype))
        notes.append(f"sampling needs a cache of {cache} between the steps")
        notes.append("the time excludes sampling and evaluations, which usually take longer than the steps")
    if is_shared:
        notes.append(f"the {nproc} processes share this machine's free memory equally")
    full = None
    if config.method != FULL and not stays_quantized(shape, config.model):
        full = full_fine_tuning(config, shape, batches, place, available)
        if full is None:
            notes.append("full fine-tuning is not shown, because it does not support all of these settings")
    notes += split_note(batches)

    basis = {
        "memory": f"estimated from the shapes, plus {place.process_basis}",
        "time": "not estimated, because this machine does not have the device",
    }
    seconds_per_step: float | None = None
    measured = None
    if measure:
        log("measuring a few real steps")
        measured = measure_steps(config, with_data="data" in config.model_fields_set)
        needed, trained["kernels"] = needed.with_total(measured.peak_bytes), measured.kernels
        seconds_per_step = measured.seconds_per_token * batches.tokens_per_step
        basis = dict.fromkeys(basis, f"measured in {measured.steps} steps")
    elif isinstance(place.device, torch.device):
        seconds_per_step, basis["time"] = time_here(shape, batches, step, fake.base.dtype, place.device)

    batch_size, steps = batch_size_that_fits(available, needed, batches), batches.steps
    can_shard = nproc > 1 and not config.fsdp
    result = Plan(
        model=config.model,
        method=config.method,
        device=place.name,
        **trained,
        memory=needed,
        available_bytes=available,
        batch_size=config.per_device_train_batch_size,
        batch_size_that_fits=batch_size,
        options=[option(settings, memory, batches, shape, available) for settings, memory in alternatives.items()],
        remedies=estimate.remedies(config, shape, batch_size, place.device, can_shard=can_shard)
        if needed.total > available
        else [],
        largest_forward={"examples": len(batches.largest), "tokens": tokens_of(batches.largest)},
        examples=None if batches.examples is None else len(batches.examples),
        tokens=None if steps is None else round(nproc * batches.tokens_per_step * steps),
        steps=steps,
        seconds_per_step=seconds_per_step,
        seconds=None if steps is None or seconds_per_step is None else seconds_per_step * steps,
        basis=basis,
        full=full,
        measured=measured,
        ranks=Ranks(nproc, config.fsdp) if nproc > 1 else None,
        notes=notes,
        settings=config.model_dump(mode="json", exclude_unset=True),
    )
    if output_dir is not None:
        write_report(output_dir, "plan", result.to_dict())
    return result


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
    check_can_be_offloaded(config, place.device.type)
    if config.fsdp and nproc == 1:
        raise ConfigError("--fsdp shards the base model across processes; set their number with --nproc")
    if not measure:
        return
    if place.is_absent:
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
    layers: dict[str, Any] = {}
    if isinstance(model, LoRAModel):
        layers = {"modules": adapted_modules(model), "groups": trained_groups(model)}
    return {
        "dtype": str(fake.base.dtype).removeprefix("torch."),
        "kernels": fake.kernels.description,
        "trainable_parameters": summary.trainable_parameters,
        "total_parameters": summary.total_parameters,
        "parts": trained_parts(model),
        **layers,
    }


# ---- The device


@dataclass(frozen=True)
class Place:
    """The device of a run: one of this machine, or a graphics card by name."""

    name: str
    device: torch.device | estimate.AbsentDevice
    process: int  # bytes that a process uses before it loads the model
    process_basis: str  # where that number comes from
    available: int  # bytes that a run may use
    notes: list[str] = field(default_factory=list)
    shards: int = 1  # number of ranks that the base is sharded over

    @property
    def is_absent(self) -> bool:
        return isinstance(self.device, estimate.AbsentDevice)

    def memory_of(self, config: TrainConfig, fake: estimate.FakeModel, step: estimate.StepCost) -> Memory:
        return estimate.estimate_memory(config, fake, step, self.process, self.shards)


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
    return Place(str(device), device, process, "the current memory of this process", available)


def place_of_card(config: TrainConfig, cards: list[Card]) -> Place:
    """Returns the first card as a place, with a note about the others."""
    card, others = cards[0], [card.name for card in cards[1:]]
    notes = [f"not measured on a {card.name}; actual memory may be a few percent higher"]
    if others:
        notes.append(f"assuming {card.name}; similar names: {', '.join(others[:5])}")
    auto = torch.bfloat16 if card.has_bfloat16 else torch.float16
    precision = auto if config.dtype == "auto" else getattr(torch, config.dtype)
    basis = f"{format_bytes(CONTEXT)} for the card's context"
    absent = estimate.AbsentDevice(card.device, precision)
    return Place(card.name, absent, CONTEXT, basis, card.available_bytes, notes)


# ---- Time


def time_here(
    shape: PretrainedConfig, batches: "Batches", step: estimate.StepCost, dtype: torch.dtype, device: torch.device
) -> tuple[float, str]:
    """Returns the seconds per step, from the speed of matrix products on this device, and a description of the rule."""
    text, tokens = shape.get_text_config(), tokens_of(batches.largest)
    width, inner = text.hidden_size, getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    speed = estimate.SHARE * estimate.products_per_second(tokens, width, inner, dtype, device)  # operations per second
    rule = f"a rough estimate: {step.flops / tokens / 1e9:.2g} GFLOP per token at {speed / 1e9:,.0f} GFLOP/s"
    return step.flops / tokens / speed * batches.tokens_per_step, rule


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
    nproc: int = 1,
    labels: Labels | None = None,
) -> Batches:
    """Returns batches of the data, or without data, of examples with max_length tokens.

    limit: tokens that go through the model at once on the planned device.
    nproc: number of ranks.
    labels: the classes of the model.

    Raises DataError with all problems of the data.
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


def split_note(batches: Batches) -> list[str]:
    """Returns a note if not all examples go through the model at once."""
    largest = batches.at(batches.most)
    if len(largest) == batches.most:
        return []
    tokens = f"{tokens_of(largest):,} tokens"
    return [f"larger batches are split into passes of at most {tokens}, so they need little more memory than this one"]


# ---- Memory


def full_fine_tuning(
    config: TrainConfig, shape: PretrainedConfig, batches: Batches, place: Place, available: int
) -> FullFineTuning | None:
    """Returns the plan of the same run with all weights trained (without offloading, which needs frozen weights).

    None if the run has settings that need an adapter.
    """
    settings = config.model_dump(exclude_unset=True, exclude={*ADAPTER_SETTINGS, "fsdp_offload_params"})
    try:
        full = TrainConfig(**{**settings, "method": FULL, "learning_rate": FIRST_RATES[FULL]})
    except ConfigError:
        return None
    with estimate.fake_model(full, shape, place.device, batches.task) as fake:
        memory = place.memory_of(full, fake, estimate.largest_step(full, fake, batches.largest))
        parameters = fake.model.summary().trainable_parameters
    return FullFineTuning(parameters, memory, batch_size_that_fits(available, memory, batches))


WITHOUT_FSDP = {"fsdp": False, "fsdp_offload_params": False}
AS_SET = "as set"


def checkpointing(
    config: TrainConfig, fake: estimate.FakeModel, step: estimate.StepCost, batches: Batches, place: Place
) -> dict[str, Memory]:
    """Returns the memory with checkpointing, where the run allows it."""
    if not estimate.can_checkpoint(config):
        return {}
    cheaper = estimate.with_less_memory(step, fake, tokens_of(batches.largest), checkpointed=True)
    return {CHECKPOINTING: place.memory_of(config, fake, cheaper)}


def quantization(
    config: TrainConfig, shape: PretrainedConfig, step: estimate.StepCost, batches: Batches, place: Place
) -> dict[str, Memory]:
    """Returns the memory with a 4-bit base, without and with checkpointing, where the run allows it."""
    if not estimate.can_quantize(config, shape):
        return {}
    with estimate.fake_model(config.replaced(quantize="nf4"), shape, place.device, batches.task) as fake:
        cheaper = estimate.with_less_memory(step, fake, 0, checkpointed=False)
        memory = {QUANTIZATION: place.memory_of(config, fake, cheaper)}
        for settings, both in checkpointing(config, fake, step, batches, place).items():
            memory[f"{QUANTIZATION} {settings}"] = both
    return memory


def option(settings: str, memory: Memory, batches: Batches, shape: PretrainedConfig, available: int) -> Option:
    """Returns the option with its longest example: activations grow with its tokens, up to the model's positions."""
    growth = (available - memory.total) / max(memory.activations, 1)
    longest = max(int(tokens_of(batches.largest) * (1 + growth)), 0)
    positions = getattr(shape.get_text_config(), "max_position_embeddings", None) or longest
    batch_size = batch_size_that_fits(available, memory, batches)
    return Option(settings, memory.total, batch_size, min(longest, positions))


def batch_size_that_fits(available: int, memory: Memory, batches: Batches) -> int:
    """Returns the largest batch that fits, 0 if not even one example does. Activations grow with the tokens."""

    def needed(batch_size: int) -> int:
        tokens = tokens_of(batches.largest)
        return memory.total + memory.activations * (tokens_of(batches.at(batch_size)) - tokens) // tokens

    return bisect_right(range(1, batches.most + 1), available, key=needed)
