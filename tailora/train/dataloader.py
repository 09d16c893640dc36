"""What a run trains on, in which steps, what is held out, and how large a forward becomes."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from tailora.core.init import DATA_STARTS
from tailora.data.collate import plan
from tailora.data.dataset import Example, Examples
from tailora.data.demo import resolve
from tailora.data.prepare import Cuts, PreparedData, prepare, stream
from tailora.train.config import TrainConfig
from tailora.train.memory import Load
from tailora.train.steps import MicroBatch, Shape, first_pass, parts, planned, steps_per_epoch, streamed

CPU_TOKENS = (
    768  # of one forward on a CPU: 430 tokens/s at 380, 480 at 730, and no more at 1500, which takes twice the memory
)


HeldOut = Callable[[int], NDArray[np.int64]]  # number of held-out examples -> which of them are evaluated


@dataclass(frozen=True, eq=False)
class Feed:
    prepared: PreparedData | None  # None when streaming without eval_data
    held_out: Examples | None
    steps: Callable[[int], Iterator[list[MicroBatch]]]  # from a step on
    max_steps: int
    largest: Load  # forward, as far as it is known
    longest: int  # tokens of an example
    sample: Example  # that one
    heaviest: list[Example]  # of the largest forward
    opening: Callable[[int], list[list[Example]]]  # the first batches, in parts; of a stream as many as were read
    cuts: Cuts | None = None  # of what was streamed
    first_pass: Callable[[], list[list[Example]]] = list  # forwards whose examples come again in a second one

    def judged_by(self, choose: HeldOut | None) -> "Feed":
        """The same with only some of the held-out examples."""
        if choose is None or self.held_out is None:
            return self
        return replace(self, held_out=self.held_out.select(choose(len(self.held_out))))


def feed(
    config: TrainConfig, embedding_rows: int, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator
) -> Feed:
    """Read, check and tokenise the data. Raises DataError with all its problems."""
    shape = shape_of(config, accelerator)
    return (_streamed if config.streaming else _prepared)(config, tokenizer, embedding_rows, shape)


Reader = Callable[[TrainConfig, int, PreTrainedTokenizerBase, Accelerator], Feed]


def assumed(config: TrainConfig, embedding_rows: int, _: PreTrainedTokenizerBase, accelerator: Accelerator) -> Feed:
    """Random tokens in the place of data: two steps of examples of max_length, all of them learned, over and over."""
    shape = shape_of(config, accelerator)
    random = np.random.default_rng(config.seed)
    ids = random.integers(embedding_rows, size=(2 * shape.examples_per_step, config.max_length)).astype(np.int32)
    examples = Examples.of(Example(row, row) for row in ids)
    return _feed(config, None, partial(planned, examples, shape), config.max_steps or 2, examples, shape)


def shape_of(config: TrainConfig, accelerator: Accelerator) -> Shape:
    """Of a step on this rank."""
    return Shape(
        batch_size=config.per_device_train_batch_size,
        accumulation=config.gradient_accumulation_steps,
        seed=config.seed,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        token_limit=CPU_TOKENS if accelerator.device.type == "cpu" else None,
    )


def read_whole(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, embedding_rows: int) -> PreparedData:
    """The data that `config` names, read, checked and tokenised. Raises DataError with all its problems."""
    return prepare(
        resolve(config.data, "data"),
        tokenizer,
        eval_source=None if config.eval_data is None else resolve(config.eval_data, "eval_data"),
        field=config.field,
        max_length=config.max_length,
        validation_split=config.validation_split,
        seed=config.seed if config.split_seed is None else config.split_seed,
        embedding_rows=embedding_rows,
    )


def _prepared(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, rows: int, shape: Shape) -> Feed:
    data = read_whole(config, tokenizer, rows)
    once = steps_per_epoch(len(data.train), shape)
    total = config.max_steps or math.ceil(config.num_train_epochs * once)
    known = _feed(config, data, partial(planned, data.train, shape), total, data.train, shape)
    return replace(known, first_pass=partial(first_pass, data.train, shape)) if total > once else known


def _streamed(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, rows: int, shape: Shape) -> Feed:
    """Read while training; what is known of it beforehand is its first batch."""
    common: dict[str, Any] = {"field": config.field, "max_length": config.max_length}
    cuts = Cuts()
    read = partial(stream, resolve(config.data, "data"), tokenizer, embedding_rows=rows, cuts=cuts, **common)
    held = None
    if config.eval_data is not None:
        source = resolve(config.eval_data, "eval_data")
        held = prepare(source, tokenizer, eval_source=source, embedding_rows=rows, **common)
    assert config.max_steps is not None  # TrainConfig saw to it
    opening = config.init_batches if config.init_lora_weights in DATA_STARTS else 1
    first = Examples.of(islice(read(), shape.batch_size * opening))
    return replace(_feed(config, held, partial(streamed, read, shape), config.max_steps, first, shape), cuts=cuts)


def remarks(feed: Feed, max_length: int) -> list[str]:
    """What is known of a stream when it was read."""
    if feed.cuts is None or feed.cuts.truncated == 0:
        return []
    cuts = feed.cuts
    lost = f"; {cuts.cut_away:,} of them were left out, with nothing to learn before the cut" if cuts.cut_away else ""
    return [f"{cuts.truncated:,} of {cuts.rows:,} streamed rows were longer than --max-length {max_length}: cut{lost}"]


def _feed(
    config: TrainConfig,
    data: PreparedData | None,
    steps: Callable[[int], Iterator[list[MicroBatch]]],
    max_steps: int,
    known: Examples,
    shape: Shape,
) -> Feed:
    sample = known[int(known.lengths.argmax())]
    most = heaviest(known, shape)
    return Feed(
        prepared=data,
        held_out=data.eval if data else None,
        steps=steps,
        max_steps=max_steps,
        largest=load_of(most, config),
        longest=len(sample.input_ids),
        sample=sample,
        heaviest=most,
        opening=partial(_opening, known, shape),
    )


def _opening(examples: Examples, shape: Shape, batches: int) -> list[list[Example]]:
    """The first batches of the first epoch, of all ranks, as they go through the model."""
    first = plan(examples.lengths, batch_size=shape.batch_size, seed=shape.seed, epoch=0)[:batches]
    return [
        [examples[int(batch[place])] for place in places]
        for batch in first
        for places in parts(examples.lengths[batch].tolist(), shape.token_limit)
    ]


def heaviest(examples: Examples, shape: Shape) -> list[Example]:
    """The forward of the first epoch with the most tokens."""
    lengths = examples.lengths
    forwards = [
        batch[list(places)]
        for batch in plan(lengths, batch_size=shape.batch_size, seed=shape.seed, epoch=0)
        for places in parts(lengths[batch].tolist(), shape.token_limit)
    ]
    most = max(forwards, key=lambda indices: int(lengths[indices].sum()))
    return [examples[int(i)] for i in most]


def load_of(examples: Sequence[Example], config: TrainConfig) -> Load:
    """One forward of these."""
    return Load(
        batch_size=config.per_device_train_batch_size,
        examples=len(examples),
        tokens=sum(len(example.input_ids) for example in examples),
        supervised=sum(example.supervised for example in examples),
        checkpointed=config.gradient_checkpointing,
    )
