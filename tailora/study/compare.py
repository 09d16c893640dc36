"""Compares LoRA with full fine-tuning, or any variants (arms) with each other: same data, order, tokens and seeds.

    time a few steps of each arm (with --minutes)    -> steps that fit
    search the learning rate of each arm             on the selection half of the held-out examples
    final runs: each arm at its best rate, per seed  on the evaluation half -> differences, verdict

A comparison is fair only if every arm has its own best learning rate, so every arm gets the same number of tries. The
final runs use different seeds and different held-out examples than the search for the rate. The same call resumes an
interrupted comparison and reads finished runs from their folders. Several workers try the rates of the arms in
parallel, then share the final runs: all at once, or in waves with --minutes.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
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
    longest_run,
    measure_costs,
    seconds_of_workers,
)
from tailora.study.config import FULL, CompareConfig, arm_settings
from tailora.study.lr_range import LearningRateSearch
from tailora.study.results import Comparison, measure_of
from tailora.study.search_space import STEP_CHOICE
from tailora.study.study_store import (
    CLOCK,
    DAMAGED,
    TEXTS,
    TIMING,
    Log,
    Settings,
    StudySession,
    locked,
    make_workers,
    open_folder,
    study_settings,
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
    on_selection_half,
    run_in_subprocess,
)
from tailora.study.verdict import evaluate_arms
from tailora.train.config import TASK_TYPES, TrainConfig

STUDY, RUNS = "compare.json", "runs"
FEWEST_TRIES = 3  # learning rates: the best one, a lower and a higher one
Run = tuple[str, str, dict[str, Any]]  # arm, name of its folder, settings
ADJUSTABLE = {"seeds", "rate_tries", "minutes", "margin", "workers"}  # may change when a comparison is resumed


def compare(
    train: TrainConfig,
    study: CompareConfig,
    log: Log = lambda _: None,
    progress: Progress | None = None,
    run_trial: RunTrial = run_in_subprocess,
    *,
    processes: int = 1,
) -> Comparison:
    """Completes the comparison in `train.output_dir` and returns its result.

    processes: number of processes in each run.
    Raises ConfigError, and any error of a run except divergence and lack of memory.
    """
    folder = Path(train.output_dir)
    settings = study_settings(train, processes, compare=study.model_dump(mode="json"))
    if names := sorted(name for name in STEP_CHOICE if getattr(train, name)):
        raise ConfigError(f"a comparison evaluates each run only at the end; remove {' and '.join(names)}")
    if not measures_forgetting(train) and study.forgetting_data is not None:
        raise ConfigError(
            f"--task {train.task} does not train a language model, so forgetting cannot be measured; remove "
            "--forgetting-data"
        )
    for arm in study.arms:  # raises ConfigError for conflicting settings
        arm_settings(train, study, arm, learning_rate=study.first_rate(arm))
    workers = make_workers(study.workers, train.device, study.minutes, processes)
    with locked(folder, STUDY, wait=False):
        begun = any((folder / RUNS).glob(f"*/[!p]*/{RESULT}"))  # without the timing runs
        open_folder(folder, STUDY, settings, begun=begun, identity=_identity)
        session = StudySession(folder, study.minutes, log, progress, run_trial, processes)
        comparison = _Comparison(train, study, session, workers).run(settings)
    write_report(folder, "compare", comparison.to_dict())
    return comparison


def _identity(settings: Settings) -> Settings:
    """Returns the settings that must not change on resume. With --minutes, the number of steps is planned."""
    study = settings.get("compare", {})
    fixed = {name: value for name, value in study.items() if name not in ADJUSTABLE}
    has_minutes = study.get("minutes") is not None
    return {**settings, "compare": {**fixed, "minutes": "given" if has_minutes else "not given"}}


def _needed(costs: Sequence[Costs], extent: Extent, steps: int, workers: int) -> float:
    """Returns the seconds that all runs take for arms with these costs."""
    of_arms = [arm.on_part(extent.part) for arm in costs]
    tries = _seconds_of_tries(of_arms, steps, workers)
    return extent.tries * tries + _seconds_of_waves(of_arms, extent.seeds, steps, workers)


def _seconds_of_tries(costs: Sequence[Costs], steps: int, workers: int) -> float:
    return seconds_of_workers(costs, lambda arm: arm.trial(steps, evaluations=1), workers)


def _seconds_of_final_runs(costs: Sequence[Costs], steps: int, workers: int) -> float:
    return seconds_of_workers(costs, lambda arm: arm.final_run(steps), workers)


def _seconds_of_waves(costs: Sequence[Costs], seeds: int, steps: int, workers: int) -> float:
    """Returns the seconds of all final runs. A wave begins when the previous one has ended.    costs: of each arm."""
    waves = _seeds_of_waves(range(seeds), len(costs), workers)
    return sum(_seconds_of_final_runs([*costs] * len(wave), steps, workers) for wave in waves)


def _seeds_of_waves(seeds: Sequence[int], arms: int, workers: int) -> list[list[int]]:
    """Returns the seeds of each wave with --minutes: just enough to give every worker a run."""
    count = max(workers // max(arms, 1), 1)
    return [list(seeds[start : start + count]) for start in range(0, len(seeds), count)]


@dataclass(frozen=True)
class ComparisonPlan:
    """The content of plan.json.

    max_steps: of each run.    costs: of each arm.    seeds: number of seeds the plan has time for.
    held_out: number of held-out examples used, None for all.    examples: number of held-out examples in total.
    minutes: the time limit of the plan.    processes: of each timed run.
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
    """The runs of one comparison, one after another, or in parallel with several workers."""

    def __init__(
        self, train: TrainConfig, study: CompareConfig, session: StudySession, workers: Sequence[Worker] = ()
    ) -> None:
        self.train, self.study, self.session, self.folder = train, study, session, session.folder
        self.workers = workers
        self.limit = self._time_limit()
        clock = self.folder / CLOCK
        self.earlier_seconds = read_own_json(clock, float, DAMAGED) if clock.exists() else 0.0
        self.plan = WITHOUT_MINUTES  # max_steps = 0: use the settings
        self.base: dict[tuple[str, bool], BaseLosses | None] = {}  # arm, choosing -> losses of its base

    def run(self, settings: dict[str, Any]) -> Comparison:
        if self.study.minutes is not None:
            self._plan()
        rates = self._search_rates()
        runs = self._final_runs(rates)
        self.session.note_workers(chain(*runs.values()))
        done = next((trial for trials in runs.values() for trial in trials if trial.done), None)
        if done is not None:
            self.session.note_data(done)
        seconds = read_own_json(self.folder / CLOCK, float, DAMAGED)
        return evaluate_arms(self.study, rates, runs, notes=self.session.notes, settings=settings, seconds=seconds)

    def _path(self, arm: str, name: str) -> Path:
        return self.folder / RUNS / arm / name

    def _trial(
        self,
        arm: str,
        name: str,
        *,
        final: bool,
        held_out: int | None = None,
        stop: Listen | None = None,
        session: StudySession | None = None,
        **fixed: Any,
    ) -> Trial:
        """Reads the run of this name from its folder, or runs it.

        final: evaluate both halves of the held-out examples, and forgetting.    held_out: overrides the plan.
        session: of the worker, if there are several.
        """
        choosing, steps = not final, {"max_steps": self.plan.max_steps} if self.plan.max_steps else {}
        spec = TrialSpec(
            arm_settings(self.train, self.study, arm, **{**steps, **fixed}),
            forgetting=(self.study.forgetting_data or "") if final and measures_forgetting(self.train) else None,
            keep=final and self.study.method(arm) != FULL,  # a full model for every seed would fill the disk
            choosing=choosing,
            before=self.base.get((arm, choosing)),
            texts=str(self.folder / TEXTS),
            held_out=held_out or self.plan.held_out,
        )
        path = self._path(arm, name)
        is_new = not self.session.has_trial(path)
        try:
            trial = (session or self.session).trial(spec, path, stop)
        except TargetError as error:  # only the run knows the model's layers
            raise TargetError(f"variant {arm!r}: {error}") from None
        if is_new:
            seconds = self.earlier_seconds + self.session.seconds
            write_file(self.folder / CLOCK, json.dumps(seconds).encode())
        if self.base.get((arm, choosing)) is None and name != TIMING:
            self.base[arm, choosing] = trial.base
        return trial

    @property
    def _runs_at_a_time(self) -> int:
        return max(len(self.workers), 1)

    def _trials(self, runs: Sequence[Run], *, final: bool) -> Iterator[Trial]:
        """Yields the trials of `runs` in this order, computed in parallel if there are workers."""
        if not self.workers:
            yield from (self._trial(arm, name, final=final, **fixed) for arm, name, fixed in runs)
            return
        free: SimpleQueue[StudySession] = SimpleQueue()
        for worker in self.workers:
            free.put(replace(self.session, worker=worker))

        def run_on_worker(run: Run) -> Trial:
            (arm, name, fixed), session = run, free.get()
            try:
                return self._trial(arm, name, final=final, session=session, **fixed)
            finally:
                free.put(session)

        with threads_of(self.workers) as pool:
            yield from pool.map(run_on_worker, runs)

    def _missing(self, runs: Iterable[Run]) -> list[Costs]:
        """Returns the known costs of the runs that are still missing."""
        missing = [arm for arm, name, _ in runs if not self.session.has_trial(self._path(arm, name))]
        return [self.plan.costs[arm] for arm in missing if arm in self.plan.costs]

    # ---- How much fits into the minutes

    def _plan(self) -> None:
        """Times a few steps of each arm, and sets the plan and the base's losses."""
        plan = self.session.plan(self._measure, ComparisonPlan)
        self.session.check_processes(plan.processes)
        timed = {arm: self._timing(arm) for arm in self.study.arms}
        self.plan = plan
        for arm, trial in timed.items():
            if trial.done and len(trial.counts) == (plan.held_out or trial.numbers["held_out"]):
                self.base[arm, True], self.base[arm, False] = on_selection_half(trial.base), trial.base
        self.session.log(f"{plan.max_steps} steps per run, to fit all runs into --minutes")
        if plan.held_out is not None:
            self.session.note(f"only {plan.held_out} of {plan.examples} held-out examples fit into --minutes")
        self.session.note_minutes(plan.minutes, f"runs have {plan.max_steps} steps")

    def _timing(self, arm: str, stop: Listen | None = None) -> Trial:
        rate = self.study.first_rate(arm) / 100
        fixed: dict[str, Any] = {"learning_rate": rate, "max_steps": TIMING_STEPS}
        return self._trial(arm, TIMING, final=True, held_out=FEWEST_HELD_OUT, stop=stop, **fixed)

    def _measure(self) -> ComparisonPlan:
        """Measures the plan. Raises ConfigError as soon as --minutes turns out to be too short."""
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
            raise ConfigError(
                f"no variant can be trained: the first {TIMING_STEPS} steps of each failed; see {self.folder / RUNS}"
            )
        needed = partial(_needed, list(on_all.values()), workers=self._runs_at_a_time)
        extent, steps = self.limit.choose(needed, longest, held_out)
        session.log(
            f"time for {extent.tries} learning rates and {extent.seeds} seeds per variant (if time is short, steps are "
            f"reduced to {FEWEST_STEPS} first, then learning rates, seeds and held-out examples)"
        )
        return ComparisonPlan(
            max_steps=steps,
            costs={arm: costs.on_part(extent.part) for arm, costs in on_all.items()},
            seeds=extent.seeds,
            held_out=extent.held_out(held_out),
            examples=held_out,
            minutes=session.minutes,
            processes=session.processes,
        )

    def _time_limit(self) -> TimeLimit:
        study, names = self.study, {"seeds": "seeds", "rate_tries": "tries"}
        return TimeLimit(
            self.session,
            Extent(study.rate_tries, study.seeds),
            FEWEST_TRIES,
            [names[name] for name in names.keys() & study.model_fields_set],
            lambda extent, steps: (
                f"{len(study.arms)} variants with {extent.tries} learning rates and {extent.seeds} seeds each, "
                f"{steps} steps per run,"
            ),
        )

    def _check_time(self, timed: Mapping[str, Costs], costs: Costs) -> None:
        """Raises ConfigError if the time left is too short.

        timed: costs of the arms that have been timed.    costs: a lower bound for the arm being timed. Both are for
        the minimum number of held-out examples.
        """
        missing = [arm for arm in self.study.arms if arm not in timed]  # the first of them is being timed
        of_arms = [*timed.values(), *[costs] * len(missing)]
        timing = (len(missing) - 1) * costs.final_run(TIMING_STEPS)
        workers = self._runs_at_a_time
        self.limit.check(lambda extent, steps: _needed(of_arms, extent, steps, workers) + timing, self.train.max_steps)

    # ---- Which learning rate

    def _search_rates(self) -> dict[str, LearningRateSearch]:
        """The arms take turns, so that all have had the same number of tries when the time is up."""
        tries = self.study.rate_tries
        searches = {arm: LearningRateSearch(self.study.first_rate(arm), tries) for arm in self.study.arms}
        steps, workers = self.plan.max_steps, self._runs_at_a_time
        while rates := {arm: rate for arm, search in searches.items() if (rate := search.next_rate()) is not None}:
            runs: list[Run] = [(arm, f"rate-{rate:.3g}", {"learning_rate": rate}) for arm, rate in rates.items()]
            missing = self._missing(runs)
            needed = _seconds_of_tries(missing, steps, workers)
            needed += _seconds_of_waves([*self.plan.costs.values()], self.plan.seeds, steps, workers)
            if missing and searches[next(iter(rates))].tried and self.session.seconds_left < needed:
                self.session.note("--minutes ended the search for learning rates early")
                break
            for (arm, rate), trial in zip(rates.items(), self._trials(runs, final=False), strict=True):
                loss = trial.loss()  # on the selection half, the only one evaluated
                searches[arm].record(rate, loss, fits=trial.outcome != OUT_OF_MEMORY)
                result = measure_of(trial.loss_unit).text(loss) if trial.done else trial.outcome
                self.session.log(f"{arm}: learning rate {rate:.2g}, {result}")
        return searches

    # ---- The final runs

    def _final_runs(self, rates: Mapping[str, LearningRateSearch]) -> dict[str, list[Trial]]:
        best = {arm: search.best for arm, search in rates.items() if search.best is not None}
        runs: dict[str, list[Trial]] = {arm: [] for arm in best}
        for wave in self._waves(best):
            done = min(map(len, runs.values()))
            of_wave = [(arm, _name(seed, best[arm]), {"learning_rate": best[arm], "seed": seed}) for arm, seed in wave]
            needed = _seconds_of_final_runs(self._missing(of_wave), self.plan.max_steps, self._runs_at_a_time)
            if done and self.session.seconds_left < needed:
                self.session.note(f"only {done} of {self.study.seeds} seeds fit into --minutes")
                break
            for (arm, seed), trial in zip(wave, self._trials(of_wave, final=True), strict=True):
                runs[arm].append(trial)
                self.session.log(f"{arm}: seed {seed} at the best learning rate {best[arm]:.2g}, {trial.summary}")
        return runs

    def _waves(self, best: Mapping[str, float]) -> list[list[tuple[str, int]]]:
        """Returns the final runs (arm, seed) in waves. Only complete waves are useful: they cover all arms.

        With --minutes there are several waves, because time may run out after each.
        """
        if not best:
            return []
        # not the seed of the rate search
        seeds = [self.train.seed + number for number in range(1, self.study.seeds + 1)]
        if self.session.minutes is None:
            return [[(arm, seed) for seed in seeds for arm in best]]
        paths = {seed: [self._path(arm, _name(seed, rate)) for arm, rate in best.items()] for seed in seeds}
        new = [seed for seed in seeds if not all(map(self.session.has_trial, paths[seed]))]
        groups = [[seed] for seed in seeds if seed not in new] + _seeds_of_waves(new, len(best), self._runs_at_a_time)
        return [[(arm, seed) for seed in group for arm in best] for group in groups]


def _name(seed: int, rate: float) -> str:
    return f"seed-{seed}-rate-{rate:.3g}"


def measures_forgetting(train: TrainConfig) -> bool:
    """False for classifiers and encoder-decoder models: forgetting is measured by predicting the next token."""
    return train.task not in (*TASK_TYPES, SEQ2SEQ)
