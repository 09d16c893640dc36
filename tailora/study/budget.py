"""What the runs of a study cost, and how much of the study fits into its time limit.

    measure_costs    a few steps -> Costs; ends as soon as they show that the time is too short
    fit              Costs, time -> Extent and steps: less is done until runs of a useful length fit
    TimeLimit        the same for a comparison or a search, with an error if not even the least fits

A trial of S steps takes  fixed + S step + evaluations;  a judging run takes  fixed + S step + one evaluation of twice
as many examples. The base's losses are known from the first steps. Successive halving ends half of the trials of a
search at a third of their steps, and half of the rest at two thirds, so a trial takes about 7/12 of its steps; the
first and the last are planned whole.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from statistics import median

from tailora.errors import ConfigError
from tailora.study.study_store import StudySession
from tailora.study.trial import Listen, Trial, TrialEvent
from tailora.train.config import TrainConfig

RUNGS = 3  # evaluations of a whole trial, at equal distances; halving at the first and the second
TIMING_STEPS = 4
TIMING_RATE = 1e-6  # hardly trains anything, and so cannot diverge
FEWEST_STEPS = 9  # 3 at the first rung
FEWEST_SEEDS = 2  # one seed does not show how much results change from seed to seed
FEWEST_HELD_OUT = 40  # examples, half of which judge
SAFETY = 0.9  # share of the time that is planned, since a few steps measure it roughly
MARGIN = 4 / 3  # of the minutes that are advised: a few steps differ by that from one start to the next
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

    def on_part(self, share: float) -> "Costs":
        """Returns the costs with this share of the held-out examples."""
        return replace(self, evaluation=share * self.evaluation)


def seconds_of_workers(costs: Sequence[Costs], seconds: Callable[[Costs], float], workers: int) -> float:
    """Returns the most seconds that workers need for runs of these costs, if each begins the next when it is free.

    seconds: of one run. This is Graham's bound on list scheduling: with W workers, the sum of all runs divided by W,
    and (1 - 1 / W) times the longest run. The longest run is taken to have the highest of each cost (fixed, step, ...),
    so that the bound is linear in the steps, which `fit` needs.
    """
    if not costs:
        return 0.0
    parts = zip(*map(astuple, costs), strict=True)
    longest = seconds(Costs(*map(max, parts)))
    return sum(map(seconds, costs)) / workers + (1 - 1 / workers) * longest


START = Costs(fixed=2, step=0, evaluation=0)  # no run takes less: a new process loads torch and the model


@dataclass(frozen=True)
class Extent:
    """How much a study does.

    tries: learning rates of an arm, or trials of a search.    seeds: of each arm or finalist that is judged.
    part: share of the held-out examples that are used.
    """

    tries: int
    seeds: int
    part: float = 1.0


@dataclass(frozen=True)
class Budget:
    """steps: of a whole trial.    longest: how many the run's settings ask for.
    seeds: that time is kept for.    held_out: number of held-out examples that are used; None for all.
    minutes: that this was planned for.    processes: of the runs that were timed.
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
    def judging_seconds(self) -> float:
        """Of one run that judges."""
        return self.costs.judging_run(self.steps)


# ---- What runs cost


def measure_costs(
    session: StudySession, run: Callable[[Listen], Trial], check: Callable[[Costs], object], *, choosing: bool
) -> tuple[Costs | None, Trial]:
    """Runs a few steps. Returns what runs like this cost, or None if they failed; and the trial.

    check: called with every step and evaluation; gets costs that are not too high, and raises if these are too high.
    choosing: whether only the choosing half of the held-out examples is evaluated.
    """
    begun, half_count = session.seconds, 1 if choosing else 2
    seconds: dict[bool, list[float]] = {True: [], False: []}  # held_out -> of each event

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
    # a trial that was read from its folder has taken no time now
    total = max(session.seconds - begun, trial.numbers["seconds"] + forgetting + writing)
    costs = Costs(
        fixed=total - sum(trial.step_seconds) - sum(trial.evaluation_seconds) - forgetting - writing,
        step=median(trial.step_seconds),
        evaluation=min(trial.evaluation_seconds) / half_count,  # the fastest, which nothing delayed
        forgetting=forgetting,
    )
    return costs, trial


# ---- What fits


def longest_run(train: TrainConfig, trial: Trial) -> int:
    """Returns the steps that the settings ask for. trial: any trial on the same data."""
    return train.max_steps or trial.numbers["all_steps"] or 1


def extents(most: Extent, fewest: Extent) -> Iterator[Extent]:
    """Yields the most, then less, in the order in which it is given up: tries, seeds, held-out examples."""
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
    """Returns the most that fits into the seconds in runs of FEWEST_STEPS, and the steps that fit then, or None.

    longest: steps that the settings ask for.    needed: extent, steps -> seconds, which grow evenly with the steps.
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
    """seconds: that the least takes from now on, as far as it was timed.    what: the least, in the plural."""
    needed = (session.seconds + seconds / SAFETY) / 60
    return ConfigError(
        f"--minutes {session.minutes:g} is too short: {what} take at least {math.ceil(needed)} min, by what was timed "
        f"so far. Use --minutes {math.ceil(MARGIN * needed)} or more, fewer steps or runs, or a smaller --max-length"
    )


@dataclass(frozen=True)
class TimeLimit:
    """What a study does if there is time, and the least that it does, which must fit into its minutes.

    wanted: everything.    fewest_tries: that allow a verdict.
    fixed: of 'tries' and 'seeds' what the user has given; it is not reduced.
    describe: extent, steps of a run -> the runs of that extent in words, in the plural.
    """

    session: StudySession
    wanted: Extent
    fewest_tries: int
    fixed: Collection[str]
    describe: Callable[[Extent, int], str]

    def fewest(self, part: float = 1.0) -> Extent:
        """Returns the least that allows a verdict. part: of the held-out examples."""
        tries, seeds = self.wanted.tries, self.wanted.seeds
        return Extent(
            tries if "tries" in self.fixed else min(self.fewest_tries, tries),
            seeds if "seeds" in self.fixed else min(FEWEST_SEEDS, seeds),
            part,
        )

    def check(self, needed: Callable[[Extent, int], float], longest: int | None) -> None:
        """Raises ConfigError if the time left is too short for the least.

        needed: extent, steps -> seconds, not too many, on the fewest held-out examples.
        longest: steps that the settings ask for, if known.
        """
        steps = min(FEWEST_STEPS, longest or FEWEST_STEPS)
        if needed(self.fewest(), steps) > self.session.seconds_left:
            raise self._too_short(needed, self.fewest(), steps)

    def choose(self, needed: Callable[[Extent, int], float], longest: int, held_out: int) -> tuple[Extent, int]:
        """Returns the extent and the steps that fit, as `fit` does. Raises ConfigError if not even the least fits.

        held_out: number of held-out examples.
        """
        fewest = self.fewest(part=min(1.0, FEWEST_HELD_OUT / held_out))
        choice = fit(self.wanted, fewest, longest, self.session.seconds_left, needed)
        if choice is None:
            raise self._too_short(needed, fewest, min(FEWEST_STEPS, longest))
        return choice

    def _too_short(self, needed: Callable[[Extent, int], float], fewest: Extent, steps: int) -> ConfigError:
        return too_short(self.session, needed(fewest, steps), self.describe(fewest, steps))


def held_out_in_use(extent: Extent, held_out: int) -> int | None:
    """Returns how many of so many held-out examples are used; None for all."""
    return None if extent.part == 1 else round(extent.part * held_out)
