"""A few steps before anything else: what they cost, how many the settings ask for, which parts the model has."""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from tailora.errors import ConfigError
from tailora.study.budget import PROBE_STEPS, Costs
from tailora.study.space import Axis
from tailora.study.trial import Progress, Spec, try_out
from tailora.train.config import TrainConfig

SMALL_RATE = 1e-6  # that trains hardly anything, and so cannot diverge


def probe_settings(space: Mapping[str, Axis], train: TrainConfig) -> dict[str, Any]:
    """All layers, which is the dearest, at the lowest rank, which fits if any does."""
    ranks = space.get("r", (train.r,))
    assert isinstance(ranks, tuple)
    return {"learning_rate": SMALL_RATE, "max_steps": PROBE_STEPS, **({"r": min(ranks)} if "r" in space else {})}


def probe(spec: Spec, folder: Path, train: TrainConfig, progress: Progress | None) -> tuple[Costs, int, dict[str, Any]]:
    """Costs, the steps that the settings ask for, parts of the model (`study.parts`). Raises ConfigError."""
    started = time.monotonic()
    trial = try_out(spec, folder, progress)
    seconds = time.monotonic() - started
    if not trial.done:
        raise ConfigError(f"{PROBE_STEPS} steps at a rate of {SMALL_RATE:g} already end so: {trial.message}")
    total = max(seconds, trial.numbers["seconds"])  # it may be one that was made before
    step, evaluation = median(trial.step_seconds), min(trial.evaluation_seconds)  # not those that something held up
    costs = Costs(
        fixed=total - sum(trial.step_seconds) - sum(trial.evaluation_seconds) + evaluation,
        step=step,
        evaluation=evaluation,
    )
    return costs, _longest(train, trial.numbers["examples"]), trial.numbers["parts"]


def _longest(train: TrainConfig, examples: int | None) -> int:
    if train.max_steps is not None or examples is None:
        return train.max_steps or 1
    epoch = math.ceil(math.ceil(examples / train.per_device_train_batch_size) / train.gradient_accumulation_steps)
    return math.ceil(train.num_train_epochs * epoch)
