"""Plans a run before any training: what would be trained, whether it fits into memory, how long it takes.

plan
  read_batches        what the steps read: the data, or examples of max_length tokens
  fake_model          the run's own adapter and kernels on the model without weights -> memory, operations
  trained_groups      what is trained, in groups of like layers; unadapted_groups: what is not, and why
  full_fine_tuning    the same for full fine-tuning of this model
  options             settings that take less memory, and what they leave room for
  study.cards         the time of a step on a card that is not here
  measure_steps       with `measure`: a few real steps in a separate process -> measured memory and time
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from transformers import PretrainedConfig

from tailora.core.adapter import layer_key
from tailora.core.device import choose_device
from tailora.core.layer import LoRALayer
from tailora.core.layer_types import layer_path_of, layer_type_of
from tailora.core.patterns import layer_index
from tailora.core.targets import selected_candidates
from tailora.data.dataset import Example, warnings_of
from tailora.data.labels import Labels
from tailora.data.schemas import FEEDBACK, PREFERENCE
from tailora.errors import ConfigError
from tailora.formats.run_folder import write_report
from tailora.kernels.compiled_layers import obstacle_to_compiling
from tailora.model import LoRAModel
from tailora.study.cards import CONTEXT, LONGEST_NAME, Card, StepTime, find_cards, step_time
from tailora.study.config import FIRST_RATES, FULL, OF_ADAPTERS
from tailora.train import estimate
from tailora.train.config import TASK_TYPES, TrainConfig
from tailora.train.dataloader import epoch_steps, largest_forward, read_data, split_by_tokens, step_shape, token_limit
from tailora.train.estimate import Memory
from tailora.train.kernel_choice import asks_for_compiled_layers
from tailora.train.loss import CAUSAL_LM, Task
from tailora.train.memory import ACTIVATION_MEMORY, available_bytes, format_bytes, used_bytes
from tailora.train.model_loading import check_can_be_sharded, load_tokenizer, read_config, set_labels
from tailora.train.preference import preference_task
from tailora.train.setup import check_can_be_offloaded, find_labels, start_accelerator
from tailora.train.subprocess_worker import StepsMeasured, measure_steps

# ---- The plan


@dataclass(frozen=True)
class AdaptedModule:
    """A layer with a low-rank update. kind: its layer type."""

    path: str
    kind: str
    in_features: int
    out_features: int
    r: int
    alpha: float
    parameters: int


@dataclass(frozen=True)
class TrainedGroup:
    """Like layers: in `path` a range stands for the number that tells them apart, layers.{0-29}.

    shape: (in, out); the parameter's shape if it is trained in full; then r and alpha are None.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    r: int | None
    alpha: float | None
    count: int
    parameters: int


@dataclass(frozen=True)
class UnadaptedGroup:
    """Like layers that stay as they are. parameters: of all of them; 0 for those tied to another weight."""

    path: str
    kind: str
    count: int
    parameters: int
    reason: str


@dataclass(frozen=True)
class FullFineTuning:
    """Full fine-tuning of the same model on the same batches, unquantised. Always estimated."""

    trainable_parameters: int
    memory: Memory
    batch_size_that_fits: int


@dataclass(frozen=True)
class Option:
    """What other settings would take, reckoned from the step of the plan.

    batch_size, tokens: the largest batch that fits, and the longest example in a batch of its own; 0 for none.
    """

    settings: str
    memory: int
    batch_size: int
    tokens: int


@dataclass(frozen=True)
class Ranks:
    """Several processes that train together, a device each.

    fsdp: whether FSDP2 shards the base over them.    sent_bytes: that each sends in a step, and about as many it gets.
    """

    count: int
    fsdp: bool
    sent_bytes: int


