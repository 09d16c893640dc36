"""A few steps before anything else: what they cost, how many the settings ask for, which parts the model has."""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from tailora.errors import ConfigError
from tailora.study.budget import PROBE_STEPS, Costs
from tailora.study.search_space import Axis
from tailora.study.trial import Progress, Spec, Trial, try_out
from tailora.train.config import TrainConfig

SMALL_RATE = 1e-6  # that trains hardly anything, and so cannot diverge


def probe_settings(space: Mapping[str, Axis], train: TrainConfig) -> dict[str, Any]:
    """All layers, which is the dearest, at the lowest rank, which fits if any does."""
    ranks = space.get("r", (train.r,))
    assert isinstance(ranks, tuple)
    return {"learning_rate": SMALL_RATE, "max_steps": PROBE_STEPS, **({"r": min(ranks)} if "r" in space else {})}


def probe(spec: Spec, folder: Path, progress: Progress | None) -> tuple[Costs, Trial]:
    """What runs of this kind cost, and the few steps themselves. Raises ConfigError."""
    started = time.monotonic()
    trial = try_out(spec, folder, progress)
    seconds = time.monotonic() - started
    if not trial.done:
        raise ConfigError(f"{PROBE_STEPS} steps at a rate of {SMALL_RATE:g} already end so: {trial.message}")
    return costs_of(trial, seconds, halves=1 if spec.choosing else 2), trial


def costs_of(trial: Trial, seconds: float, *, halves: int) -> Costs:
    """seconds: that it took just now; nearly none where it was made before.    halves: held out that it evaluated."""
    forgetting, writing = (trial.numbers.get(f"{what}_seconds", 0.0) for what in ("forgetting", "writing"))
    total = max(seconds, trial.numbers["seconds"] + forgetting + writing)
    return Costs(
        fixed=total - sum(trial.step_seconds) - sum(trial.evaluation_seconds) - forgetting - writing,
        step=median(trial.step_seconds),
        evaluation=min(trial.evaluation_seconds) / halves,  # not one that something held up
        forgetting=forgetting,
    )


def longest(train: TrainConfig, examples: int | None) -> int:
    """Steps that the settings ask for."""
    if train.max_steps is not None or examples is None:
        return train.max_steps or 1
    epoch = math.ceil(math.ceil(examples / train.per_device_train_batch_size) / train.gradient_accumulation_steps)
    return math.ceil(train.num_train_epochs * epoch)
