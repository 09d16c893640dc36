"""The parts of a run, each made from the settings and the parts before it."""

import importlib.util
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tailora.data.batches import plan
from tailora.data.demo import resolve
from tailora.data.prepare import Prepared, prepare, stream
from tailora.data.store import Example, Examples
from tailora.errors import ConfigError, listing, nearest
from tailora.model import LoRAModel
from tailora.train.config import TrainConfig
from tailora.train.loss import Rows, keeps_logits, token_losses
from tailora.train.memory import Cost, Load, measure
from tailora.train.packing import choose
from tailora.train.rng import seed_all
from tailora.train.steps import MicroBatch, Shape, planned, steps_per_epoch, streamed

TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",)}
PROBE_TOKENS = 512  # memory is measured on the longest example up to here


def start_accelerator(config: TrainConfig) -> Accelerator:
    """accelerate, with the trackers asked for. Raises ConfigError for those it would pass over in silence."""
    problems = []
    for name in config.report_to:
        if name not in TRACKERS:
            problems.append(f"report_to {name!r} is unknown; there are {', '.join(TRACKERS)}{nearest(name, TRACKERS)}")
        elif not any(importlib.util.find_spec(package) for package in TRACKERS[name]):
            problems.append(f"report_to {name!r} is not installed: pip install {TRACKERS[name][0]}")
    if problems:
        raise ConfigError(listing(problems))
    return Accelerator(log_with=config.report_to or None, project_dir=config.output_dir)


@dataclass(frozen=True, eq=False)
class Feed:
    """What is trained on, in which steps, and what is held out."""

    prepared: Prepared | None  # None when streaming without eval_data
    held_out: Examples | None
    steps: Callable[[int], Iterator[list[MicroBatch]]]  # from a step on
    max_steps: int
    largest: Load  # micro-batch
    longest: int  # example, in tokens
    sample: Example  # to measure memory on


def feed(
    config: TrainConfig, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, accelerator: Accelerator
) -> Feed:
    """Read, check and tokenise the data. Raises DataError with all its problems."""
    shape = Shape(
        config.per_device_train_batch_size,
        config.gradient_accumulation_steps,
        config.seed,
        accelerator.process_index,
        accelerator.num_processes,
    )
    rows = base.get_input_embeddings().weight.shape[0]
    common: dict[str, Any] = {"field": config.field, "max_length": config.max_length}
    eval_source = None if config.eval_data is None else resolve(config.eval_data, "eval_data")
    source = resolve(config.data, "data")
    if config.streaming:
        read = partial(stream, source, tokenizer, **common)
        held = (
            None
            if eval_source is None
            else prepare(eval_source, tokenizer, eval_source=eval_source, embedding_rows=rows, **common)
        )
        return _stream_feed(config, read, held, shape)
    data = prepare(
        source,
        tokenizer,
        eval_source=eval_source,
        validation_split=config.validation_split,
        seed=config.seed,
        embedding_rows=rows,
        **common,
    )
    total = config.max_steps or math.ceil(config.num_train_epochs * steps_per_epoch(len(data.train), shape))
    return Feed(
        data,
        data.eval,
        partial(planned, data.train, shape),
        total,
        _largest(data.train, config),
        int(data.train.lengths.max()),
        _probe(data.train),
    )


def _stream_feed(
    config: TrainConfig, read: Callable[[], Iterable[Example]], held: Prepared | None, shape: Shape
) -> Feed:
    """Nothing is known of a stream's lengths, so its largest micro-batch is taken to be full."""
    assert config.max_steps is not None  # TrainConfig saw to it
    tokens = config.per_device_train_batch_size * config.max_length
    largest = Load(config.per_device_train_batch_size, tokens, tokens, config.gradient_checkpointing)
    return Feed(
        held,
        held.eval if held else None,
        partial(streamed, read, shape),
        config.max_steps,
        largest,
        config.max_length,
        next(iter(read())),
    )


def _largest(examples: Examples, config: TrainConfig) -> Load:
    """The micro-batch of the first epoch with the most tokens."""
    batches = plan(examples.lengths, batch_size=config.per_device_train_batch_size, seed=config.seed, epoch=0)
    lengths, supervised = examples.lengths, examples.supervised
    batch = max(batches, key=lambda indices: int(lengths[indices].sum()))
    return Load(len(batch), int(lengths[batch].sum()), int(supervised[batch].sum()), config.gradient_checkpointing)


def _probe(examples: Examples) -> Example:
    lengths = examples.lengths
    short = [i for i in range(len(examples)) if lengths[i] <= PROBE_TOKENS]
    return examples[max(short, key=lambda i: int(lengths[i])) if short else int(lengths.argmin())]


def attach(config: TrainConfig, base: PreTrainedModel, device: torch.device) -> LoRAModel:
    """The base with a fresh adapter, or with the one to go on from, in training mode."""
    seed_all(config.seed)
    model = LoRAModel.from_pretrained(base, config.adapter) if config.adapter else LoRAModel(base, config.lora())
    return model.to(device).train()


def choose_rows(
    config: TrainConfig, base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, note: Callable[[str], None]
) -> Rows:
    """Packed or padded, tried on the model itself. Raises ConfigError for packing = 'on' where it changes results."""
    packing = choose(base, config.packing)
    if packing.note:
        note(packing.note)
    keeps = keeps_logits(base)
    if not keeps:
        note(
            f"{type(base).__name__} takes no logits_to_keep, so logits of all tokens are computed: slower, more memory"
        )
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return Rows(packing.on, keeps, next(token for token in known if token is not None))


@contextmanager
def checkpointed_layers(base: PreTrainedModel) -> Iterator[None]:
    """Within the block every layer keeps its input only and computes the rest again. Raises ConfigError.

    transformers also makes the embedding's output ask for gradients, which is for the reentrant kind and would send
    the backward through layers below the first adapted one; that is undone.
    """
    new = hasattr(base, "activation_checkpointing_enable")  # the name since transformers 5.2x
    enable = base.activation_checkpointing_enable if new else base.gradient_checkpointing_enable
    disable = base.activation_checkpointing_disable if new else base.gradient_checkpointing_disable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise ConfigError(f"gradient_checkpointing: {error}; leave it out") from None
    base.disable_input_require_grads()
    try:
        yield
    finally:
        disable()


def memory_cost(model: LoRAModel, rows: Rows, sample: Example, device: torch.device) -> Cost:
    """Bytes that a forward keeps, measured on one example."""

    def forward(tokens: int) -> Tensor:
        part = Example(sample.input_ids[:tokens], sample.labels[:tokens])
        return token_losses(model, [part], rows, device)[0].sum()

    return measure(
        forward,
        len(sample.input_ids),
        cast(PreTrainedModel, model.base_model),
    )
