"""Compares LoRA with full fine-tuning, or any arms with each other: same data, same order, same tokens, same seeds.

    a few steps of each arm (with --minutes)      -> steps that fit
    for each arm its own learning rate            judged on the choosing half of the held-out examples
    for each arm and seed a run at that rate      judged on the other half -> differences, verdict

A comparison is fair only if every arm has its own best learning rate, so every arm gets the same number of tries. The
examples and seeds that judge an arm are not those that chose its rate. The same call resumes an interrupted comparison;
finished runs are read from their folders. Several workers try the rates of the arms at the same time. Then they make
the runs that judge: all at once, or with --minutes in waves.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from tailora.data.schemas import SEQ2SEQ
from tailora.errors import ConfigError, TargetError
from tailora.formats.io import read_own_json, write_file
from tailora.formats.run_folder import write_report
from tailora.study.budget import (
    FEWEST_HELD_OUT,
    FEWEST_STEPS,
    START,
    TIMING_STEPS,
    Costs,
    Extent,
    TimeLimit,
    held_out_in_use,
    longest_run,
    measure_costs,
    seconds_of_workers,
)
from tailora.study.config import FULL, CompareConfig, arm_settings
from tailora.study.lr_range import LearningRateSearch
from tailora.study.results import Comparison
from tailora.study.search_space import STEP_CHOICE
from tailora.study.study_store import (
    DAMAGED,
    TIMING,
    Log,
    Settings,
    StudySession,
    launch_settings,
    locked,
    make_workers,
    open_folder,
    threads_of,
)
from tailora.study.trial import (
    OUT_OF_MEMORY,
    RESULT,
    BaseLosses,
    Listen,
    Progress,
    RunTrial,
    Trial,
    TrialSpec,
    Worker,
    on_choosing_half,
    run_in_subprocess,
)
from tailora.study.verdict import judge_arms
from tailora.train.config import TASK_TYPES, TrainConfig

STUDY, CLOCK, RUNS = "compare.json", "seconds.json", "runs"
FEWEST_TRIES = 3  # learning rates: the best, a lower and a higher one
LATER = {"seeds", "rate_tries", "minutes", "margin", "workers"}  # of which a comparison may be asked for more


def compare(
    train: TrainConfig,
    study: CompareConfig,
    log: Log = lambda _: None,
    progress: Progress | None = None,
    run_trial: RunTrial = run_in_subprocess,
    *,
    processes: int = 1,
) -> Comparison:
    """Runs what is missing of the comparison in `train.output_dir`, and judges.

    processes: that train together in each run.
    Raises ConfigError; whatever a run raises that is neither divergence nor lack of memory.
    """
    folder = Path(train.output_dir)
    settings = {
        "train": train.model_dump(mode="json", exclude={"output_dir"}),
        "compare": study.model_dump(mode="json"),
        **launch_settings(processes),
    }
    if names := sorted(name for name in STEP_CHOICE if getattr(train, name)):
        raise ConfigError(f"a comparison judges every run at its end: leave {' and '.join(names)} out")
    if not measures_forgetting(train) and study.forgetting_data is not None:
        raise ConfigError(
            f"--task {train.task}: forgetting is measured of language models, which this task does not train: leave "
            "--forgetting-data out"
        )
    for arm in study.arms:
        arm_settings(train, study, arm, learning_rate=study.first_rate(arm))  # raises ConfigError for contradictions
    workers = make_workers(study.workers, train.device, study.minutes, processes)
    busy = f"another comparison is writing to {folder} now; give another --output-dir"
    with locked(folder, STUDY, busy=busy):
        begun = any((folder / RUNS).glob(f"*/[!p]*/{RESULT}"))  # without the timing runs
        open_folder(folder, STUDY, settings, begun=begun, identity=_identity)
        session = StudySession(folder, study.minutes, log, progress, run_trial, processes)
        comparison = _Comparison(train, study, session, workers).run(settings)
    write_report(folder, "compare", comparison.to_dict())
    return comparison


def _identity(settings: Settings) -> Settings:
    """What makes two comparisons different. With minutes the steps are planned, by the time that runs take."""
    study = settings.get("compare", {})
    fixed = {name: value for name, value in study.items() if name not in LATER}
    has_minutes = study.get("minutes") is not None
    return {**settings, "compare": {**fixed, "minutes": "given" if has_minutes else "not given"}}


def _needed(costs: Sequence[Costs], extent: Extent, steps: int, workers: int) -> float:
    """Returns the seconds of all runs of the arms with these costs."""
    of_arms = [arm.on_part(extent.part) for arm in costs]
    tries = _seconds_of_tries(of_arms, steps, workers)
    return extent.tries * tries + _seconds_of_waves(of_arms, extent.seeds, steps, workers)


def _seconds_of_tries(costs: Sequence[Costs], steps: int, workers: int) -> float:
    return seconds_of_workers(costs, lambda arm: arm.trial(steps, evaluations=1), workers)


def _seconds_of_judging(costs: Sequence[Costs], steps: int, workers: int) -> float:
    return seconds_of_workers(costs, lambda arm: arm.judging_run(steps), workers)


def _seconds_of_waves(costs: Sequence[Costs], seeds: int, steps: int, workers: int) -> float:
    """Returns the seconds of all runs that judge. A wave begins when all runs of the one before have ended.

    costs: of each arm.
    """
    waves = _seeds_of_waves(range(seeds), len(costs), workers)
    return sum(_seconds_of_judging([*costs] * len(wave), steps, workers) for wave in waves)


def _seeds_of_waves(seeds: Sequence[int], arms: int, workers: int) -> list[list[int]]:
    """Returns the seeds of each wave, with --minutes: no more than the workers need to have a run each."""
    count = max(workers // max(arms, 1), 1)
    return [list(seeds[start : start + count]) for start in range(0, len(seeds), count)]


@dataclass(frozen=True)
class ComparisonPlan:
    """plan.json.

    max_steps: of each run.    costs: of each arm.    seeds: that time is kept for.
    held_out: number of held-out examples that are used, None for all; of so many `examples`.
    minutes: that this was planned for.    processes: of the runs that were timed.
    """

    max_steps: int
    costs: dict[str, Costs]
    seeds: int
    held_out: int | None
    examples: int
    minutes: float | None
    processes: int = 1


WITHOUT_MINUTES = ComparisonPlan(max_steps=0, costs={}, seeds=0, held_out=None, examples=0, minutes=None)


class _Comparison:
    """The runs of one comparison, in order; with workers, as many at a time as there are."""

    def __init__(
        self, train: TrainConfig, study: CompareConfig, session: StudySession, workers: Sequence[Worker] = ()
    ) -> None:
        self.train, self.study, self.session, self.folder = train, study, session, session.folder
        self.workers = workers
        self.limit = self._time_limit()
        clock = self.folder / CLOCK
        self.earlier_seconds = read_own_json(clock, float, DAMAGED) if clock.exists() else 0.0
        self.plan = WITHOUT_MINUTES  # max_steps = 0 leaves the settings' own
        self.base: dict[tuple[str, bool], BaseLosses | None] = {}  # arm, choosing -> losses of its base

    def run(self, settings: dict[str, Any]) -> Comparison:
        if self.study.minutes is not None:
            self._plan()
        rates = self._search_rates()
        runs = self._judging_runs(rates)
        self.session.note_workers(chain(*runs.values()))
        done = next((trial for trials in runs.values() for trial in trials if trial.done), None)
        if done is not None:
            self.session.note_data(done)
        seconds = read_own_json(self.folder / CLOCK, float, DAMAGED)
        return judge_arms(self.study, rates, runs, notes=self.session.notes, settings=settings, seconds=seconds)

    def _path(self, arm: str, name: str) -> Path:
        return self.folder / RUNS / arm / name

    def _trial(
        self,
        arm: str,
        name: str,
        *,
        judging: bool,
        held_out: int | None = None,
        stop: Listen | None = None,
        session: StudySession | None = None,
        **fixed: Any,
    ) -> Trial:
        """Reads the run of this name, or runs it.

        judging: on both halves of the held-out examples, with forgetting.    held_out: how many, if not as planned.
        session: of the worker, if there are several.
        """
        choosing, steps = not judging, {"max_steps": self.plan.max_steps} if self.plan.max_steps else {}
        spec = TrialSpec(
            arm_settings(self.train, self.study, arm, **{**steps, **fixed}),
            forgetting=(self.study.forgetting_data or "") if judging and measures_forgetting(self.train) else None,
            keep=judging and self.study.method(arm) != FULL,  # a whole model for every seed would fill the disk
            choosing=choosing,
            before=self.base.get((arm, choosing)),
            texts=str(self.folder / "texts.json"),
            held_out=held_out or self.plan.held_out,
        )
        path = self._path(arm, name)
        is_new = not self.session.has_trial(path)
        try:
            trial = (session or self.session).trial(spec, path, stop)
        except TargetError as error:  # only the run has the model's layers
            raise TargetError(f"arm {arm}: {error}") from None
        if is_new:
            seconds = self.earlier_seconds + self.session.seconds
            write_file(self.folder / CLOCK, json.dumps(seconds).encode())
        if self.base.get((arm, choosing)) is None and name != TIMING:
            self.base[arm, choosing] = trial.base
        return trial

    @property
    def _runs_at_a_time(self) -> int:
        return max(len(self.workers), 1)

    def _at_the_same_time(self, run: Callable[[str, StudySession], Trial], arms: Sequence[Any]) -> Iterator[Trial]:
        """Yields the results of `run` in the order of `arms`; workers run several at a time."""
        if not self.workers:
            yield from (run(arm, self.session) for arm in arms)
            return
        free: SimpleQueue[StudySession] = SimpleQueue()
        for worker in self.workers:
            free.put(self.session.of_worker(worker))

        def run_on_worker(arm: Any) -> Trial:
            session = free.get()
            try:
                return run(arm, session)
            finally:
                free.put(session)

        with threads_of(self.workers) as pool:
            yield from pool.map(run_on_worker, arms)

    def _missing(self, runs: Iterable[tuple[str, str]]) -> list[Costs]:
        """Costs of the runs (arm, name) that are not made yet, as far as costs are known."""
        costs = self.plan.costs
        return [costs[arm] for arm, name in runs if arm in costs and not self.session.has_trial(self._path(arm, name))]

    # ---- How much fits into the minutes

    def _plan(self) -> None:
        """Sets the length of the runs, what they cost, and the base's losses, from a few steps of each arm."""
        plan = self.session.plan(self._measure, ComparisonPlan)
        self.session.check_processes(plan.processes)
        timed = {arm: self._timing(arm) for arm in self.study.arms}
        self.plan = plan
        for arm, trial in timed.items():
            if trial.done and len(trial.counts) == (plan.held_out or trial.numbers["held_out"]):
                self.base[arm, True], self.base[arm, False] = on_choosing_half(trial.base), trial.base
        self.session.log(f"{plan.max_steps} steps in each run, planned to fit into the minutes")
        if plan.held_out is not None:
            self.session.note(f"--minutes left time for {plan.held_out} of {plan.examples} held-out examples")
        if plan.minutes not in (None, self.session.minutes):
            self.session.note(
                f"the runs have {plan.max_steps} steps, which were planned for --minutes {plan.minutes:g}; for longer "
                "ones give another --output-dir"
            )

    def _timing(self, arm: str, stop: Listen | None = None) -> Trial:
        rate = self.study.first_rate(arm) / 100
        fixed: dict[str, Any] = {"learning_rate": rate, "max_steps": TIMING_STEPS}
        return self._trial(arm, TIMING, judging=True, held_out=FEWEST_HELD_OUT, stop=stop, **fixed)

    def _measure(self) -> ComparisonPlan:
        """The plan. Raises ConfigError as soon as it is clear that the minutes are too short."""
        session = self.session
        self._check_time({}, START)
        longest, held_out = 1, 0
        timed: dict[str, Costs] = {}  # arm -> costs on the fewest held-out examples
        on_all: dict[str, Costs] = {}
        for arm in self.study.arms:
            session.log(f"timing {TIMING_STEPS} steps of {arm}")
            check, timing = partial(self._check_time, dict(timed)), partial(self._timing, arm)
            costs, trial = measure_costs(session, timing, check, choosing=False)
            timed[arm] = costs or START
            if costs is not None:
                longest, held_out = longest_run(self.train, trial), trial.numbers["held_out"]
                on_all[arm] = costs.on_part(held_out / len(trial.counts))
        if not on_all:
            raise ConfigError(f"no arm can be trained: {TIMING_STEPS} steps of each failed; see {self.folder / RUNS}")
        needed = partial(_needed, list(on_all.values()), workers=self._runs_at_a_time)
        extent, steps = self.limit.choose(needed, longest, held_out)
        session.log(
            f"time for {extent.tries} learning rates and {extent.seeds} seeds of each arm; less time means, in order, "
            f"fewer steps ({FEWEST_STEPS} at least), then fewer learning rates, seeds and held-out examples"
        )
        return ComparisonPlan(
            max_steps=steps,
            costs={arm: costs.on_part(extent.part) for arm, costs in on_all.items()},
            seeds=extent.seeds,
            held_out=held_out_in_use(extent, held_out),
            examples=held_out,
            minutes=session.minutes,
            processes=session.processes,
        )

    def _time_limit(self) -> TimeLimit:
        study, names = self.study, {"seeds": "seeds", "rate_tries": "tries"}
        given = [name for name in names if name in study.model_fields_set]
        return TimeLimit(
            self.session,
            Extent(study.rate_tries, study.seeds),
            FEWEST_TRIES,
            [names[name] for name in given],
            lambda extent, steps: (
                f"{len(study.arms)} arms with {extent.tries} learning rates and {extent.seeds} seeds each, and "
                f"{steps} steps a run,"
            ),
        )

    def _check_time(self, timed: Mapping[str, Costs], costs: Costs) -> None:
        """Raises ConfigError if the time left is too short.

        timed: costs of the arms that have been timed.    costs: not too high, of the arm that is timed now. Both on the
        fewest held-out examples.
        """
        missing = [arm for arm in self.study.arms if arm not in timed]  # the first of them is timed now
        of_arms = [*timed.values(), *[costs] * len(missing)]
        timing = (len(missing) - 1) * costs.judging_run(TIMING_STEPS)
        workers = self._runs_at_a_time

        def needed(extent: Extent, steps: int) -> float:
            return _needed(of_arms, extent, steps, workers) + timing

        self.limit.check(needed, self.train.max_steps)

    # ---- Which learning rate

    def _search_rates(self) -> dict[str, LearningRateSearch]:
        """The arms take turns, so that all have had equally many tries when the time is up."""
        searches = {
            arm: LearningRateSearch(self.study.first_rate(arm), self.study.rate_tries) for arm in self.study.arms
        }
        steps, workers = self.plan.max_steps, self._runs_at_a_time
        while rates := {arm: rate for arm, search in searches.items() if (rate := search.next_rate()) is not None}:
            names = {arm: f"rate-{rate:.3g}" for arm, rate in rates.items()}
            missing = self._missing(names.items())
            needed = _seconds_of_tries(missing, steps, workers)
            needed += _seconds_of_waves([*self.plan.costs.values()], self.plan.seeds, steps, workers)
            if missing and searches[next(iter(rates))].tried and self.session.seconds_left < needed:
                self.session.note("the search for learning rates was cut short by --minutes")
                break

            def try_rate(arm: str, session: StudySession, rates: Any = rates, names: Any = names) -> Trial:
                return self._trial(arm, names[arm], judging=False, session=session, learning_rate=rates[arm])

            for (arm, rate), trial in zip(rates.items(), self._at_the_same_time(try_rate, list(rates)), strict=True):
                loss = trial.loss()  # on the choosing half, which is all that was evaluated
                searches[arm].record(rate, loss, fits=trial.outcome != OUT_OF_MEMORY)
                result = f"held-out loss {loss:.4f}" if trial.done else trial.outcome
                self.session.log(f"{arm}: learning rate {rate:.2g}, {result}")
        return searches

    # ---- The runs that judge

    def _judging_runs(self, rates: Mapping[str, LearningRateSearch]) -> dict[str, list[Trial]]:
        best = {arm: search.best for arm, search in rates.items() if search.best is not None}
        runs: dict[str, list[Trial]] = {arm: [] for arm in best}

        def judge(run: Any, session: StudySession) -> Trial:
            arm, seed = run
            fixed: dict[str, Any] = {"learning_rate": best[arm], "seed": seed}
            return self._trial(arm, _name(seed, best[arm]), judging=True, session=session, **fixed)

        for wave in self._waves(best):
            done = min(map(len, runs.values()))
            missing = self._missing((arm, _name(seed, best[arm])) for arm, seed in wave)
            needed = _seconds_of_judging(missing, self.plan.max_steps, self._runs_at_a_time)
            if done and self.session.seconds_left < needed:
                self.session.note(f"--minutes left time for {done} of {self.study.seeds} seeds")
                break
            for (arm, seed), trial in zip(wave, self._at_the_same_time(judge, wave), strict=True):
                runs[arm].append(trial)
                self.session.log(f"{arm}: seed {seed} at its best rate {best[arm]:.2g}, {trial.summary}")
        return runs

    def _waves(self, best: Mapping[str, float]) -> list[list[tuple[str, int]]]:
        """Returns the runs that judge, arm and seed. A wave is of use only as a whole: equally many seeds of all arms.

        With --minutes there are several, since the time may be up after each.
        """
        if not best:
            return []
        seeds = [self.train.seed + number for number in range(1, self.study.seeds + 1)]  # without that of the rates
        if self.session.minutes is None:
            return [[(arm, seed) for seed in seeds for arm in best]]
        paths = {seed: [self._path(arm, _name(seed, rate)) for arm, rate in best.items()] for seed in seeds}
        new = [seed for seed in seeds if not all(map(self.session.has_trial, paths[seed]))]
        groups = [[seed] for seed in seeds if seed not in new] + _seeds_of_waves(new, len(best), self._runs_at_a_time)
        return [[(arm, seed) for seed in group for arm in best] for group in groups]


def _name(seed: int, rate: float) -> str:
    """Returns the folder's name of a run that judges."""
    return f"seed-{seed}-rate-{rate:.3g}"


def measures_forgetting(train: TrainConfig) -> bool:
    """False for models with a head for labels or with an encoder: forgetting is measured on text that goes on."""
    return train.task not in (*TASK_TYPES, SEQ2SEQ)
