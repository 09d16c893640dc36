"""Searches for the best settings for a model and data, and for the cheapest ones that are as good.

    probe             a few steps -> steps of a trial, groups of layers, the base's losses
    trials            Optuna's TPE suggests settings, a process trains with them, successive halving ends the worse
                      half; all on the selection half of the held-out examples
    finalists         repeated with several seeds, on the evaluation half -> best, cheapest, verdict

Several workers can share one search: threads of this process, each with its own device; or processes that share a
folder, or a database between machines. Each runs trials until there are enough, then finalists, and all return the same
result. The same call resumes an interrupted search. After --minutes, no further trial or final run starts.
"""

import copy
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.exceptions import TrialPruned, UpdateFinishedTrialError
from optuna.pruners import SuccessiveHalvingPruner

from tailora.data.dataset import selection_half
from tailora.errors import ConfigError
from tailora.evaluation.statistics import FEW_EXAMPLES
from tailora.formats.io import read_own_json, write_file
from tailora.formats.run_folder import write_report
from tailora.study import optuna_study, search_space
from tailora.study.comparison_verdict import choose_finalists, evaluate_finalists
from tailora.study.config import SearchConfig, answers_decide, check_metric, trial_settings
from tailora.study.results import Candidate, Finalist, Measure, SearchResult
from tailora.study.search_space import Axis
from tailora.study.study_store import (
    DAMAGED,
    PLAN,
    TRIALS,
    Log,
    StudySession,
    locked,
    make_workers,
    open_folder,
    same_steps,
    study_settings,
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
    on_selection_half,
    run_in_subprocess,
)
from tailora.train.config import TrainConfig
from tailora.train.config_file import config_text

STUDY, BEST, CHEAPEST = "search.json", "best.yaml", "cheapest.yaml"
RUN_LOCK = "run.lock"
POLL_SECONDS = 1.0
RUNGS = 3  # evaluations of a complete trial, equally spaced; halving happens at the first and the second
# settings of a final run
ONE_EVALUATION = {"save_steps": 0, "eval_steps": 0, "early_stopping_patience": 0, "metric_for_best_model": None}


def search(
    train: TrainConfig,
    study: SearchConfig,
    log: Log = lambda _: None,
    progress: Progress | None = None,
    run_trial: RunTrial = run_in_subprocess,
    *,
    processes: int = 1,
) -> SearchResult:
    """Completes the search in `train.output_dir` and returns its result. Joins a search that is running.

    processes: number of processes in each run.
    Raises ConfigError, and any error of a run except divergence and lack of memory.
    """
    workers = make_workers(study.workers, train.device, processes)
    check_metric(train, study)
    folder = Path(train.output_dir)
    space = search_space.search_axes(search_space.read_space(study.space), train)
    values = {name: list(axis) if isinstance(axis, tuple) else str(axis) for name, axis in space.items()}
    settings = study_settings(train, processes, space=values)
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
    """plan.json."""

    steps: int  # of a complete trial
    parts: dict[str, Any]  # the model's groups of layers
    base: BaseLosses | None  # losses of the base


