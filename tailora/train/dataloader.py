"""What a run trains on, in which steps, what is held out, and how large a forward becomes."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from typing import Any

import numpy as np
from accelerate import Accelerator
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from tailora.core.init import DATA_INITS
from tailora.data.collate import plan_batches
from tailora.data.dataset import Example, Examples
from tailora.data.demo import resolve_demo
from tailora.data.prepare import CutCounts, PreparedData, prepare, stream_examples
from tailora.errors import DataError
from tailora.train.config import TrainConfig
from tailora.train.memory import Load

# ---- Which examples each optimiser step sees: a function of the settings and the step, so that a run can be continued.
#
# A step is `accumulation` batches of `batch_size` examples on every rank. A batch of more than `token_limit` tokens
# goes through the model in parts, which changes no result, since the loss is summed over the whole step. Where a rank
# has fewer parts than another, it repeats one with weight 0, because all ranks must take part in every forward.


@dataclass(frozen=True)
class MicroBatch:
    examples: list[Example]
    weight: float = 1.0  # 0: computed to keep step with the other ranks, not counted

    @property
    def tokens(self) -> int:
        return sum(len(example.input_ids) for example in self.examples) if self.weight else 0

    @property
    def supervised(self) -> int:
        return sum(example.supervised for example in self.examples) if self.weight else 0


@dataclass(frozen=True)
class Shape:
    """The size of a step, and which share of it is ours."""

    batch_size: int  # examples in a batch
    accumulation: int  # batches of a rank in a step
    seed: int = 0
    rank: int = 0
    world: int = 1
    token_limit: int | None = None  # of one forward; a longer example goes alone

    @property
    def examples_per_step(self) -> int:
        return self.batch_size * self.accumulation * self.world


def steps_per_epoch(examples: int, shape: Shape) -> int:
    return math.ceil(math.ceil(examples / shape.batch_size) / (shape.accumulation * shape.world))


def planned(examples: Examples, shape: Shape, start: int = 0) -> Iterator[list[MicroBatch]]:
    """The steps from number `start` on, epoch after epoch, without end."""
    first_epoch, skipped = divmod(start, steps_per_epoch(len(examples), shape))
    size = shape.accumulation * shape.world
    for epoch in count(first_epoch):
        batches = plan_batches(examples.lengths, batch_size=shape.batch_size, seed=shape.seed, epoch=epoch)
        groups = [batches[first : first + size] for first in range(0, len(batches), size)]
        for group in groups[skipped if epoch == first_epoch else 0 :]:
            yield _share([[examples[int(i)] for i in batch] for batch in group], shape)


def streamed(read: Callable[[], Iterable[Example]], shape: Shape, start: int = 0) -> Iterator[list[MicroBatch]]:
    """The same for data read in its own order, over and over. Raises DataError when there is none."""
    stream = islice(_repeated(read), start * shape.examples_per_step, None)
    while True:
        batches = [list(islice(stream, shape.batch_size)) for _ in range(shape.accumulation * shape.world)]
        yield _share(batches, shape)


def _repeated(read: Callable[[], Iterable[Example]]) -> Iterator[Example]:
    while True:
        empty = True
        for example in read():
            empty = False
            yield example
        if empty:
            raise DataError("the stream holds no example to learn from")


def parts(lengths: Sequence[int], limit: int | None) -> list[range]:
    """The places of a batch, cut into runs of at most `limit` tokens and of about the same size."""
    total = sum(lengths)
    if limit is None or total <= limit:
        return [range(len(lengths))]
    target = total / math.ceil(total / limit)
    cut: list[range] = []
    first, tokens = 0, 0
    for place, length in enumerate(lengths):
        if tokens and (tokens + length > limit or tokens + length / 2 > target):
            cut.append(range(first, place))
            first, tokens = place, 0
        tokens += length
    return [*cut, range(first, len(lengths))]


def _share(group: list[list[Example]], shape: Shape) -> list[MicroBatch]:
    """Our micro-batches of the step: every `world`-th batch, in parts."""
    shares = [_in_parts(group[rank :: shape.world], shape.token_limit) for rank in range(shape.world)]
    own = shares[shape.rank]
    missing = max(map(len, shares)) - len(own)
    return own + [MicroBatch(shares[0][0].examples, weight=0.0)] * missing


def _in_parts(batches: list[list[Example]], limit: int | None) -> list[MicroBatch]:
    return [
        MicroBatch([batch[place] for place in places])
        for batch in batches
        for places in parts([len(example.input_ids) for example in batch], limit)
    ]


# ----


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
    cuts: CutCounts | None = None  # of what was streamed

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
        resolve_demo(config.data, "data"),
        tokenizer,
        eval_source=None if config.eval_data is None else resolve_demo(config.eval_data, "eval_data"),
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
    return _feed(config, data, partial(planned, data.train, shape), total, data.train, shape)


def _streamed(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, rows: int, shape: Shape) -> Feed:
    """Read while training; what is known of it beforehand is its first batch."""
    common: dict[str, Any] = {"field": config.field, "max_length": config.max_length}
    cuts = CutCounts()
    read = partial(
        stream_examples, resolve_demo(config.data, "data"), tokenizer, embedding_rows=rows, cuts=cuts, **common
    )
    held = None
    if config.eval_data is not None:
        source = resolve_demo(config.eval_data, "eval_data")
        held = prepare(source, tokenizer, eval_source=source, embedding_rows=rows, **common)
    assert config.max_steps is not None  # TrainConfig saw to it
    opening = config.init_batches if config.init_lora_weights in DATA_INITS else 1
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
    first = plan_batches(examples.lengths, batch_size=shape.batch_size, seed=shape.seed, epoch=0)[:batches]
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
        for batch in plan_batches(lengths, batch_size=shape.batch_size, seed=shape.seed, epoch=0)
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
