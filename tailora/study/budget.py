"""How long the runs of a study take, and how much of the study fits into its time limit.

    measure_costs    a few steps -> Costs; stops as soon as they show that the time is too short
    fit              Costs, time -> Extent and steps: reduces the extent until runs of a useful length fit
    TimeLimit        the same for a whole study, with an error if even the minimum does not fit

A trial of S steps takes  fixed + S step + evaluations;  a final run takes  fixed + S step + one evaluation of twice
as many examples. The base's losses are known from the timing run. Successive halving ends half of the trials of a
search after a third of their steps, and half of the rest after two thirds, so a trial takes about 7/12 of its steps
on average. The first and the last trial are planned at full length.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from statistics import median

from tailora.errors import ConfigError
from tailora.study.study_store import StudySession
from tailora.study.trial import Listen, Trial, TrialEvent
from tailora.train.config import TrainConfig

RUNGS = 3  # evaluations of a complete trial, equally spaced; halving happens at the first and the second
TIMING_STEPS = 4
TIMING_RATE = 1e-6  # so low that it cannot diverge
FEWEST_STEPS = 9  # 3 at the first rung
FEWEST_SEEDS = 2  # one seed does not show how much results vary between seeds
FEWEST_HELD_OUT = 40  # examples, half of them for the evaluation
SAFETY = 0.9  # planned share of the time, because a few steps are a rough measurement
MARGIN = 4 / 3  # on top of recommended minutes: the timing of a few steps varies this much between starts
SHARE = 7 / 12  # of its steps that a trial runs on average


@dataclass(frozen=True)
class Costs:
    """The seconds that parts of a run take, measured in a few steps.

    fixed: imports and loading.    step: one step.
    evaluation: half of the held-out examples.    forgetting: measuring forgetting.
    """

    fixed: float
    step: float
    evaluation: float
    forgetting: float = 0.0

    def trial(self, steps: float, share: float = 1.0, evaluations: float = RUNGS) -> float:
        return self.fixed + share * (steps * self.step + evaluations * self.evaluation)

    def final_run(self, steps: float) -> float:
        return self.fixed + steps * self.step + 2 * self.evaluation + self.forgetting

    def on_part(self, share: float) -> "Costs":
        """Returns the costs for this share of the held-out examples."""
        return replace(self, evaluation=share * self.evaluation)


def seconds_of_workers(costs: Sequence[Costs], seconds: Callable[[Costs], float], workers: int) -> float:
    """Returns an upper bound on the seconds that workers need for runs of these costs, without idling in between.

    seconds: costs -> seconds of one run. This is Graham's bound for list scheduling with W workers: the sum of all runs
    divided by W, plus (1 - 1 / W) times the longest run. Combining the highest of each cost (fixed, step, ...) into
    the longest run keeps the bound linear in the steps, as `fit` needs it.
    """
    if not costs:
        return 0.0
    parts = zip(*map(astuple, costs), strict=True)
    longest = seconds(Costs(*map(max, parts)))
    return sum(map(seconds, costs)) / workers + (1 - 1 / workers) * longest


START = Costs(fixed=2, step=0, evaluation=0)  # the minimum for any run: a new process loads torch and the model


@dataclass(frozen=True)
class Extent:
    """How much a study does.

    tries: learning rates per arm, trials of a search, or subsets of a learning curve at the higher rank.
    seeds: final runs per arm, finalist or subset.    part: share of the held-out examples in use.
    """

    tries: int
    seeds: int
    part: float = 1.0

    def held_out(self, examples: int) -> int | None:
        """Returns how many of these held-out examples are used; None for all."""
        return None if self.part == 1 else round(self.part * examples)


@dataclass(frozen=True)
class Budget:
    """steps: of a complete trial.    longest: number of steps in the run's settings.
    seeds: number of seeds the budget has time for.    held_out: number of held-out examples used, None for all.
    minutes: the time limit of the plan.    processes: of each timed run.
    """

    steps: int
    longest: int
    costs: Costs
    seeds: int = FEWEST_SEEDS
    held_out: int | None = None
    minutes: float | None = None
    processes: int = 1

    @property
    def rung(self) -> int:
        """Steps between evaluations."""
        return math.ceil(self.steps / RUNGS)

    @property
    def trial_seconds(self) -> float:
        return self.costs.trial(self.steps)

    @property
    def final_run_seconds(self) -> float:
        return self.costs.final_run(self.steps)


# ---- What runs cost


def measure_costs(
    session: StudySession, run: Callable[[Listen], Trial], check: Callable[[Costs], object], *, choosing: bool
) -> tuple[Costs | None, Trial]:
    """Runs a few steps. Returns the costs of runs like this, or None if the steps failed, and the trial.

    check: called after every step and evaluation with a lower bound of the costs; raises if that is too high.
    choosing: whether only the selection half of the held-out examples is evaluated.
    """
    begun, half_count = session.seconds, 1 if choosing else 2
    seconds: dict[bool, list[float]] = {True: [], False: []}  # held_out -> seconds of each event

    def listen(event: TrialEvent) -> None:
        seconds[event.held_out].append(event.seconds)
        steps, evaluations = seconds[False], seconds[True]
        check(
            Costs(
                fixed=session.seconds - begun - sum(steps) - sum(evaluations),
                step=min(steps[1:], default=0.0),  # the first step is slower
                evaluation=min(evaluations, default=0.0) / half_count,
            )
        )

    trial = run(listen)
    if not trial.done:
        return None, trial
    forgetting, writing = (trial.numbers.get(f"{part}_seconds", 0.0) for part in ("forgetting", "writing"))
    # a trial that was read from its folder took no time now
    total = max(session.seconds - begun, trial.numbers["seconds"] + forgetting + writing)
    costs = Costs(
        fixed=total - sum(trial.step_seconds) - sum(trial.evaluation_seconds) - forgetting - writing,
        step=median(trial.step_seconds),
        evaluation=trial.evaluation_seconds[-1] / half_count,  # the first may have been known
        forgetting=forgetting,
    )
    return costs, trial


# ---- What fits


def longest_run(train: TrainConfig, trial: Trial) -> int:
    """Returns the number of steps in the settings. trial: any trial on the same data."""
    return train.max_steps or trial.numbers["all_steps"] or 1


def extents(most: Extent, fewest: Extent) -> Iterator[Extent]:
    """Yields the full extent, then smaller ones: first with fewer tries, then seeds, then held-out examples."""
    for tries in range(most.tries, fewest.tries - 1, -1):
        yield replace(most, tries=tries)
    for seeds in range(most.seeds - 1, fewest.seeds - 1, -1):
        yield replace(fewest, seeds=seeds, part=most.part)
    part = most.part
    while part > fewest.part:
        part = max(part / 2, fewest.part)
        yield replace(fewest, part=part)


def fit(
    most: Extent, fewest: Extent, longest: int, seconds: float, needed: Callable[[Extent, int], float]
) -> tuple[Extent, int] | None:
    """Returns the largest extent that fits with FEWEST_STEPS per run, and the steps that then fit; None if none does.

    longest: number of steps in the settings.    needed: extent, steps -> seconds; linear in the steps.
    """
    if math.isinf(seconds):
        return most, longest
    for extent in extents(most, fewest):
        start = needed(extent, 0)
        steps = int((seconds * SAFETY - start) / (needed(extent, 1) - start))
        if steps >= min(FEWEST_STEPS, longest):
            return extent, min(steps, longest)
    return None


def too_short(session: StudySession, seconds: float, what: str) -> ConfigError:
    """seconds: of the minimum extent from now on, as timed so far.    what: the minimum extent in words, plural."""
    needed = (session.seconds + seconds / SAFETY) / 60
    return ConfigError(
        f"--minutes {session.minutes:g} is too short: {what} take at least {math.ceil(needed)} min "
        f"according to the timings so far. Use --minutes {math.ceil(MARGIN * needed)} or more, fewer steps or runs, "
        "or a smaller --max-length"
    )


def no_costs(trial: Trial) -> ConfigError:
    return ConfigError(f"the first {TIMING_STEPS} steps failed, at a learning rate of {TIMING_RATE:g}: {trial.message}")


@dataclass(frozen=True)
class TimeLimit:
    """The full extent of a study, and the minimum that must fit into its minutes.

    wanted: the full extent.    fewest_tries: minimum for a verdict.
    fixed: 'tries' and 'seeds', if set by the user; they are not reduced.
    describe: extent, steps per run -> that extent in words, plural.
    """

    session: StudySession
    wanted: Extent
    fewest_tries: int
    fixed: Collection[str]
    describe: Callable[[Extent, int], str]

    def fewest(self, part: float = 1.0) -> Extent:
        """Returns the minimum extent for a verdict. part: share of the held-out examples."""
        tries, seeds = self.wanted.tries, self.wanted.seeds
        return Extent(
            tries if "tries" in self.fixed else min(self.fewest_tries, tries),
            seeds if "seeds" in self.fixed else min(FEWEST_SEEDS, seeds),
            part,
        )

    def check(self, needed: Callable[[Extent, int], float], longest: int | None) -> None:
        """Raises ConfigError if the time left is too short for the minimum extent.

        needed: extent, steps -> a lower bound of the seconds, with the minimum number of held-out examples.
        longest: number of steps in the settings, if known.
        """
        fewest, steps = self.fewest(), min(FEWEST_STEPS, longest or FEWEST_STEPS)
        if needed(fewest, steps) > self.session.seconds_left:
            raise too_short(self.session, needed(fewest, steps), self.describe(fewest, steps))

    def choose(self, needed: Callable[[Extent, int], float], longest: int, held_out: int) -> tuple[Extent, int]:
        """Returns the extent and the steps that fit. Raises ConfigError if even the minimum does not fit.

        held_out: number of held-out examples.
        """
        fewest = self.fewest(part=min(1.0, FEWEST_HELD_OUT / held_out))
        choice = fit(self.wanted, fewest, longest, self.session.seconds_left, needed)
        if choice is None:
            steps = min(FEWEST_STEPS, longest)
            raise too_short(self.session, needed(fewest, steps), self.describe(fewest, steps))
        return choice
