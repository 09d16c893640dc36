"""How many steps a trial of a search has, so that enough trials, and the judging runs, fit into the time limit.

    measure_costs    a few steps -> Costs
    budget_for       Costs, time, number of trials -> Budget

A trial of S steps takes  fixed + S step + 3 evaluations;  a judging run takes  fixed + S step + one evaluation of twice
as many examples. The base's losses are known from the first steps. Successive halving ends half of the trials at
a third of their steps, and half of the rest at two thirds, so a trial takes about 7/12 of its steps.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tailora.errors import ConfigError
from tailora.study.study_store import StudySession
from tailora.study.trial import Trial, TrialSpec
from tailora.train.config import TrainConfig

RUNGS = 3  # evaluations of a whole trial, at equal distances; halving at the first and the second
TIMING_STEPS = 4
TIMING_RATE = 1e-6  # hardly trains anything, and so cannot diverge
FEWEST_STEPS = 9  # 3 at the first rung
MOST_TRIALS, FEWEST_TRIALS = 16, 6  # if the time limit decides
SAFETY = 0.9  # share of the time that is planned, since a few steps measure it roughly
SHARE = 7 / 12  # of its steps that a trial takes on average


@dataclass(frozen=True)
class Costs:
    """Seconds of a run, measured in a few steps.

    fixed: beside its steps, for imports and loading.    step: of one step.
    evaluation: of half of the held-out examples.    forgetting: of measuring what was forgotten.
    """

    fixed: float
    step: float
    evaluation: float
    forgetting: float = 0.0

    def trial(self, steps: int, share: float = 1.0, evaluations: int = RUNGS) -> float:
        return self.fixed + share * (steps * self.step + evaluations * self.evaluation)

    def judging_run(self, steps: int) -> float:
        return self.fixed + steps * self.step + 2 * self.evaluation + self.forgetting


@dataclass(frozen=True)
class Budget:
    """steps: of a whole trial.    longest: how many the run's settings ask for."""

    steps: int
    longest: int
    costs: Costs

    @property
    def rung(self) -> int:
        """Steps between evaluations."""
        return math.ceil(self.steps / RUNGS)

    @property
    def trial_seconds(self) -> float:
        return self.costs.trial(self.steps)

    @property
    def judging_seconds(self) -> float:
        """Of one run that judges."""
        return self.costs.judging_run(self.steps)


def measure_costs(session: StudySession, spec: TrialSpec, path: Path) -> tuple[Costs, Trial]:
    """Runs a few steps, and returns what runs like this cost, and the trial. Raises ConfigError if it fails."""
    started = session.seconds
    trial = session.trial(spec, path)
    if not trial.done:
        raise ConfigError(f"{TIMING_STEPS} steps at a learning rate of {TIMING_RATE:g} already fail: {trial.message}")
    return costs_of(trial, session.seconds - started, choosing=spec.choosing), trial


def costs_of(trial: Trial, seconds: float, *, choosing: bool) -> Costs:
    """seconds: that the trial took just now; nearly 0 if it was read from its folder.
    choosing: whether it evaluated the choosing half of the held-out examples only.
    """
    forgetting, writing = (trial.numbers.get(f"{part}_seconds", 0.0) for part in ("forgetting", "writing"))
    total = max(seconds, trial.numbers["seconds"] + forgetting + writing)
    return Costs(
        fixed=total - sum(trial.step_seconds) - sum(trial.evaluation_seconds) - forgetting - writing,
        step=median(trial.step_seconds),
        evaluation=min(trial.evaluation_seconds) / (1 if choosing else 2),  # the fastest, which nothing delayed
        forgetting=forgetting,
    )


def longest_run(train: TrainConfig, examples: int | None) -> int:
    """Steps that the settings ask for."""
    if train.max_steps is not None or examples is None:
        return train.max_steps or 1
    epoch = math.ceil(math.ceil(examples / train.per_device_train_batch_size) / train.gradient_accumulation_steps)
    return math.ceil(train.num_train_epochs * epoch)


def budget_for(costs: Costs, longest: int, seconds: float, trials: int | None, judging_runs: int) -> Budget:
    """seconds: the time left, or infinite.    trials: how many are wanted; None for as many as fit.

    Raises ConfigError for too little time.
    """
    if math.isinf(seconds):
        return Budget(longest, longest, costs)
    shortest = min(FEWEST_STEPS, longest)
    for count in [trials] if trials else range(MOST_TRIALS, FEWEST_TRIALS - 1, -1):
        fixed = count * costs.trial(0, SHARE) + judging_runs * costs.judging_run(0)
        steps = int((seconds * SAFETY - fixed) / (costs.step * (SHARE * count + judging_runs)))
        if steps >= shortest:
            return Budget(min(steps, longest), longest, costs)
    fewest = trials or FEWEST_TRIALS
    needs = (fewest * costs.trial(shortest, SHARE) + judging_runs * costs.judging_run(shortest)) / SAFETY
    raise ConfigError(
        f"{fewest} trials of {shortest} steps and {judging_runs} runs that judge take about {math.ceil(needs / 60)} "
        f"minutes, and {max(seconds, 0) / 60:.1f} are left: give more --minutes, or fewer --seeds, --finalists or "
        "--trials"
    )
