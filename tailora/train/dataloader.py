"""What a run trains on: the data, the examples of every optimizer step, and the size of the largest forward.

    `read_data`       settings -> TrainingData, loaded or streamed
    `dataset_steps`   which examples each step sees; `stream_steps`: the same of streamed data

A step's examples depend only on the settings and the number of the step, so that a run can be continued;
completions, which `train.rollouts` samples, also depend on the weights.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from itertools import chain, count, islice
from typing import Any, Literal

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray

from tailora.data.chat_template import DataSettings
from tailora.data.dataset import DataReport, Example, Examples, Int64, named_rows
from tailora.data.demo import resolve_demo
from tailora.data.image_processor import Tokenizer, text_tokenizer
from tailora.data.labels import Labels
from tailora.data.prepare import PreparedData, prepare, stream_examples
from tailora.data.readers import Source, parse_sources, source_names
from tailora.data.row_checks import RowCounts
from tailora.data.schemas import PREFERENCE, SEQ2SEQ
from tailora.errors import ConfigError, DataError
from tailora.train.answers import check_metrics
from tailora.train.classification import class_weights, label_task
from tailora.train.config import GRPO, PREFERENCE_FIELDS, TrainConfig
from tailora.train.defaults import RunConfig, with_numbers
from tailora.train.image_text_to_text import language_model_task
from tailora.train.loss import CAUSAL_LM, SEQ2SEQ_TASK, Task
from tailora.train.preference import preference_task
from tailora.train.rewards import parse_rewards
from tailora.train.rollouts import Prompts
from tailora.train.step import Step, StepShape, split_by_tokens, step_shape

ChooseHeldOut = Callable[[int], NDArray[np.int64]]  # number of held-out examples -> indices of those to evaluate


@dataclass(frozen=True, eq=False)
class TrainingData:
    config: RunConfig  # of the run on this data
    prepared: PreparedData | None  # None when streaming without eval_data
    held_out: Examples | None
    steps: Callable[[int], Iterator[Step]]  # number of the first step -> it, and the steps after it
    max_steps: int
    known: Examples  # the examples to train on; of a stream, the first ones
    shape: StepShape
    counts: RowCounts | None = None  # of a stream, while it is read
    prompts: Prompts | None = None  # for completions that are sampled from the model in training

    @cached_property
    def largest(self) -> list[Example]:
        """The examples of the forward with the most tokens; of a stream, among its first examples."""
        return largest_forward(self.known, self.shape)

    @property
    def largest_tokens(self) -> int:
        """The tokens of that forward, without sequences that get no gradient."""
        trained = (sequence for example in self.largest for sequence in self.task.trained_sequences(example))
        return sum(len(sequence.input_ids) for sequence in trained)

    @property
    def longest(self) -> Example:
        """The longest sequence of the longest example; with a head for labels, the example.

        If there are examples with images, it is one of these, because image towers run only for them.
        """
        lengths = self.known.lengths
        if self.known.images:
            lengths = lengths * np.array([bool(images) for images in self.known.images])
        example = self.known[int(lengths.argmax())]
        return example if self.task.is_plain else max(example.sequences, key=lambda part: len(part.input_ids))

    @property
    def task(self) -> Task:
        return self.shape.task

    @property
    def tried_task(self) -> Task:
        """What the model is tried on with the longest sequence, before it is trained on the task itself."""
        return self.task if self.task.is_plain else CAUSAL_LM

    @property
    def system(self) -> str | None:
        """The system message of most examples, of a stream of those read so far."""
        if self.counts is not None:
            return self.counts.system
        return None if self.prepared is None else self.prepared.report.system

    def trained_on(self) -> Examples:
        """Returns the examples of all steps, of all ranks; not of a stream."""
        needed = self.max_steps * self.shape.accumulation * self.shape.world  # batches
        seen = np.zeros(0, np.int64)
        for epoch in count():
            batches = epoch_batches(self.known, self.shape, epoch)
            seen = np.union1d(seen, np.concatenate(batches[:needed]))
            needed -= len(batches)
            if needed <= 0 or len(seen) == len(self.known):
                return self.known.select(seen)
        raise AssertionError  # the epochs have no end

    def tokens(self, first_step: int) -> float:
        """Returns about how many tokens this rank will train on from a step to the end of the run."""
        examples = (self.max_steps - first_step) * self.shape.batch_size * self.shape.accumulation
        return examples * self.known.mean_length

    def first_batches(self, count: int) -> list[list[Example]]:
        """Returns the examples of each forward of the first batches, of all ranks; of two sequences, the first."""
        return [
            [example if self.task.is_plain else example.sequences[0] for example in self.known.select(forward)]
            for forward in _forwards(self.known, self.shape, count)
        ]


# The settings, the tokenizer, and what a head for labels predicts -> the data
ReadData = Callable[[TrainConfig, Tokenizer, Accelerator, Labels | None], TrainingData]


def read_data(
    config: TrainConfig, tokenizer: Tokenizer, accelerator: Accelerator, labels: Labels | None = None
) -> TrainingData:
    """Reads, checks and tokenizes the data that `config` names. Raises DataError with all problems."""
    if config.task == GRPO:
        return _sampled(with_numbers(config, None), tokenizer, accelerator)
    if config.streaming:
        streamed = _streamed(with_numbers(config, None), tokenizer, accelerator)
        if config.metric and accelerator.is_main_process:
            check_metrics(config, streamed.prepared, tokenizer)
        return streamed
    data = read_whole(config, tokenizer, labels)
    if config.metric and accelerator.is_main_process:
        check_metrics(config, data, tokenizer)
    run = with_numbers(config, data, accelerator.num_processes)
    shape = replace(step_shape(run, accelerator), task=task_of(config, data.report, tokenizer, labels))
    max_steps = config.max_steps or epoch_steps(run, data.train.epoch_size, shape.world)
    return TrainingData(run, data, data.eval, partial(dataset_steps, data.train, shape), max_steps, data.train, shape)


def read_without(left_out: Collection[int], sha256: str, config: TrainConfig, *arguments: Any) -> TrainingData:
    """As `read_data`, with weight 0 for the training examples with these indices: all others keep their steps.

    sha256: of the data that the indices belong to. Raises ConfigError if the data has changed.
    """
    data = read_data(config, *arguments)
    if data.prepared is None or data.prepared.report.sha256 != sha256:
        files = ", ".join(filter(None, [*source_names(config.data), config.eval_data]))
        raise ConfigError(f"the rows have changed since the run: {files}; restore them, or train again")
    weights = data.known.weights.copy()
    weights[sorted(left_out)] = 0
    known = replace(data.known, weights=weights)
    return replace(data, known=known, steps=partial(dataset_steps, known, data.shape))


def read_subset(count: int, config: TrainConfig, *arguments: Any) -> TrainingData:
    """As `read_data`, with only `count` training examples, drawn with the run's seed.

    With the same seed, a larger subset contains the smaller ones. Needs `max_steps`, and sources without weights.
    """
    data = read_data(config, *arguments)
    order = np.random.default_rng(config.seed).permutation(len(data.known))
    known = data.known.select(np.sort(order[:count]))
    return replace(data, known=known, steps=partial(dataset_steps, known, data.shape))


def read_whole(config: TrainConfig, tokenizer: Tokenizer, labels: Labels | None = None) -> PreparedData:
    """Reads, checks and tokenizes data that is not streamed. Raises DataError with all its problems."""
    eval_source = None if config.eval_data is None else resolve_demo(config.eval_data, "eval_data")
    sources = resolved_sources(config, "data")
    return prepare(sources, tokenizer, data_settings(config, labels), eval_source=eval_source)


def resolved_sources(config: TrainConfig, demo: Literal["data", "eval_data"]) -> list[Source]:
    """Returns the sources of the training data. demo: which data 'demo' stands for."""
    return [source._replace(name=resolve_demo(source.name, demo)) for source in parse_sources(config.data)]


def data_settings(config: TrainConfig, labels: Labels | None = None) -> DataSettings:
    """Returns the settings by which rows become examples."""
    shared = {setting.name for setting in fields(DataSettings)} & type(config).model_fields.keys()
    settings = DataSettings(**{name: getattr(config, name) for name in shared}, labels=labels)
    return settings if config.split_seed is None else replace(settings, seed=config.split_seed)


def task_of(config: TrainConfig, report: DataReport, tokenizer: Tokenizer, labels: Labels | None) -> Task:
    """Returns what is learned from such data. Raises ConfigError if the loss asked for is not for these rows."""
    if labels is not None:
        return label_task(labels, class_weights(config.class_weights, labels, report.labels))
    if report.task == SEQ2SEQ:
        return SEQ2SEQ_TASK
    if report.task == PREFERENCE:
        return preference_task(config, report.shape, report.source)
    if given := config.changed(PREFERENCE_FIELDS):
        raise ConfigError(
            f"{', '.join(given)}: only applies to preferences, but data {report.source} was read as {report.shape}; "
            "preference rows need chosen and rejected, or prompt, completion and label (true or false)"
        )
    return language_model_task(tokenizer)


def _streamed(config: RunConfig, tokenizer: Tokenizer, accelerator: Accelerator) -> TrainingData:
    """Returns data that is read while training; only its first batches are read now."""
    settings = data_settings(config)
    eval_data = held_out = None
    if config.eval_data is not None:
        source = resolve_demo(config.eval_data, "eval_data")
        eval_data = prepare(source, tokenizer, settings, eval_source=source, split="validation")
        held_out = eval_data.eval
    shape = replace(step_shape(config, accelerator), task=language_model_task(tokenizer))
    counts = RowCounts(held_out=frozenset(held_out.hashes() if held_out else ()))
    (data,) = resolved_sources(config, "data")  # TrainConfig allows one
    if data.weight != 1:
        raise DataError(f"data {data}: a stream has no epochs, so weights are not supported; remove the weight")
    read = partial(stream_examples, data.name, tokenizer, settings, counts)
    assert config.max_steps is not None  # TrainConfig requires it
    batches = config.init_batches if config.init_lora_weights == "eva" else 1
    first = Examples.of(islice(read(), shape.batch_size * batches))
    steps = partial(stream_steps, read, shape)
    return TrainingData(config, eval_data, held_out, steps, config.max_steps, first, shape, counts)


def _sampled(config: RunConfig, tokenizer: Tokenizer, accelerator: Accelerator) -> TrainingData:
    """Returns prompts, whose completions are sampled from the model while it is trained."""
    data, shape = read_whole(config, tokenizer), step_shape(config, accelerator)
    rewards, metrics = parse_rewards(config.reward, config.metric)
    if metrics and not data.eval:
        problem = "--metric scores answers to held-out prompts, but there are none"
        raise ConfigError(f"{problem}; use --eval-data, or a --validation-split above 0")
    per_epoch = steps_per_epoch(data.train.epoch_size, shape) * config.num_iterations
    max_steps = config.max_steps or math.ceil(config.num_train_epochs * per_epoch)
    prompts = Prompts(config, shape, data, rewards, metrics)
    with prompts.scorer() as scorer:  # raises if a function cannot be loaded, or needs a column that the rows lack
        lower = [reward.source for reward, higher in zip(rewards, scorer.higher_is_better, strict=False) if not higher]
    if lower:
        raise ConfigError(f"--reward {', '.join(lower)}: lower is better, so it cannot be trained on; use --metric")
    longest = max([*data.train, *data.eval], key=lambda example: len(example.input_ids)).input_ids
    ids = np.resize(longest, len(longest) + config.max_completion_length)
    full = Example.of_text(ids, np.arange(len(ids)) >= len(longest))
    # The largest batch of completions is a group, which is the most that goes through the model at once
    known = Examples.of([full] * config.num_generations)
    groups = shape.batch_size * shape.accumulation
    shape = replace(shape, task=prompts.task, batch_size=config.num_generations, accumulation=groups)
    held_out = replace(data.eval, source_indices=np.arange(len(data.eval))) if data.eval else None
    prepared = replace(data, eval_samples=[prompt.chat for prompt in data.eval_samples])
    return TrainingData(config, prepared, held_out, _not_sampled, max_steps, known, shape, prompts=prompts)


def _not_sampled(_start: int) -> Iterator[Step]:
    raise AssertionError  # `set_up` replaces it by `Rollouts.steps`, which need the model


def stream_notes(data: TrainingData, max_length: int) -> list[str]:
    """Returns notes on a stream that was read: how many rows were cut, and how many are held out too."""
    counts, notes = data.counts, []
    if counts is None:
        return []
    rows = f"of {counts.rows:,} streamed rows"
    numbers, locations = counts.flagged.numbers, counts.flagged.locations
    if cut := numbers["truncated"]:
        lost = f" ({numbers['cut_away']:,} were skipped because truncation left no tokens to train on)"
        note = f"{cut:,} {rows} were longer than --max-length {max_length} and truncated"
        notes.append(note + lost * (numbers["cut_away"] > 0) + named_rows(locations["truncated"], cut))
    if copies := numbers["duplicates"]:
        named = named_rows(locations["duplicates"], copies)
        notes.append(f"{copies:,} {rows} are also in the held-out data, so the held-out loss looks too good{named}")
    return notes


def random_data(
    config: TrainConfig, tokenizer: Tokenizer, accelerator: Accelerator, _labels: Labels | None = None
) -> TrainingData:
    """Returns random tokens instead of data: two steps of fully supervised examples of max_length, repeated."""
    run = with_numbers(config, None)
    shape = step_shape(run, accelerator)
    random, size = np.random.default_rng(config.seed), (2 * shape.examples_per_step, config.max_length)
    ids = random.integers(len(text_tokenizer(tokenizer)), size=size, dtype=np.int32)
    examples = Examples.of(map(Example.of_text, ids))
    steps = partial(dataset_steps, examples, shape)
    return TrainingData(run, None, None, steps, config.max_steps or 2, examples, shape)


def epoch_steps(config: RunConfig, examples: int, world: int = 1) -> int:
    """Returns the steps of `num_train_epochs` epochs. examples: in an epoch."""
    shape = StepShape(config.per_device_train_batch_size, config.gradient_accumulation_steps, world=world)
    return math.ceil(config.num_train_epochs * steps_per_epoch(examples, shape))


def steps_per_epoch(examples: int, shape: StepShape) -> int:
    return math.ceil(math.ceil(examples / shape.batch_size) / (shape.accumulation * shape.world))


def dataset_steps(examples: Examples, shape: StepShape, start: int = 0) -> Iterator[Step]:
    """Yields the steps from number `start` on, epoch after epoch, without end."""
    first_epoch, skipped = divmod(start, steps_per_epoch(examples.epoch_size, shape))
    size = shape.accumulation * shape.world
    for epoch in count(first_epoch):
        batches = epoch_batches(examples, shape, epoch)
        steps = [batches[first : first + size] for first in range(0, len(batches), size)]
        for step in steps[skipped if epoch == first_epoch else 0 :]:
            yield _share_of_rank([[examples[int(i)] for i in batch] for batch in step], shape)


def epoch_batches(examples: Examples, shape: StepShape, epoch: int) -> list[NDArray[np.int64]]:
    """Returns the indices of the examples in every batch of an epoch."""
    indices = examples.epoch(epoch, shape.seed)
    batches = plan_batches(
        examples.lengths[indices],
        batch_size=shape.batch_size,
        seed=shape.seed,
        epoch=epoch,
        by_length=shape.task.batches_by_length,
    )
    return [indices[batch] for batch in batches]


WINDOW = 50  # batches that are sorted by length together: little padding, and still a random order


def plan_batches(
    lengths: Int64 | Sequence[int], *, batch_size: int, seed: int, epoch: int, by_length: bool = True
) -> list[Int64]:
    """Returns batches of example indices, every example exactly once; the same for the same arguments.

    by_length: examples of similar length share a batch.
    One batch may be smaller than the others, anywhere in the order.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    sizes = np.asarray(lengths)
    batches: list[Int64] = []
    for start in range(0, len(order), batch_size * WINDOW):
        window = order[start : start + batch_size * WINDOW]
        if by_length:
            window = window[np.argsort(sizes[window], kind="stable")]
        batches += [window[first : first + batch_size] for first in range(0, len(window), batch_size)]
    return [batches[index] for index in random.permutation(len(batches))]