@dataclass(frozen=True)
class Plan:
    """What a run with these settings would be. Memory in bytes, time in seconds.

    full: None where the run itself is full fine-tuning.    available_bytes: what it may take.
    batch_size_that_fits: 0 where not even one example does.    largest_forward: examples, tokens.
    tokens, seconds: of all steps, None where their number is not known.    basis: how memory and time were found.
    remedies: settings that take less memory, if the run does not fit.    examples: to train on, if they are known.
    card, step_time: of a card that is not here; the time is that of the largest forward and its backward.
    ranks: None for one process; of several, memory and time are those of one of them.
    """

    model: str
    method: str
    dtype: str
    device: str
    trainable_parameters: int
    total_parameters: int
    modules: list[AdaptedModule]
    groups: list[TrainedGroup]
    left: list[UnadaptedGroup]
    memory: Memory
    full: FullFineTuning | None
    available_bytes: int
    batch_size: int
    batch_size_that_fits: int
    largest_forward: dict[str, int]
    kernels: str
    tokens: int | None
    steps: int | None
    seconds_per_step: float
    seconds: float | None
    measured: StepsMeasured | None
    basis: dict[str, str]
    notes: list[str] = field(default_factory=list)
    remedies: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    examples: int | None = None
    options: list[Option] = field(default_factory=list)
    card: Card | None = None
    step_time: StepTime | None = None
    ranks: Ranks | None = None

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.available_bytes

    def to_dict(self) -> dict[str, Any]:
        full = None if self.full is None else {**asdict(self.full), "memory": self.full.memory.to_dict()}
        reasons = {group.path: group.reason for group in self.left}
        return {**asdict(self), "memory": self.memory.to_dict(), "full": full, "left_alone": reasons, "fits": self.fits}


