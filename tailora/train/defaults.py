"""The learning rate, the batch size and the number of passes of a run that does not set them.

    TrainConfig, the data -> RunConfig, which has numbers

Small data needs steps, not passes: 30 chats in batches of 8 make four steps, after which a model has learned nothing.
benchmarks/studies/defaults.py measured what suits how many examples of a language model's data. Other tasks get what
suits large data, and enough passes for FEW_STEPS.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import Field

from tailora.data.prepare import PreparedData
from tailora.data.schemas import CAUSAL_LM
from tailora.train.config import FEW_STEPS, GRPO, PositiveInt, TrainConfig
from tailora.train.model_loading import read_config


class RunConfig(TrainConfig):
    """The settings of a run whose data was read."""

    learning_rate: float = Field(gt=0)
    num_train_epochs: float = Field(gt=0, le=1e6)
    per_device_train_batch_size: PositiveInt = Field()


class Suited(NamedTuple):
    """What suits data with at most this number of examples."""

    examples: float
    per_step: int  # of large data, per batch
    passes: float
    learning_rate: float

    def batch_size(self, batches: int) -> int:
        """batches: of a step, over all processes."""
        return self.per_step if self.examples == math.inf else max(1, self.per_step // batches)


LARGE = Suited(math.inf, per_step=8, passes=1, learning_rate=3e-4)
SMALL = (
    Suited(64, per_step=2, passes=3, learning_rate=1e-3),
    Suited(200, per_step=2, passes=2, learning_rate=1e-3),
    Suited(800, per_step=4, passes=1, learning_rate=1e-3),
)
WIDE = 4096  # of models this wide, some diverge at 1e-3 (docs/questions/learning_rate.md)
NAMES = {
    "per_device_train_batch_size": "batches of {:g}",
    "num_train_epochs": "{:g} passes",
    "learning_rate": "learning rate {:g}",
}


def with_numbers(config: TrainConfig, data: PreparedData | None, processes: int = 1) -> RunConfig:
    """Returns the settings of a run. data: None if it is streamed or random. processes: take every step together."""
    suited = LARGE
    if data is not None and config.task != GRPO:
        suited = suited_to(len(data.train), is_language_model=data.report.task == CAUSAL_LM)
    rate = suited.learning_rate
    if config.learning_rate is None and rate > LARGE.learning_rate and width_of(config.model) >= WIDE:
        rate = LARGE.learning_rate
    numbers = {
        "learning_rate": rate,
        "num_train_epochs": suited.passes,
        "per_device_train_batch_size": suited.batch_size(processes * config.gradient_accumulation_steps),
    }
    chosen = {name: number for name, number in numbers.items() if getattr(config, name) is None}
    return RunConfig(**{**config.model_dump(exclude_unset=True), **chosen})


def width_of(model: str) -> int:
    return int(getattr(read_config(model).get_text_config(), "hidden_size", 0))


def suited_to(examples: int, *, is_language_model: bool) -> Suited:
    if is_language_model:
        return next(suited for suited in (*SMALL, LARGE) if examples <= suited.examples)
    return LARGE._replace(passes=max(1, math.ceil(FEW_STEPS * LARGE.per_step / examples)))


def numbers_of(config: TrainConfig, settings: Mapping[str, Any]) -> TrainConfig:
    """Returns the settings, completed with the numbers of an earlier run. settings: of that run."""
    return config.replaced(**{name: settings[name] for name in NAMES if getattr(config, name) is None})


def describe(config: TrainConfig, run: RunConfig, examples: int, steps: int) -> str | None:
    """Returns which numbers were chosen and why; None if the settings had all."""
    free = [name for name in NAMES if getattr(config, name) is None]
    if config.max_steps is not None:  # which decides the length
        free = [name for name in free if name != "num_train_epochs"]
    chosen = [NAMES[name].format(getattr(run, name)) for name in free]
    reason = "" if examples > SMALL[-1].examples else ", because small data needs steps"
    return f"{examples:,} examples: {', '.join([*chosen, f'{steps:,} steps'])}{reason}" if chosen else None
