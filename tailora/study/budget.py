"""How long a trial of a search is, so that enough of them and the runs that judge fit into the time there is.

A trial of S steps takes  fixed + S step + 3 evaluations;  a run that judges  fixed + S step and an evaluation of twice
the examples. What the base has on them is known from the first steps. Halving ends half of the trials at a third of
their steps and half of the rest at two thirds, so a trial makes about 7/12 of its steps.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from tailora.errors import ConfigError
from tailora.study.search_space import Axis
from tailora.study.trial import Progress, Spec, Trial, try_out
from tailora.train.config import TrainConfig

RUNGS = 3  # evaluations of a whole trial, evenly spaced; halving at the first and the second
PROBE_STEPS = 4
FEWEST_STEPS = 9  # 3 at the first rung
MOST, FEWEST = 16, 6  # trials, where the time decides
SAFETY = 0.9  # share of the time that is planned with: a probe is short
SHARE = 7 / 12  # of its steps that a trial makes


@dataclass(frozen=True)
class Costs:
    """Seconds, measured on a few steps."""

    fixed: float  # of a run beside its steps: imports, loading
    step: float
    evaluation: float  # of half of the held-out examples
    forgetting: float = 0.0

    def trial(self, steps: int, share: float = 1.0, evaluations: int = RUNGS) -> float:
        return self.fixed + share * (steps * self.step + evaluations * self.evaluation)

    def final(self, steps: int) -> float:
        return self.fixed + steps * self.step + 2 * self.evaluation + self.forgetting


@dataclass(frozen=True)
class Plan:
    steps: int  # of a whole trial
    longest: int  # that the run's settings ask for
    costs: Costs

    @property
    def rung(self) -> int:
        """Steps between evaluations."""
        return math.ceil(self.steps / RUNGS)

    @property
    def trial_seconds(self) -> float:
        return self.costs.trial(self.steps)

    @property
    def final_seconds(self) -> float:
        return self.costs.final(self.steps)

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def read_plan(content: dict[str, object]) -> Plan:
    costs = content.pop("costs")
    assert isinstance(costs, dict)
    return Plan(**content, costs=Costs(**costs))  # type: ignore[arg-type]


def planned(costs: Costs, longest: int, seconds: float, trials: int | None, finals: int) -> Plan:
    """seconds: that are left, or infinite.  trials: wanted, None for as many as fit.  finals: runs that judge.

    Raises ConfigError for too little time.
    """
    if math.isinf(seconds):
        return Plan(longest, longest, costs)
    for number in [trials] if trials else range(MOST, FEWEST - 1, -1):
        steps = _steps(costs, seconds * SAFETY, number, finals)
        if steps >= min(FEWEST_STEPS, longest):
            return Plan(min(steps, longest), longest, costs)
    fewest = trials or FEWEST
    shortest = min(FEWEST_STEPS, longest)
    needs = (fewest * costs.trial(shortest, SHARE) + finals * costs.final(shortest)) / SAFETY
    raise ConfigError(
        f"{fewest} trials of {shortest} steps and {finals} runs that judge take about {math.ceil(needs / 60)} minutes, "
        f"and {max(seconds, 0) / 60:.1f} are left: give more --minutes, or fewer --seeds, --finalists or --trials"
    )


def _steps(costs: Costs, seconds: float, trials: int, finals: int) -> int:
    """Steps of a trial when so many fit exactly."""
    fixed = trials * costs.trial(0, SHARE) + finals * costs.final(0)
    return int((seconds - fixed) / (costs.step * (SHARE * trials + finals)))


# ---- A few steps before anything else: what they cost, how many the settings ask for, which parts the model has.


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
