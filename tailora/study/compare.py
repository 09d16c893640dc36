"""Compares LoRA with full fine-tuning, or any variants (arms) with each other: same data, order, tokens and seeds.

    search the learning rate of each arm             on the selection half of the held-out examples
    final runs: each arm at its best rate, per seed  on the evaluation half -> differences, verdict

A comparison is fair only if every arm has its own best learning rate, so every arm gets the same number of tries. The
final runs use different seeds and different held-out examples than the search for the rate. The same call resumes an
interrupted comparison and reads finished runs from their folders. Several workers try the rates of the arms in
parallel, then share the final runs. After --minutes, no further run starts.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from tailora.data.schemas import SEQ2SEQ
from tailora.errors import ConfigError, TargetError
from tailora.formats.io import read_own_json, write_file
from tailora.formats.run_folder import write_report
from tailora.study.comparison_verdict import evaluate_arms
from tailora.study.config import FULL, CompareConfig, answers_decide, arm_settings, check_metric
from tailora.study.learning_rate_search import LearningRateSearch
from tailora.study.results import Comparison
from tailora.study.search_space import STEP_CHOICE
from tailora.study.study_store import (
    CLOCK,
    DAMAGED,
    TEXTS,
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
    Progress,
    RunTrial,
    Trial,
    TrialSpec,
    Worker,
    run_in_subprocess,
)
from tailora.train.config import TASK_TYPES, TrainConfig

STUDY, RUNS = "compare.json", "runs"
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
    check_metric(train, study)
    for arm in study.arms:  # raises ConfigError for conflicting settings
        arm_settings(train, study, arm, learning_rate=study.first_rate(arm))
    workers = make_workers(study.workers, train.device, processes)
    with locked(folder, STUDY, wait=False):
        begun = any((folder / RUNS).glob(f"*/*/{RESULT}"))
        open_folder(folder, STUDY, settings, begun=begun, identity=_identity)
        session = StudySession(folder, study.minutes, log, progress, run_trial, processes)
        comparison = _Comparison(train, study, session, workers).run(settings)
    write_report(folder, "compare", comparison.to_dict())
    return comparison


def _identity(settings: Settings) -> Settings:
    """Returns the settings that must not change on resume."""
    study = settings.get("compare", {})
    return {**settings, "compare": {name: value for name, value in study.items() if name not in ADJUSTABLE}}


class _Comparison:
    """The runs of one comparison, one after another, or in parallel with several workers."""

    def __init__(
        self, train: TrainConfig, study: CompareConfig, session: StudySession, workers: Sequence[Worker] = ()
    ) -> None:
        self.train, self.study, self.session, self.folder = train, study, session, session.folder
        self.workers = workers
        clock = self.folder / CLOCK
        self.earlier_seconds = read_own_json(clock, float, DAMAGED) if clock.exists() else 0.0
        self.base: dict[tuple[str, bool], BaseLosses | None] = {}  # arm, choosing -> losses of its base

    def run(self, settings: dict[str, Any]) -> Comparison:
        rates = self._search_rates()
        runs = self._final_runs(rates)
        self.session.note_workers(chain(*runs.values()))
        done = next((trial for trials in runs.values() for trial in trials if trial.done), None)
        if done is not None:
            self.session.note_data(done)
        seconds = read_own_json(self.folder / CLOCK, float, DAMAGED)
        return evaluate_arms(self.study, rates, runs, notes=self.session.notes, settings=settings, seconds=seconds)

    def _trials(self, runs: Sequence[Run], *, final: bool) -> Iterator[Trial | None]:
        """Yields the trials of `runs` in this order, computed in parallel if there are workers.

        final: evaluate both halves of the held-out examples, and forgetting.    None: the time was up.
        """
        if not self.workers:
            yield from (self._trial(run, self.session, final=final) for run in runs)
            return
        free: SimpleQueue[StudySession] = SimpleQueue()
        for worker in self.workers:
            free.put(replace(self.session, worker=worker))

        def run_on_worker(run: Run) -> Trial | None:
            session = free.get()
            try:
                return self._trial(run, session, final=final)
            finally:
                free.put(session)

        with threads_of(self.workers) as pool:
            yield from pool.map(run_on_worker, runs)

    def _trial(self, run: Run, session: StudySession, *, final: bool) -> Trial | None:
        """Reads the run from its folder, or runs it. Returns None if the time is up.    session: of the worker."""
        arm, name, fixed = run
        path, choosing = self.folder / RUNS / arm / name, not final
        if not session.may_run(path):
            return None
        spec = TrialSpec(
            arm_settings(self.train, self.study, arm, **fixed),
            forgetting=(self.study.forgetting_data or "") if final and measures_forgetting(self.train) else None,
            keep=final and self.study.method(arm) != FULL,  # a full model for every seed would fill the disk
            choosing=choosing,
            before=self.base.get((arm, choosing)),
            texts=str(self.folder / TEXTS),
            answers=answers_decide(self.train),
            # one seed is enough for the base
            base_answers=final and answers_decide(self.train) and fixed["seed"] == self.train.seed + 1,
        )
        is_new = not session.has_trial(path)
        try:
            trial = session.trial(spec, path)
        except TargetError as error:  # only the run knows the model's layers
            raise TargetError(f"variant {arm!r}: {error}") from None
        if is_new:
            write_file(self.folder / CLOCK, json.dumps(self.earlier_seconds + session.seconds).encode())
        self.base[arm, choosing] = self.base.get((arm, choosing)) or trial.base
        return trial

    def _search_rates(self) -> dict[str, LearningRateSearch]:
        """Tries learning rates in turns: one of every arm, so that all have the same number of tries."""
        tries = self.study.rate_tries
        searches = {arm: LearningRateSearch(self.study.first_rate(arm), tries) for arm in self.study.arms}
        while rates := {arm: rate for arm, search in searches.items() if (rate := search.next_rate()) is not None}:
            runs: list[Run] = [(arm, f"rate-{rate:.3g}", {"learning_rate": rate}) for arm, rate in rates.items()]
            turn: dict[str, Trial] = {}
            for (arm, rate), trial in zip(rates.items(), self._trials(runs, final=False), strict=True):
                if trial is not None:
                    turn[arm] = trial
                    result = trial.measure.text(trial.objective()) if trial.done else trial.outcome
                    self.session.log(f"{arm}: learning rate {rate:.2g}, {result}")
            if len(turn) < len(runs):
                self.session.note_missing(max(len(search.tried) for search in searches.values()), tries, "rate tries")
                break
            for arm, trial in turn.items():  # evaluated on the selection half only
                searches[arm].record(rates[arm], trial.objective(), fits=trial.outcome != OUT_OF_MEMORY)
        return searches

    def _final_runs(self, rates: Mapping[str, LearningRateSearch]) -> dict[str, list[Trial]]:
        """Returns the runs of each arm at its best rate, with the same seeds. Raises ConfigError if there are none."""
        best = {arm: search.best for arm, search in rates.items() if search.best is not None}
        seeds = [self.train.seed + number for number in range(1, self.study.seeds + 1)]  # not used by the search
        wanted: list[Run] = [
            (arm, f"seed-{seed}-rate-{rate:.3g}", {"learning_rate": rate, "seed": seed})
            for seed in seeds
            for arm, rate in best.items()
        ]
        runs: dict[str, list[Trial]] = {arm: [] for arm in best}
        for (arm, _, fixed), trial in zip(wanted, self._trials(wanted, final=True), strict=True):
            if trial is not None:
                runs[arm].append(trial)
                text = f"{arm}: seed {fixed['seed']} at the best learning rate {best[arm]:.2g}, {trial.summary}"
                self.session.log(text)
        complete = min(map(len, runs.values()), default=0)
        if not complete and not all(search.tried and search.best is None for search in rates.values()):
            so_far = ", ".join(f"{arm} {rate:.2g}" for arm, rate in best.items()) or "none"
            raise self.session.no_verdict(f"the search for learning rates (best so far: {so_far})")
        if best:
            self.session.note_missing(complete, len(seeds), "seeds")
        return {arm: trials[:complete] for arm, trials in runs.items()}


def measures_forgetting(train: TrainConfig) -> bool:
    """False for classifiers and encoder-decoder models: forgetting is measured by predicting the next token."""
    return train.task not in (*TASK_TYPES, SEQ2SEQ)