class _Search:
    """One worker's part of a search. It reads the results of other workers from the database and the folder."""

    def __init__(self, train: TrainConfig, study: SearchConfig, space: dict[str, Axis], session: StudySession) -> None:
        self.train, self.study, self.space, self.session = train, study, space, session
        self.folder = session.folder
        self.groups: dict[str, Any] = {}  # groups of the model's layers, and the largest r
        self.base: dict[bool, BaseLosses | None] = {}  # choosing -> losses of the base on those held-out examples

    def run(self, settings: dict[str, Any], workers: Sequence[Worker]) -> SearchResult:
        """workers: empty if this process runs one trial at a time."""
        if workers:
            self.session = replace(self.session, worker=workers[0])  # it runs the probe, and what the others leave
        self._prepare()
        if workers:
            self._run_workers(workers)
        else:
            self._work()
        return self._evaluate(settings)

    def _run_workers(self, workers: Sequence[Worker]) -> None:
        """Runs trials and finalists, each worker in a thread. If a worker fails, the others run what it leaves.

        Raises the first worker's error if all fail.
        """
        failures = []
        with threads_of(workers) as pool:
            running = {pool.submit(self._of_worker(worker)._work): worker for worker in workers}
            for future in as_completed(running):
                if (error := future.exception()) is not None:
                    failures.append(error)
                    self.session.note(f"worker {running[future].number} stopped: {error}")
        if len(failures) == len(workers):
            raise failures[0]

    def _of_worker(self, worker: Worker) -> "_Search":
        search = copy.copy(self)
        search.session = replace(self.session, worker=worker)
        search._open_study()
        return search

    def _prepare(self) -> None:
        """Measures what trials depend on, once for all workers, and enqueues the settings as the first trial."""
        with locked(self.folder, STUDY):
            self._open_study()
            plan = self.session.plan(self._probe, SearchPlan)
            self.steps, self.rung, self.groups = plan.steps, math.ceil(plan.steps / RUNGS), plan.parts
            self.base = {True: on_selection_half(plan.base), False: plan.base}
            self.session.log(f"each trial has {self.steps:,} steps")
            given = search_space.read_space(self.study.space)
            self.axes, notes = search_space.fit_to_model(self.space, self.groups, given)
            for note in notes:
                self.session.note(note)
            if not self.optuna.get_trials(deepcopy=False):
                self.optuna.enqueue_trial(search_space.first_values(self.axes, self.train))

    def _open_study(self) -> None:
        stored = read_own_json(self.folder / STUDY, dict[str, Any], DAMAGED)  # written by the first worker
        self.optuna = optuna_study.open_study(self.folder, self.study.storage, same_steps(stored))

    def _work(self) -> None:
        self.optuna.pruner = SuccessiveHalvingPruner(min_resource=self.rung, reduction_factor=2)
        self._run_trials()
        self._run_finals(self._finalists())

    def _spec(self, values: Mapping[str, Any], *, choosing: bool, describe: bool = False, **fixed: Any) -> TrialSpec:
        changes = search_space.settings_of(values, self.groups, self.train)
        settings = trial_settings(self.train, changes, **{**ONE_EVALUATION, **fixed})
        return TrialSpec(
            settings,
            keep=False,
            choosing=choosing,
            describe=describe,
            before=self.base.get(choosing),
            answers=answers_decide(self.train) and not describe,
            # of finalists, one seed is enough for the base
            base_answers=answers_decide(self.train) and fixed.get("seed") == self.train.seed + 1,
        )

    def _probe(self) -> SearchPlan:
        """Runs a few steps with the lowest r, the first to fit into memory."""
        ranks = self.space.get("r")
        values = {"r": min(ranks)} if isinstance(ranks, tuple) else {}
        trial, steps = self.session.probe(self.train, self._spec(values, choosing=False, describe=True))
        selection_half(len(trial.counts))  # raises for too few examples, before anything is stored
        self.session.note_data(trial)
        return SearchPlan(steps, trial.numbers["parts"], trial.base)

    # ---- Trials

    def _run_trials(self) -> None:
        """Runs trials until all workers together have finished enough, or the time is up."""
        while True:
            with locked(self.folder, STUDY) as lock:
                running = len(optuna_study.running_trials(self.optuna))
                finished = len(optuna_study.finished_trials(self.optuna))
                if running + finished < self.study.trials and not self.session.is_over:
                    self._run_next(lock)
                    continue
            if self.session.is_over or not running:
                break
            time.sleep(POLL_SECONDS)  # another worker's trial may fail and need a repetition
            self.session.check_stopped()

    def _run_next(self, lock: Any) -> None:
        """Creates a trial, releases the lock so that other workers can create theirs, and runs it."""
        has_ended = False

        def objective(trial: optuna.Trial) -> float:
            nonlocal has_ended
            lock.release()
            self.optuna.sampler = optuna_study.sampler(self.train.seed, trial.number)
            try:
                candidate, measure = self._candidate(trial)
                trial.set_user_attr(optuna_study.OUTCOME, asdict(candidate))
            except UpdateFinishedTrialError:
                has_ended = True
                raise
            except BaseException:  # repeat an interrupted trial when the search resumes
                optuna_study.retry(self.optuna, self.optuna.get_trials(deepcopy=False)[trial.number])
                raise
            result = "no result" if candidate.eval_loss is None else measure.text(candidate.eval_loss)
            ended = "" if candidate.state == DONE else f", {candidate.state}: {candidate.message}"
            values = search_space.format_values(candidate.settings)
            self.session.log(f"trial {candidate.number}: {result}{ended}  ({values})")
            if candidate.state != DONE or candidate.eval_loss is None:
                raise TrialPruned
            return candidate.eval_loss

        try:
            self.optuna.optimize(objective, n_trials=1)
        except ValueError:  # Optuna rejects the result of a trial that has ended
            if not has_ended:
                raise
            self.session.note(
                "a trial was lost: while this process was suspended, another worker marked the trial as failed"
            )

    def _candidate(self, trial: optuna.Trial) -> tuple[Candidate, Measure]:
        values = optuna_study.suggest(trial, self.axes)
        begun = self.session.seconds
        spec = self._spec(values, choosing=True, max_steps=self.steps, eval_steps=self.rung)

        def stop(event: TrialEvent) -> str | None:
            if event.held_out and 0 < event.step < event.steps:
                trial.report(event.loss, event.step)
                if trial.should_prune():
                    return f"in the worse half at step {event.step}"
            return None

        result = self.session.trial(spec, self.folder / TRIALS / f"{trial.number:04d}", stop)
        self.base[True] = self.base[True] or result.base
        losses = [loss for step, loss in result.curve if step > 0 and not spec.answers]  # a loss is no score
        candidate = Candidate(
            number=trial.number,
            state=result.outcome,
            settings=values,
            eval_loss=result.objective() if result.done else losses[-1] if losses else None,
            trainable_parameters=result.parameters or None,
            seconds=self.session.seconds - begun,
            curve=result.curve,
            message=result.message,
        )
        return candidate, result.measure

    # ---- Finalists

    def _finalists(self) -> list[Candidate]:
        candidates = optuna_study.finished_trials(self.optuna)
        return choose_finalists(candidates, self.study.margin, self.study.finalists)

    def _evaluate(self, settings: dict[str, Any]) -> SearchResult:
        candidates, chosen = optuna_study.finished_trials(self.optuna), self._finalists()
        if self.session.is_over:
            self.session.note_missing(len(candidates), self.study.trials, "trials")
        if not candidates and self.session.is_over:
            raise self.session.no_verdict("the first steps")
        if not chosen:
            ends = "; ".join(f"trial {candidate.number} {candidate.state}" for candidate in candidates)
            raise ConfigError(f"no result, because no trial was completed: {ends or 'none was started'}")
        runs = self._final_runs(chosen)
        self.session.note_workers(chain(*runs.values()))
        seconds = [candidate.seconds or 0.0 for candidate in candidates]
        seconds += [run.numbers["seconds"] for run in chain(*runs.values())]
        result = evaluate_finalists(
            [candidate for candidate in chosen if candidate.number in runs],
            runs,
            self.study.margin,
            trials=candidates,
            importances=optuna_study.importances(self.optuna.get_trials(deepcopy=False)),
            steps=self.steps,
            notes=self.session.notes,
            settings={**settings, "search": self.study.model_dump(mode="json", exclude={"storage"})},
            seconds=math.fsum(seconds),
            config=str(self.folder / BEST),
        )
        self._write_config(BEST, result.best)
        self._write_config(CHEAPEST, result.cheapest)
        return replace(result, notes=[*result.notes, *self._limits(result)])

    def _limits(self, result: SearchResult) -> list[str]:
        """Returns notes on the limits of the verdict."""
        examples = result.judged_examples
        best = result.best.settings.items()
        edges = [name for name, value in best if search_space.is_at_edge(self.axes[name], value)]
        notes = {
            f"the best trial is at the edge of the range of {', '.join(edges)}; a wider range may be better": edges,
            f"{len(result.trials)} trials are too few to rank the settings by importance": not result.importances,
            f"only {examples} held-out examples for the final evaluation; more of them (--eval-data or "
            "--validation-split) would reveal smaller differences": examples < FEW_EXAMPLES,
        }
        return [text for text, applies in notes.items() if applies]

    def _final_runs(self, chosen: Sequence[Candidate]) -> dict[int, list[Trial]]:
        """Returns finalist -> its runs, the same number for all. Finalists that failed with a seed are dropped."""
        runs = self._run_finals(chosen)
        most = max(map(len, runs.values()))
        if not most:
            best = f"trial {chosen[0].number} ({search_space.format_values(chosen[0].settings)}) has the best result"
            raise self.session.no_verdict(f"the trials, before any final run; {best} so far")
        self.session.note_missing(sum(map(len, runs.values())), len(chosen) * self.study.seeds, "final runs")
        failed = {number: [trial for trial in trials if not trial.done] for number, trials in runs.items()}
        for number, (first, *_) in ((number, trials) for number, trials in failed.items() if trials):
            self.session.note(f"trial {number} was dropped from the finalists: {first.outcome} with a different seed")
        good = {number: trials for number, trials in runs.items() if len(trials) == most and not failed[number]}
        if not good:
            raise ConfigError("no result: all finalists failed when repeated with a different seed")
        return good

    def _run_finals(self, chosen: Sequence[Candidate]) -> dict[int, list[Trial]]:
        """Completes the final runs that no other worker is running, while there is time. Returns the runs of each."""
        seeds = [self.train.seed + number for number in range(1, self.study.seeds + 1)]  # not the seed of the trials
        wanted = [(candidate, seed) for seed in seeds for candidate in chosen]
        for candidate, seed in wanted:
            with suppress(Timeout):
                self._final_run(candidate, seed)
        runs: dict[int, list[Trial]] = {candidate.number: [] for candidate in chosen}
        for candidate, seed in wanted:
            while True:
                try:
                    trial = self._final_run(candidate, seed)
                    break
                except Timeout:
                    time.sleep(POLL_SECONDS)
                    self.session.check_stopped()
            if trial is None:
                break
            runs[candidate.number].append(trial)
        return runs

    def _final_run(self, candidate: Candidate, seed: int) -> Trial | None:
        """Returns the run of a finalist with a seed; None after --minutes. Raises Timeout if another worker runs it."""
        folder = self.folder / "finals" / f"{candidate.number:04d}" / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / RUN_LOCK, timeout=0):
            if not self.session.may_run(folder):
                return None
            spec = self._spec(candidate.settings, choosing=False, max_steps=self.steps, seed=seed)
            is_new = not self.session.has_trial(folder)
            trial = self.session.trial(spec, folder)
            self.base[False] = self.base[False] or trial.base
            if is_new:
                self.session.log(f"trial {candidate.number} repeated with seed {seed}: {trial.summary}")
            return trial

    def _write_config(self, name: str, finalist: Finalist) -> None:
        """Writes a file for `tailora train --config`: the run's settings, updated with the finalist's."""
        path = self.folder / name
        base = self.train.model_dump(exclude_unset=True, exclude={"resume_from_checkpoint"})
        changes = search_space.settings_of(finalist.settings, self.groups, self.train)
        values = {**base, **changes, "output_dir": str(path.with_suffix(""))}
        TrainConfig(**values)
        write_file(path, config_text(values).encode())
