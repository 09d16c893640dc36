"""Searches for the best settings for a model and data, and for the cheapest that are as good.

    a few steps    -> Budget: steps of a trial
    trials         Optuna's TPE suggests settings, a process trains with them, successive halving ends the worse half;
                   the choosing half of the held-out examples decides
    finalists      run again with several seeds; the judging half decides -> best, cheapest, verdict

Several workers may share one search: threads of this process, each of which runs its trials on a device of its own; and
processes on one folder, or on one database from several machines. Each runs trials while some are missing, then
finalists; all end with the same result. The same call resumes an interrupted search.
"""

import copy
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.exceptions import TrialPruned, UpdateFinishedTrialError
from optuna.pruners import SuccessiveHalvingPruner

from tailora.errors import ConfigError
from tailora.evaluation.statistics import FEW_EXAMPLES
from tailora.formats.io import read_own_json, write_file
from tailora.formats.run_folder import write_report
from tailora.study import optuna_study, search_space
from tailora.study.budget import (
    FEWEST_HELD_OUT,
    SHARE,
    START,
    TIMING_RATE,
    TIMING_STEPS,
    Budget,
    Costs,
    Extent,
    TimeLimit,
    held_out_in_use,
    longest_run,
    measure_costs,
)
from tailora.study.config import SearchConfig, trial_settings
from tailora.study.results import Candidate, Finalist, SearchResult
from tailora.study.search_space import Axis
from tailora.study.study_store import (
    DAMAGED,
    PLAN,
    TIMING,
    Log,
    StudySession,
    launch_settings,
    locked,
    make_workers,
    open_folder,
    same_steps,
    threads_of,
)
from tailora.study.trial import (
    DONE,
    BaseLosses,
    Progress,
    RunTrial,
    Trial,
    TrialEvent,
    TrialSpec,
    Worker,
    choosing_half,
    on_choosing_half,
    run_in_subprocess,
)
from tailora.study.verdict import choose_finalists, judge_finalists
from tailora.train.config import TrainConfig
from tailora.train.config_file import config_text

STUDY, BEST, CHEAPEST = "search.json", "best.yaml", "cheapest.yaml"
RUN_LOCK = "run.lock"
POLL_SECONDS = 1.0
MOST_TRIALS, FEWEST_TRIALS = 16, 6  # if the time limit decides
RESERVED = 2  # finalists that time is kept for: the best, and a cheaper one
ONE_EVALUATION = {"save_steps": 0, "eval_steps": 0, "early_stopping_patience": 0}  # settings of a judging run


def search(
    train: TrainConfig,
    study: SearchConfig,
    log: Log = lambda _: None,
    progress: Progress | None = None,
    run_trial: RunTrial = run_in_subprocess,
    *,
    processes: int = 1,
) -> SearchResult:
    """Runs what is missing of the search in `train.output_dir`, and judges. Joins a search that is under way.

    processes: that train together in each run.
    Raises ConfigError; whatever a run raises that is neither divergence nor lack of memory.
    """
    workers = make_workers(study.workers, train.device, study.minutes, processes)
    if study.lr_only:
        raise ConfigError("lr_only finds the learning rate alone: call study.lr_range.find_range, or leave it out")
    folder = Path(train.output_dir)
    space = search_space.search_axes(search_space.read_space(study.space), train)
    settings = {
        "train": train.model_dump(mode="json", exclude={"output_dir"}),
        "space": {name: list(axis) if isinstance(axis, tuple) else str(axis) for name, axis in space.items()},
        **launch_settings(processes),
    }
    with locked(folder, STUDY):
        begun = (folder / PLAN).exists()
        open_folder(folder, STUDY, settings, begun=begun)
    session = StudySession(folder, study.minutes, log, progress, run_trial, processes)
    with optuna_study.explained_errors(folder, study.storage):
        result = _Search(train, study, space, session).run(settings, workers)
    write_report(folder, "search", result.to_dict())
    return result


@dataclass(frozen=True)
class SearchPlan:
    """plan.json.    parts: the model's groups of layers.    base: its losses, if all examples in use were evaluated."""

    plan: Budget
    parts: dict[str, Any]
    base: BaseLosses | None = None