def stream_steps(read: Callable[[], Iterable[Example]], shape: StepShape, start: int = 0) -> Iterator[Step]:
    """Yields the steps of data in the order of reading, again and again. Raises DataError if there is none."""

    def repeated() -> Iterator[Example]:
        while True:
            example = None
            for example in read():
                yield example
            if example is None:
                raise DataError("the stream contains no examples to train on; check the data")

    stream = islice(repeated(), start * shape.examples_per_step, None)
    while True:
        batches = [list(islice(stream, shape.batch_size)) for _ in range(shape.accumulation * shape.world)]
        yield _share_of_rank(batches, shape)


def _share_of_rank(batches: list[list[Example]], shape: StepShape) -> Step:
    """Returns this rank's part of a step: every `world`-th batch, in micro-batches."""
    shares = [
        [
            [batch[i] for i in part]
            for batch in batches[rank :: shape.world]
            for part in split_by_tokens([len(example.input_ids) for example in batch], shape.token_limit)
        ]
        for rank in range(shape.world)
    ]
    share = shares[shape.rank]
    idle = max(map(len, shares)) - len(share)
    return Step.of(share + shares[0][:1] * idle, list(chain.from_iterable(batches)), shape.task, idle)


def largest_forward(examples: Examples, shape: StepShape) -> list[Example]:
    """Returns the examples of the forward of the first epoch with the most tokens."""
    largest = max(_forwards(examples, shape), key=lambda forward: int(examples.lengths[forward].sum()))
    return [examples[int(i)] for i in largest]


def _forwards(examples: Examples, shape: StepShape, batches: int | None = None) -> list[NDArray[np.int64]]:
    """Returns the indices of every forward of the first epoch, or of its first batches."""
    lengths = examples.lengths
    return [
        batch[list(part)]
        for batch in epoch_batches(examples, shape, 0)[:batches]
        for part in split_by_tokens(lengths[batch].tolist(), shape.token_limit)
    ]
