"""Which examples each optimiser step sees: a function of the settings and the step, so that a run can be continued.

A step is `accumulation` batches of `batch_size` examples on every rank. A batch of more than `token_limit` tokens goes
through the model in parts, which changes no result, since the loss is summed over the whole step. Where a rank has
fewer parts than another, it repeats one with weight 0, because all ranks must take part in every forward.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice

from tailora.data.collate import plan
from tailora.data.dataset import Example, Examples
from tailora.errors import DataError


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
        batches = plan(examples.lengths, batch_size=shape.batch_size, seed=shape.seed, epoch=epoch)
        groups = [batches[first : first + size] for first in range(0, len(batches), size)]
        for group in groups[skipped if epoch == first_epoch else 0 :]:
            yield _share([[examples[int(i)] for i in batch] for batch in group], shape)


def first_pass(examples: Examples, shape: Shape) -> list[list[Example]]:
    """The examples of every forward of the first epoch, over all ranks."""
    batches = plan(examples.lengths, batch_size=shape.batch_size, seed=shape.seed, epoch=0)
    return [
        part.examples for part in _in_parts([[examples[int(i)] for i in batch] for batch in batches], shape.token_limit)
    ]


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