def plan(
    config: TrainConfig,
    measure: bool = False,
    *,
    memory: int | None = None,
    nproc: int = 1,
    output_dir: Path | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Plans the run of `config`. If that names no data, every example has max_length tokens, all learned.

    config: its device may also be the name of a card that is not here, such as "H100 80GB".
    measure: also take a few real steps, in a separate process.    memory: bytes to fit into; by default what is free.
    nproc: processes that train together.
    output_dir: folder for report.json; nothing is written without it.

    Raises ConfigError, TargetError, DataError, FormatError; with `measure` whatever a run raises.
    """
    place = replace(place_of(config), shards=nproc if config.fsdp else 1)
    check_can_be_offloaded(config, place.device.type)
    in_one = {**WITHOUT_FSDP, "report_to": [], **({"device": "cpu"} if place.card else {})}
    accelerator = start_accelerator(config.replaced(**in_one))
    if measure:
        check_can_be_measured(config, place, nproc)
    available = place.available if memory is None else memory
    if config.fsdp and nproc == 1:
        raise ConfigError("--fsdp shards the base model over several processes: give their number, --nproc")
    if is_shared := nproc > 1 and place.device == torch.device("cpu"):
        available //= nproc
    shape, labels = read_config(config.model), None
    if config.task in TASK_TYPES:
        if "data" not in config.model_fields_set:
            raise ConfigError(f"--task {config.task} learns the labels that the data has: give --data")
        labels, _ = find_labels(config)
        set_labels(shape, cast(Labels, labels), load_tokenizer(config.model))
    if config.fsdp:
        check_can_be_sharded(shape, config.model, config.quantize)
    batches = read_batches(config, shape, accelerator, token_limit(place.device.type), nproc, labels)
    with estimate.fake_model(config, shape, place.device) as fake:
        summary, dtype, kernels = fake.model.summary(), fake.base.dtype, fake.kernels.description
        lora = fake.model if isinstance(fake.model, LoRAModel) else None
        modules = adapted_modules(lora) if lora else []
        groups = trained_groups(lora) if lora else []
        left = unadapted_groups(lora) if lora else []
        step = largest_step(config, fake, batches, place)
        notes = [*place.notes, *batches.notes, *fake.notes]
        if asks_for_compiled_layers(config):
            step = estimate.with_compiled_layers(step, fake, config.activation_memory)
            notes.append("what compiled layers keep is reckoned from one measurement, not simulated")
        needed = estimate.estimate_memory(config, fake, step, place.process, place.shards)
        ranks = ranks_of(config, fake, batches, nproc)
        if is_shared:
            notes.append(f"each of the {nproc} processes may take an equal share of the memory that is free here")
        alternatives = {
            AS_SET: needed,
            **compiled_layers(config, fake, step, place),
            **checkpointing(config, fake, step, batches, place),
        }
    alternatives |= quantization(config, shape, step, batches, place)
    full = None if config.method == FULL else full_fine_tuning(config, shape, batches, place, available)

    time = None
    if isinstance(place.device, torch.device):
        seconds_per_step, time_basis = time_here(shape, batches, step, dtype, place.device)
    elif place.card:
        time = step_time(place.card, step.operators)
        seconds_per_step, time_basis = time_on_card(time, config, batches)
    basis = {"memory": f"estimated from the shapes, and {place.process_basis}", "time": time_basis}
    measured = None
    if measure:
        log("a few real steps are measured")
        measured = measure_steps(config, with_data="data" in config.model_fields_set)
        needed, kernels = needed.with_total(measured.peak_bytes), measured.kernels
        seconds_per_step = measured.seconds_per_token * batches.tokens_per_step
        basis = dict.fromkeys(basis, f"measured in {measured.steps} steps")

    largest = batches.at(batches.most)
    if len(largest) < batches.most:
        notes.append(
            f"a larger batch is split: with any batch size, at most {tokens_of(largest):,} tokens go through the model "
            "at once, so it needs little more memory than this one"
        )
    batch_size = batch_size_that_fits(available, needed, batches)
    result = Plan(
        model=config.model,
        method=config.method,
        dtype=str(dtype).removeprefix("torch."),
        device=place.name,
        trainable_parameters=summary.trainable_parameters,
        total_parameters=summary.total_parameters,
        modules=modules,
        groups=groups,
        left=left,
        memory=needed,
        full=full,
        available_bytes=available,
        batch_size=config.per_device_train_batch_size,
        batch_size_that_fits=batch_size,
        largest_forward={"examples": len(batches.largest), "tokens": tokens_of(batches.largest)},
        kernels=kernels,
        tokens=batches.tokens,
        steps=batches.steps,
        seconds_per_step=seconds_per_step,
        seconds=None if batches.steps is None else seconds_per_step * batches.steps,
        measured=measured,
        basis=basis,
        notes=notes,
        remedies=remedies(config, batch_size, ACTIVATIONS in alternatives, can_shard=nproc > 1 and not config.fsdp)
        if needed.total > available
        else [],
        settings=config.model_dump(mode="json", exclude_unset=True),
        examples=batches.examples,
        options=[option(settings, memory, batches, shape, available) for settings, memory in alternatives.items()],
        card=place.card,
        step_time=time,
        ranks=ranks,
    )
    if output_dir is not None:
        write_report(output_dir, "plan", result.to_dict())
    return result


def check_can_be_measured(config: TrainConfig, place: "Place", nproc: int) -> None:
    """Raises ConfigError if no real steps of the run can be taken here."""
    if place.card:
        raise ConfigError(f"--measure takes real steps, and there is no {place.name} here: leave one of the two out")
    if learns_preferences(config) and "data" not in config.model_fields_set:
        raise ConfigError("--measure takes real steps, which for preferences need rows: give --data")
    if nproc > 1:
        raise ConfigError(
            f"--measure takes real steps in one process, and --nproc {nproc} asks for several: leave one of them out"
        )


# ---- Where it would run


@dataclass(frozen=True)
class Place:
    """The device of a run: one of this machine, or a card that is not here.

    available: bytes that a run may take.
    process: bytes that its process holds before its model is loaded, and process_basis how they are known.
    shards: ranks that the base is sharded over.
    """

    name: str
    device: torch.device | estimate.AbsentDevice
    process: int
    process_basis: str
    available: int
    card: Card | None = None
    notes: list[str] = field(default_factory=list)
    shards: int = 1


def place_of(config: TrainConfig) -> Place:
    """Returns the device that the settings name. Raises ConfigError if no device here and no card has this name."""
    name = config.device[:LONGEST_NAME]
    try:
        device = choose_device(name)
    except ConfigError as error:
        try:
            return place_of_card(config, find_cards(name))
        except ConfigError as unknown:
            raise ConfigError(f"{error}; and {unknown}") from unknown
    process = used_bytes(device)
    basis = "what this process holds now"
    return Place(str(device), device, process, basis, available_bytes(device) + process)


def place_of_card(config: TrainConfig, cards: list[Card]) -> Place:
    """Returns the first of the cards as a place, with a note on the others."""
    card, others = cards[0], [card.name for card in cards[1:]]
    notes = [
        f"reckoned from the data sheet of {card}, never measured on a card: real memory may be some percent more, real "
        "time a multiple"
    ]
    if others:
        more = f" and {len(others) - 4} more" if len(others) > 5 else ""
        notes.append(f"{card.name} is meant; of similar names there are {', '.join(others[: 4 if more else 5])}{more}")
    auto = torch.bfloat16 if card.has_bfloat16 else torch.float16
    precision = auto if config.dtype == "auto" else getattr(torch, config.dtype)
    basis = f"{format_bytes(CONTEXT)} for the card's context"
    absent = estimate.AbsentDevice(card.device, precision)
    return Place(card.name, absent, CONTEXT, basis, card.available_bytes, card, notes)


# ---- Time


def time_here(
    shape: PretrainedConfig, batches: "Batches", step: estimate.StepCost, dtype: torch.dtype, device: torch.device
) -> tuple[float, str]:
    """Returns seconds of a step by the speed of products on a device of this machine, and how they were found."""
    text, tokens = shape.get_text_config(), tokens_of(batches.largest)
    width, inner = text.hidden_size, getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    speed = estimate.SHARE * estimate.products_per_second(tokens, width, inner, dtype, device)  # operations a second
    rule = f"a rough rule: {step.flops / tokens / 1e9:.2g} GFLOP a token at {speed / 1e9:,.0f} GFLOP/s"
    return step.flops / tokens / speed * batches.tokens_per_step, rule


def time_on_card(time: StepTime, config: TrainConfig, batches: "Batches") -> tuple[float, str]:
    """Returns seconds of a step from the roofline time of the largest forward, and how they were found."""
    share = batches.tokens_per_step / tokens_of(batches.largest)  # of the largest forward's work
    forwards = max(config.gradient_accumulation_steps, share)
    # the host starts kernels while the card computes, so the longer one counts
    work, launches = (time.products + time.memory) * share, time.launches * forwards
    bound = "starting kernels, one by one from Python" if launches > work else "the card's work"
    return max(work, launches), f"reckoned from the data sheet, never measured on a card; bound by {bound}"


# ---- What the steps read

MOST_EXAMPLES = 4096  # of a batch, where the data does not say how many there are


@dataclass(frozen=True, eq=False)
class Batches:
    """task: what is learned, without what it compares with.
    largest: the examples of the largest forward.    at: batch size -> its largest forward.
    examples: all that are trained on.    tokens: of all steps. examples, tokens, steps: None where they are not known.
    tokens_per_step: of one rank.
    """

    task: Task
    largest: list[Example]
    at: Callable[[int], list[Example]]
    examples: int | None
    tokens: int | None
    steps: int | None
    tokens_per_step: float
    notes: list[str]

    @property
    def most(self) -> int:
        """Examples that a batch can have."""
        return MOST_EXAMPLES if self.examples is None else self.examples


def read_batches(
    config: TrainConfig,
    shape: PretrainedConfig,
    accelerator: Accelerator,
    limit: int | None,
    nproc: int = 1,
    labels: Labels | None = None,
) -> Batches:
    """Without data, of examples of max_length tokens. Raises DataError with all that is wrong with the data.

    limit: tokens that go through the model at once on the device of the plan.    nproc: ranks that share a step.
    labels: that the model would predict.
    """
    step = replace(step_shape(config, accelerator), token_limit=limit)
    vocabulary = shape.get_text_config().vocab_size
    if "data" not in config.model_fields_set:
        ids = np.arange(config.max_length, dtype=np.int32) % vocabulary
        example, what = Example.of_text(ids), "example"
        task: Task = CAUSAL_LM
        if learns_preferences(config):
            task = preference_task(config, FEEDBACK if config.loss == "kto" else PREFERENCE, config.model)
            what = "reply with its prompt"
            example = Example.of_two(example, example, np.ones(1))
        tokens_per_step = float(step.examples_per_step * len(example.input_ids))
        return Batches(
            task=task.without_reference(),
            largest=_largest_part([example], step.batch_size, step.token_limit),
            at=lambda count: _largest_part([example], count, step.token_limit),
            examples=None,
            tokens=None if config.max_steps is None else round(nproc * tokens_per_step * config.max_steps),
            steps=config.max_steps,
            tokens_per_step=tokens_per_step,
            notes=[
                f"without --data every {what} is taken to have --max-length {config.max_length:,} tokens, all of "
                "them learned: shorter ones take less",
                *notes_on(task),
            ],
        )
    data = read_data(config, vocabulary, load_tokenizer(config.model), accelerator, labels)
    data = replace(data, shape=replace(data.shape, token_limit=limit))
    if data.prepared is None or config.streaming:
        return Batches(
            task=data.task.without_reference(),
            largest=data.largest,
            at=lambda count: _largest_part(data.largest, count, step.token_limit),
            examples=None,
            tokens=None,
            steps=data.max_steps,
            tokens_per_step=float(data.largest_size.tokens * config.gradient_accumulation_steps),
            notes=["the data is streamed: lengths are those of its first batch"],
        )
    train = data.prepared.train
    steps = config.max_steps or epoch_steps(config, train.epoch_size, nproc)
    per_rank = min(step.examples_per_step, train.epoch_size / nproc)  # examples
    tokens_per_step = train.mean_length * per_rank
    return Batches(
        task=data.task.without_reference(),
        largest=data.largest,
        at=lambda count: largest_forward(train, replace(step, batch_size=count)),
        examples=len(train),
        tokens=round(nproc * tokens_per_step * steps),
        steps=steps,
        tokens_per_step=tokens_per_step,
        notes=[
            *(f"{name}: {text}" for name, text in warnings_of(data.prepared.report.to_dict()).items()),
            *notes_on(data.task),
        ],
    )


def learns_preferences(config: TrainConfig) -> bool:
    """Whether the settings say so; with data, the rows do."""
    return config.task == PREFERENCE or bool(config.preference_settings())


def notes_on(task: Task) -> list[str]:
    if task.reference is None:
        return []
    return ["before the first step the log-probabilities of all replies are computed once; this time is not counted"]


def _largest_part(examples: list[Example], count: int, limit: int | None) -> list[Example]:
    """Of a batch of `count` examples, which repeats these, what goes through the model in one forward."""
    batch = [examples[index % len(examples)] for index in range(count)]
    return [
        batch[index] for index in max(split_by_tokens([len(example.input_ids) for example in batch], limit), key=len)
    ]


def tokens_of(examples: list[Example]) -> int:
    return sum(len(example.input_ids) for example in examples)


# ---- Memory


def ranks_of(config: TrainConfig, fake: estimate.FakeModel, batches: Batches, nproc: int) -> Ranks | None:
    """Returns None for one process. A step has as many forwards as its tokens make of the largest one."""
    if nproc == 1:
        return None
    forwards = max(batches.tokens_per_step / tokens_of(batches.largest), 1.0)
    gathers = 2 if config.fsdp_reshard_after_forward else 1
    sent = estimate.sent_bytes(fake, nproc, forwards, sharded=config.fsdp, gathers=gathers)
    return Ranks(nproc, config.fsdp, sent)


def largest_step(config: TrainConfig, fake: estimate.FakeModel, batches: Batches, place: Place) -> estimate.StepCost:
    """Returns what the largest forward of the run costs, simulated."""
    return estimate.simulate_step(
        replace(fake, layout=replace(fake.layout, task=batches.task)),
        batches.largest,
        checkpointed=config.gradient_checkpointing,
        sharded=place.shards > 1,
        reshard=config.fsdp_reshard_after_forward,
    )


def full_fine_tuning(
    config: TrainConfig,
    shape: PretrainedConfig,
    batches: Batches,
    place: Place,
    available: int,
) -> FullFineTuning:
    """The same run with all weights trained, and so without offloading, which is for frozen ones."""
    settings = config.model_dump(exclude_unset=True, exclude={*OF_ADAPTERS, "fsdp_offload_params"})
    full = TrainConfig(**{**settings, "method": FULL, "learning_rate": FIRST_RATES[FULL]})
    with estimate.fake_model(full, shape, place.device) as fake:
        step = largest_step(full, fake, batches, place)
        memory = estimate.estimate_memory(full, fake, step, place.process, place.shards)
        parameters = fake.model.summary().trainable_parameters
    return FullFineTuning(parameters, memory, batch_size_that_fits(available, memory, batches))


WITHOUT_FSDP = {"fsdp": False, "fsdp_reshard_after_forward": True, "fsdp_offload_params": False}
AS_SET = "as set"
ACTIVATIONS = f"--activation-memory {ACTIVATION_MEMORY}"
CHECKPOINTING, QUANTIZATION = "--gradient-checkpointing", "--quantize nf4"


def compiled_layers(
    config: TrainConfig, fake: estimate.FakeModel, step: estimate.StepCost, place: Place
) -> dict[str, Memory]:
    """Returns the memory with compiled layers that keep less, unless the run excludes them or has them already."""
    excluded = config.fast == "off" or config.gradient_checkpointing or asks_for_compiled_layers(config)
    device = place.device
    if excluded or (isinstance(device, torch.device) and obstacle_to_compiling(fake.base, device)):
        return {}
    cheaper = estimate.with_compiled_layers(step, fake, ACTIVATION_MEMORY)
    return {ACTIVATIONS: estimate.estimate_memory(config, fake, cheaper, place.process, place.shards)}


def checkpointing(
    config: TrainConfig, fake: estimate.FakeModel, step: estimate.StepCost, batches: Batches, place: Place
) -> dict[str, Memory]:
    """Returns the memory with checkpointing, unless the run has it already or compiled layers exclude it."""
    if config.gradient_checkpointing or asks_for_compiled_layers(config):
        return {}
    cheaper = estimate.with_less_memory(step, fake, tokens_of(batches.largest), checkpointed=True)
    return {CHECKPOINTING: estimate.estimate_memory(config, fake, cheaper, place.process, place.shards)}


def quantization(
    config: TrainConfig, shape: PretrainedConfig, step: estimate.StepCost, batches: Batches, place: Place
) -> dict[str, Memory]:
    """Returns the memory with a base in 4 bits, without and with checkpointing, unless the run excludes it."""
    is_quantized = config.quantize or getattr(shape, "quantization_config", None) is not None
    if config.method == FULL or is_quantized or config.fsdp_offload_params:
        return {}
    with estimate.fake_model(config.replaced(quantize="nf4"), shape, place.device) as fake:
        cheaper = estimate.with_less_memory(step, fake, 0, checkpointed=False)
        memory = estimate.estimate_memory(config, fake, cheaper, place.process, place.shards)
        both = checkpointing(config, fake, step, batches, place)
    return {QUANTIZATION: memory, **{f"{QUANTIZATION} {settings}": less for settings, less in both.items()}}


def option(settings: str, memory: Memory, batches: Batches, shape: PretrainedConfig, available: int) -> Option:
    """The longest example: activations grow with its tokens, and the model has so many positions."""
    growth = (available - memory.total) / max(memory.activations, 1)
    longest = max(int(tokens_of(batches.largest) * (1 + growth)), 0)
    positions = getattr(shape.get_text_config(), "max_position_embeddings", None) or longest
    batch_size = batch_size_that_fits(available, memory, batches)
    return Option(settings, memory.total, batch_size, min(longest, positions))


def batch_size_that_fits(available: int, memory: Memory, batches: Batches) -> int:
    """The largest batch that fits; 0 when not even one example does. Activations grow with a forward's tokens."""

    def fits(batch_size: int) -> bool:
        growth = tokens_of(batches.at(batch_size)) / tokens_of(batches.largest) - 1
        return memory.total + memory.activations * growth <= available

    low, high = 0, 1
    while high <= batches.most and fits(high):
        low, high = high, high * 2
    high = min(high, batches.most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def remedies(config: TrainConfig, batch_size: int, can_compile: bool, *, can_shard: bool = False) -> list[str]:
    """Returns settings that take less memory. batch_size: the largest that fits, 0 for none."""
    examples = config.per_device_train_batch_size * config.gradient_accumulation_steps
    accumulation = -(-examples // max(batch_size, 1))
    options = [
        (
            batch_size > 0,
            f"--per-device-train-batch-size {batch_size} --gradient-accumulation-steps {accumulation}",
        ),
        (can_shard, "--fsdp"),
        (can_compile, ACTIVATIONS),
        (not (config.gradient_checkpointing or asks_for_compiled_layers(config)), CHECKPOINTING),
        (config.method == FULL, "--method lora"),
        (config.method != FULL and not config.quantize, "--quantize nf4"),
        (config.max_length > 128, f"--max-length {config.max_length // 2}"),
    ]
    return [*(text for helps, text in options if helps), "a smaller --model"]


# ---- What is trained, and what is not


def adapted_modules(model: LoRAModel) -> list[AdaptedModule]:
    """In the model's order."""
    modules = []
    for row in model.summary().rows:
        if row.r is not None:
            layer = cast(LoRALayer, model.lora_layers[layer_key(row.path)])
            sizes = layer.in_features, layer.out_features
            modules.append(AdaptedModule(row.path, row.layer_type, *sizes, layer.r, layer.lora_alpha, row.parameters))
    return modules


def trained_groups(model: LoRAModel) -> list[TrainedGroup]:
    groups: dict[tuple[Any, ...], list[tuple[str, int]]] = defaultdict(list)
    shapes = {module.path: (module.in_features, module.out_features) for module in adapted_modules(model)}
    for row in model.summary().rows:
        shape = row.shape if row.r is None else shapes[row.path]
        key = (without_layer(row.path), row.layer_type, shape, row.r, row.lora_alpha)
        groups[key].append((row.path, row.parameters))
    return [
        TrainedGroup(with_layer_range(paths), kind, shape, r, alpha, len(paths), sum(counts))
        for (_, kind, shape, r, alpha), members in groups.items()
        for paths, counts in [zip(*members, strict=True)]
    ]


def unadapted_groups(model: LoRAModel) -> list[UnadaptedGroup]:
    """Groups the modules with weights that the active adapter neither adapts nor trains."""
    base, config = model.base_model, model.adapters[model.active_adapters[0]]
    modules = dict(base.named_modules())
    paths = [row.path for row in model.summary().rows]
    trained = {*paths, *(layer_path_of(base, path) for path in paths)}
    get_head = getattr(base, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    excluded = set(selected_candidates(base, modules, config.replaced(exclude_modules=None)))
    in_other_layers = set(
        selected_candidates(base, modules, config.replaced(layers_to_transform=None, layers_pattern=None))
    )
    groups: dict[tuple[str, str, str], list[tuple[str, int]]] = defaultdict(list)
    seen: set[int] = set()
    for path, module in modules.items():
        parameters = list(module.parameters(recurse=False))
        if not parameters or any(path == other or path.startswith(f"{other}.") for other in trained):
            continue
        layer_type = layer_type_of(module)
        if layer_type is None:
            reason = "no low-rank form: not a matrix"
        elif path in excluded:
            reason = "exclude_modules leaves it out"
        elif path in in_other_layers:
            reason = "its layer is not in layers_to_transform"
        elif config.target_modules != "all-linear":
            reason = "not among target_modules"
        elif module is head:
            reason = "the output head, which all-linear leaves out: name it to adapt it"
        else:
            reason = "not among target_modules" if layer_type.is_linear else "not linear: name it to adapt it"
        count = sum(parameter.numel() for parameter in parameters if id(parameter) not in seen)
        seen |= {id(parameter) for parameter in parameters}
        name = type(module).__name__.removeprefix("Thawing")
        groups[without_layer(path), name, reason + ("" if count else "; tied to another weight")].append((path, count))
    return [
        UnadaptedGroup(with_layer_range(paths), name, len(paths), sum(counts), reason)
        for (_, name, reason), members in groups.items()
        for paths, counts in [zip(*members, strict=True)]
    ]


def without_layer(path: str) -> str:
    """The path with * for its first number, so that like layers have the same."""
    names = path.split(".")
    index = next((index for index, name in enumerate(names) if name.isdecimal()), None)
    return path if index is None else ".".join([*names[:index], "*", *names[index + 1 :]])


def with_layer_range(paths: Sequence[str]) -> str:
    """Like paths as one: model.layers.{0-29}.self_attn.q_proj."""
    numbers = sorted({index for path in paths if (index := layer_index(path)) is not None})
    if len(paths) == 1 or not numbers:
        return paths[0]
    ranges = []
    for _, pairs in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):  # consecutive numbers
        run = [number for _, number in pairs]
        ranges.append(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}")
    return without_layer(paths[0]).replace("*", f"{{{','.join(ranges)}}}", 1)
