"""Learning-rate schedules: functions of the step alone, so that a continued run needs no scheduler state."""

import math
from collections.abc import Callable

from tailora.train.config import TrainConfig

LRSchedule = Callable[[int, int], float]  # step (0..total-1), number of steps -> learning rate

DECAYS: dict[str, Callable[[float], float]] = {  # share of the steps after warm-up, 0..1 -> share of the peak
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
    "constant": lambda _done: 1.0,
}


def lr_schedule(config: TrainConfig) -> LRSchedule:
    """Returns the schedule that the settings name: warm-up, then a cosine, linear or no decay."""
    settings = config.learning_rate, config.warmup_ratio, config.lr_scheduler_type
    return lambda step, total: learning_rate(step, total, *settings)


def learning_rate(step: int, total: int, peak: float, warmup_ratio: float, decay: str) -> float:
    """Returns the rate of a step (0..total-1): it rises to `peak` in the warm-up, then decays towards 0 at `total`."""
    warmup = math.ceil(warmup_ratio * total)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * DECAYS[decay]((step - warmup) / max(total - warmup, 1))


def lr_range_test(step: int, total: int, low: float, high: float) -> float:
    """Returns the rate of a step of a range test (arXiv:1506.01186): from `low` to `high` by a constant factor."""
    return float(low * (high / low) ** (step / max(total - 1, 1)))