class _Search:
    """One worker's part of a search. The work of other workers is read from the database and the folder."""

    def __init__(self, train: TrainConfig, study: SearchConfig, space: dict[str, Axis], session: StudySession) -> None:
        self.train, self.study, self.space, self.session = train, study, space, session
        self.folder, self.limit = session.folder, self._time_limit()
        self.groups: dict[str, Any] = {}  # of the model's layers, and the largest r
        self.base: dict[bool, BaseLosses | None] = {}  # choosing -> losses of the base on those held-out examples
        self.held_out: int | None = None  # number of held-out examples that are used; None for all

    def run(self, settings: dict[str, Any], workers: Sequence[Worker]) -> SearchResult:
        """workers: none if this process runs one trial at a time."""
        if workers:
            self.session = self.session.of_worker(workers[0])  # which measures, and runs what others leave
        self._prepare()
        if workers:
            self._run_workers(workers)
        else:
            self._work()
        return self._judge(settings)

    def _run_workers(self, workers: Sequence[Worker]) -> None:
        """Runs trials and finalists, each worker in a thread. What a worker that fails leaves, the others run.

        Raises what the first of them raised if all fail.
        """
        failures = []
        with threads_of(workers) as pool:
            running = {pool.submit(self._of_worker(worker)._work): worker for worker in workers}
            for future in as_completed(running):
                if (error := future.exception()) is not None:
                    failures.append(error)
                    self.session.note(f"worker {running[future].number} ended early: {error}")
        if len(failures) == len(workers):
            raise failures[0]

    def _of_worker(self, worker: Worker) -> "_Search":
        search = copy.copy(self)
        search.session = self.session.of_worker(worker)
        search._open_study()
        return search

    def _prepare(self) -> None:
        """Plans the search, or reads its plan, and adds the settings as they are as its first trial."""
        with locked(self.folder, STUDY):
            self._open_study()
            self._plan()
            self.axes, notes = search_space.fit_to_model(
                self.space, self.groups, search_space.read_space(self.study.space)
            )
            for note in notes:
                self.session.note(note)
            if not self.optuna.get_trials(deepcopy=False):
                self.optuna.enqueue_trial(search_space.first_values(self.axes, self.train))

    def _open_study(self) -> None:
        stored = read_own_json(self.folder / STUDY, dict[str, Any], DAMAGED)  # as the first worker wrote them
        self.optuna = optuna_study.open_study(self.folder, self.study.storage, same_steps(stored))

    def _work(self) -> None:
        self.optuna.pruner = SuccessiveHalvingPruner(min_resource=self.budget.rung, reduction_factor=2)
        self._run_trials()
        self._run_finals(self._finalists())

    def _spec(self, values: Mapping[str, Any], *, choosing: bool, describe: bool = False, **fixed: Any) -> TrialSpec:
        """The spec of a run with these values of the space."""
        changes = search_space.settings_of(values, self.groups, self.train)
        settings = trial_settings(self.train, changes, **{**ONE_EVALUATION, **fixed})
        return TrialSpec(
            settings,
            keep=False,
            choosing=choosing,
            describe=describe,
            before=self.base.get(choosing),
            held_out=self.held_out,
        )

    # ---- How long a trial is

    def _plan(self) -> None:
        """Sets the budget, groups of layers and the base's losses, measured once for all workers, under the lock."""
        plan = self.session.plan(self._measure, SearchPlan)
        budget = plan.plan
        self.session.check_processes(budget.processes)
        self.budget, self.groups, self.held_out = budget, plan.parts, budget.held_out
        self.base = {True: on_choosing_half(plan.base), False: plan.base}
        of = f" of the {budget.longest:,} that the settings ask for" if budget.steps < budget.longest else ""
        self.session.log(f"a trial has {budget.steps:,} steps{of} and takes up to {budget.trial_seconds:,.0f} s")

    def _measure(self) -> SearchPlan:
        """The plan, from a few steps of all layers, which take longest, at the lowest r, which fits if any."""
        self.session.log(f"timing {TIMING_STEPS} steps")
        ranks = self.space.get("r")
        values = {"r": min(ranks)} if isinstance(ranks, tuple) else {}
        fixed = {"learning_rate": TIMING_RATE, "max_steps": TIMING_STEPS}
        spec = replace(self._spec(values, choosing=False, describe=True, **fixed), held_out=FEWEST_HELD_OUT)
        self._check_time(START)
        timing = partial(self.session.trial, spec, self.folder / TIMING)
        costs, trial = measure_costs(self.session, timing, self._check_time, choosing=False)
        if costs is None:
            raise ConfigError(
                f"{TIMING_STEPS} steps at a learning rate of {TIMING_RATE:g} already fail: {trial.message}"
            )
        choosing_half(len(trial.counts))  # raises for too few examples, before anything is kept
        examples = trial.numbers["held_out"]
        costs = costs.on_part(examples / len(trial.counts))
        longest = longest_run(self.train, trial)
        extent, steps = self.limit.choose(partial(self._needed, costs), longest, examples)
        budget = Budget(
            steps=steps,
            longest=longest,
            costs=costs.on_part(extent.part),
            seeds=extent.seeds,
            held_out=held_out_in_use(extent, examples),
            minutes=self.session.minutes,
            processes=self.session.processes,
        )
        self.session.note_data(trial)
        base = trial.base if len(trial.counts) == (budget.held_out or examples) else None
        return SearchPlan(budget, trial.numbers["parts"], base)

    @property
    def _reserved(self) -> int:
        """Finalists that time is kept for."""
        return min(RESERVED, self.study.finalists)

    @property
    def _reserved_seconds(self) -> float:
        return self._rounds(self._reserved * self.budget.seeds) * self.budget.judging_seconds

    def _rounds(self, runs: int) -> int:
        """How often the workers of this process have to run one each, for so many runs."""
        return math.ceil(runs / self.study.workers)

    def _time_limit(self) -> TimeLimit:
        study = self.study
        fixed = {"tries": study.trials is not None, "seeds": "seeds" in study.model_fields_set}
        return TimeLimit(
            self.session,
            Extent(study.trial_count or MOST_TRIALS, study.seeds),
            FEWEST_TRIALS,
            [name for name, is_fixed in fixed.items() if is_fixed],
            lambda extent, steps: (
                f"{extent.tries} trials of {steps} steps and {self._reserved * extent.seeds} runs that judge"
            ),
        )

    def _needed(self, costs: Costs, extent: Extent, steps: int) -> float:
        """Seconds of all trials and judging runs.

        The first trial has none that could end it, and the last begins only if there is time for all of its steps.
        """
        costs, judging = costs.on_part(extent.part), self._rounds(self._reserved * extent.seeds)
        rounds = self._rounds(extent.tries)
        whole = min(rounds, 2)
        trials = whole * costs.trial(steps) + (rounds - whole) * costs.trial(steps, SHARE)
        return trials + judging * costs.judging_run(steps)

    def _check_time(self, costs: Costs) -> None:
        """Raises ConfigError if the time left is too short. costs: not too high, on the fewest held-out examples."""
        self.limit.check(partial(self._needed, costs), self.train.max_steps)

    # ---- Trials

    def _run_trials(self) -> None:
        """Runs trials until all workers have finished enough, or the time is up."""
        wanted = self.study.trial_count
        while True:
            with locked(self.folder, STUDY) as lock:
                running = len(optuna_study.running_trials(self.optuna))
                finished = len(optuna_study.finished_trials(self.optuna))
                missing = wanted is None or running + finished < wanted
                late = self.session.seconds_left < self.budget.trial_seconds + self._reserved_seconds
                if missing and not late:
                    self._run_next(lock)
                    continue
            if late or not running:
                break
            time.sleep(POLL_SECONDS)  # another worker's trial may fail, and then has to be run again
            self.session.check_stopped()
        planned = FEWEST_TRIALS if wanted is None else wanted
        if missing and running + finished < planned:
            self.session.note(f"--minutes left time for {finished} of {planned} trials")

    def _run_next(self, lock: Any) -> None:
        """Begins a trial, releases the lock so that other workers begin theirs, and runs it."""
        has_ended = False

        def objective(trial: optuna.Trial) -> float:
            nonlocal has_ended
            lock.release()
            self.optuna.sampler = optuna_study.sampler(self.train.seed, trial.number)
            try:
                candidate = self._candidate(trial)
                trial.set_user_attr(optuna_study.OUTCOME, asdict(candidate))
            except UpdateFinishedTrialError:
                has_ended = True
                raise
            except BaseException:  # an interrupted trial is run again when the search resumes
                optuna_study.retry(self.optuna, self.optuna.get_trials(deepcopy=False)[trial.number])
                raise
            loss = "no loss" if candidate.eval_loss is None else f"{candidate.eval_loss:.4f}"
            ended = "" if candidate.state == DONE else f", {candidate.state}: {candidate.message}"
            self.session.log(f"trial {candidate.number}: {loss}{ended}  ({search_space.in_words(candidate.settings)})")
            if candidate.state != DONE or candidate.eval_loss is None:
                raise TrialPruned
            return candidate.eval_loss

        try:
            self.optuna.optimize(objective, n_trials=1)
        except ValueError:  # Optuna refuses the result of a trial that has ended
            if not has_ended:
                raise
            self.session.note(
                "a trial was lost: this process was suspended, and another worker marked its trial as failed"
            )

    def _candidate(self, trial: optuna.Trial) -> Candidate:
        values = optuna_study.suggest(trial, self.axes)
        begun = self.session.seconds
        until = begun + self.session.seconds_left - self._reserved_seconds
        spec = self._spec(values, choosing=True, max_steps=self.budget.steps, eval_steps=self.budget.rung)

        def stop(event: TrialEvent) -> str | None:
            if event.held_out and 0 < event.step < event.steps:
                trial.report(event.loss, event.step)
                if trial.should_prune():
                    return f"in the worse half at step {event.step}"
            return "out of time" if self.session.seconds > until else None

        result = self.session.trial(spec, self.folder / "trials" / f"{trial.number:04d}", stop)
        self.base[True] = self.base[True] or result.base
        losses = [loss for step, loss in result.curve if step > 0]
        return Candidate(
            number=trial.number,
            state=result.outcome,
            settings=values,
            eval_loss=losses[-1] if losses else None,
            trainable_parameters=result.parameters or None,
            seconds=self.session.seconds - begun,
            curve=result.curve,
            message=result.message,
        )

    # ---- Finalists

    def _finalists(self) -> list[Candidate]:
        candidates = optuna_study.finished_trials(self.optuna)
        return choose_finalists(candidates, self.study.margin, self.study.finalists)

    def _judge(self, settings: dict[str, Any]) -> SearchResult:
        candidates, chosen = optuna_study.finished_trials(self.optuna), self._finalists()
        if not chosen:
            ends = "; ".join(f"trial {candidate.number} {candidate.state}" for candidate in candidates)
            raise ConfigError(f"no trial was finished, so there is nothing to choose from: {ends or 'none was begun'}")
        runs = self._judging_runs(chosen)
        self.session.note_workers(chain(*runs.values()))
        seconds = [candidate.seconds or 0.0 for candidate in candidates]
        seconds += [run.numbers["seconds"] for run in chain(*runs.values())]
        result = judge_finalists(
            [candidate for candidate in chosen if candidate.number in runs],
            runs,
            self.study.margin,
            trials=candidates,
            importances=optuna_study.importances(self.optuna.get_trials(deepcopy=False)),
            steps=self.budget.steps,
            notes=self.session.notes,
            settings={**settings, "search": self.study.model_dump(mode="json", exclude={"storage"})},
            seconds=math.fsum(seconds),
            config=str(self.folder / BEST),
        )
        self._write_config(BEST, result.best)
        self._write_config(CHEAPEST, result.cheapest)
        return replace(result, notes=[*result.notes, *self._limits(result)])

    def _limits(self, result: SearchResult) -> list[str]:
        """What limits the verdict."""
        budget, examples = self.budget, result.judged_examples
        edges = [name for name, value in result.best.settings.items() if search_space.at_edge(self.axes[name], value)]
        notes = {
            f"{', '.join(edges)} of the best trial is at the edge of its range: a wider range may hold better": edges,
            f"trials had {budget.steps:,} of the {budget.longest:,} steps that the settings ask for; in longer runs a "
            "lower learning rate and a higher rank may be better": budget.steps < budget.longest,
            f"--minutes left time for {self.held_out} of the held-out examples": self.held_out is not None,
            f"the length of a trial was planned for --minutes {budget.minutes or 0:g}; for longer trials give another "
            "--output-dir": None not in (budget.minutes, self.session.minutes)
            and budget.minutes != self.session.minutes,
            f"{len(result.trials)} trials are too few to tell which settings matter": not result.importances,
            f"only {examples} held-out examples judge: more of them, by --eval-data or --validation-split, show "
            "smaller differences": examples < FEW_EXAMPLES,
        }
        return [text for text, applies in notes.items() if applies]

    def _judging_runs(self, chosen: Sequence[Candidate]) -> dict[int, list[Trial]]:
        """Number of a finalist -> its runs, equally many of all; finalists that failed with a seed are left out."""
        runs = self._run_finals(chosen)
        failed = {number: [trial for trial in trials if not trial.done] for number, trials in runs.items()}
        for number, trials in failed.items():
            if trials:
                self.session.note(f"trial {number} is no finalist: {trials[0].outcome} with another seed")
        most = max(map(len, runs.values()))
        good = {number: trials for number, trials in runs.items() if len(trials) == most and not failed[number]}
        if not good:
            raise ConfigError("all finalists failed with another seed, so there is nothing to choose from")
        return good

    def _run_finals(self, chosen: Sequence[Candidate]) -> dict[int, list[Trial]]:
        """Runs what is missing, and what no other worker runs, as long as there is time. Returns the runs of each."""
        seeds = [self.train.seed + number for number in range(1, self.study.seeds + 1)]  # other than the trials'
        # Each wave is useful only if complete: the first finalists with a seed; then one of the others with all seeds.
        waves = [[(candidate, seed) for candidate in chosen[:RESERVED]] for seed in seeds]
        waves += [[(candidate, seed) for seed in seeds] for candidate in chosen[RESERVED:]]
        runs: dict[int, list[Trial]] = {candidate.number: [] for candidate in chosen}
        for wave in waves:
            missing = sum(not self.session.has_trial(self._final_folder(*run)) for run in wave)
            needed = self._rounds(missing) * self.budget.judging_seconds
            if missing and any(runs.values()) and self.session.seconds_left < needed:
                self.session.note("--minutes left no time for all seeds and finalists")
                break
            for candidate, seed in wave:
                self._judging_run(candidate, seed)
            for candidate, seed in wave:
                while (trial := self._judging_run(candidate, seed)) is None:
                    time.sleep(POLL_SECONDS)
                    self.session.check_stopped()
                runs[candidate.number].append(trial)
        return runs

    def _final_folder(self, candidate: Candidate, seed: int) -> Path:
        return self.folder / "finals" / f"{candidate.number:04d}" / f"seed-{seed}"

    def _judging_run(self, candidate: Candidate, seed: int) -> Trial | None:
        """A finalist with another seed; None while another worker runs it."""
        folder = self._final_folder(candidate, seed)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(folder / RUN_LOCK, timeout=0):
                spec = self._spec(candidate.settings, choosing=False, max_steps=self.budget.steps, seed=seed)
                is_new = not self.session.has_trial(folder)
                trial = self.session.trial(spec, folder)
                self.base[False] = self.base[False] or trial.base
                if is_new:
                    self.session.log(f"trial {candidate.number} again, seed {seed}: {trial.summary}")
                return trial
        except Timeout:
            return None

    def _write_config(self, name: str, finalist: Finalist) -> None:
        """Writes what `tailora train --config` takes: the run's settings with those of the finalist."""
        path = self.folder / name
        base = self.train.model_dump(exclude_unset=True, exclude={"resume_from_checkpoint"})
        changes = search_space.settings_of(finalist.settings, self.groups, self.train)
        values = {**base, **changes, "output_dir": str(path.with_suffix(""))}
        TrainConfig(**values)
        write_file(path, config_text(values).encode())
