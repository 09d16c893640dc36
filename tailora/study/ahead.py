"""What the steps of a run read, before it: from the data, or from the longest examples that the settings allow."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from accelerate import Accelerator
from transformers import PretrainedConfig

from tailora.data.dataset import Example
from tailora.train.config import TrainConfig
from tailora.train.dataloader import feed, heaviest, shape_of
from tailora.train.load import load_tokenizer
from tailora.train.steps import parts

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
    known = feed(config, rows, tokenizer, accelerator)
    size = shape_of(config, accelerator)
    if known.prepared is None or config.streaming:
        notes = ["the data is streamed: lengths are those of its first batch"]
        tokens_per_step = float(known.largest.tokens * config.gradient_accumulation_steps)
        return Batches(
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
    return Batches(
        heaviest=known.heaviest,
        at=lambda count: heaviest(train, replace(size, batch_size=count)),
        most=len(train),
        tokens=round(mean * known.max_steps),
        steps=known.max_steps,
        tokens_per_step=mean,
        notes=[],
    )


def _assumed(config: TrainConfig, shape: PretrainedConfig, accelerator: Accelerator) -> Batches:
    """Examples of max_length tokens, all of them learned."""
    size = shape_of(config, accelerator)
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
    places = max(parts([len(each.input_ids) for each in batch], limit), key=len)
    return [batch[place] for place in places]


def in_parts(batches: Batches) -> list[str]:
    """A note where large batches take no more memory."""
    largest = batches.at(batches.most)
    if len(largest) == batches.most:
        return []
    return [f"memory stops growing with the batch size at {tokens_of(largest):,} tokens: more go through in parts"]


def tokens_of(examples: list[Example]) -> int:
    return sum(len(example.input_ids) for example in examples)
