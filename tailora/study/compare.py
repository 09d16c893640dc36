"""Compares LoRA with full fine-tuning, or any arms with each other: same data, same order, same tokens, same seeds.

    a few steps of each arm (with --minutes)      -> steps that fit
    for each arm its own learning rate            judged on the choosing half of the held-out examples
    for each arm and seed a run at that rate      judged on the other half -> differences, verdict

An arm whose rate was not searched is no control, so every arm gets as many tries. The halves keep apart what chose
the rate and what judges it, and the runs that judge have other seeds than those that chose. Interrupted, the same call
goes on; finished runs are read from their folders.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tailora.errors import ConfigError
from tailora.formats.io import write_file
from tailora.formats.run_folder import write_report
from tailora.study.budget import FEWEST_STEPS, SAFETY, TIMING_STEPS, Costs, costs_of, longest_run
from tailora.study.config import AT_THE_END, FULL, CompareConfig, arm_settings
from tailora.study.judging import judge_arms
from tailora.study.lr_search import LearningRateSearch
from tailora.study.results import Comparison
from tailora.study.study_store import PLAN, TIMING, Log, Settings, StudySession, locked, open_folder
from tailora.study.trial import (
    OUT_OF_MEMORY,
    RESULT,
    BaseLosses,
    Progress,
    RunTrial,
    Trial,
    TrialSpec,
    on_choosing_half,
    run_in_subprocess,
)
from tailora.train.config import TrainConfig

STUDY, CLOCK, RUNS = "compare.json", "seconds.json", "runs"
LATER = {"seeds", "rate_tries", "minutes", "margin"}  # of which a comparison may be asked for more


def compare(
    train: TrainConfig,
    study: CompareConfig,
    log: Log = lambda _: None,
    progress: Progress | None = None,
    run_trial: RunTrial = run_in_subprocess,
) -> Comparison:
    """Runs what is missing of the comparison in `train.output_dir`, and judges.

    Raises ConfigError; whatever a run raises that is neither divergence nor lack of memory.
    """
    folder = Path(train.output_dir)
    settings = {
        "train": train.model_dump(mode="json", exclude={"output_dir"}),
        "compare": study.model_dump(mode="json"),
    }
    if given := sorted(name for name in AT_THE_END if getattr(train, name)):
        raise ConfigError(f"a comparison judges every run at its end: leave {' and '.join(given)} out")
    for arm in study.arms:
        arm_settings(train, study, arm, learning_rate=study.first_rate(arm))  # raises for what contradicts itself
    begun = any((folder / RUNS).glob(f"*/[!p]*/{RESULT}"))  # but for the timing runs
    open_folder(folder, STUDY, settings, "comparison", begun=begun, discard=[RUNS, PLAN], identity=_identity)
    with locked(folder, busy=f"another comparison is writing to {folder} now; give another --output-dir"):
        session = StudySession(folder, study.minutes, log, progress, run_trial)
        comparison = _Comparison(train, study, session).run(settings)
    write_report(folder, "compare", comparison.to_dict())
    return comparison


def _identity(settings: Settings) -> Settings:
    """What makes two comparisons different: with minutes the steps are planned, without they are the settings'."""
    study = settings["compare"]
    kept = {name: value for name, value in study.items() if name not in LATER}
    return {**settings, "compare": {**kept, "planned": study["minutes"] is not None}}


class _Comparison:
    """The runs of one comparison, in order."""

    def __init__(self, train: TrainConfig, study: CompareConfig, session: StudySession) -> None:
        self.train, self.study, self.session, self.folder = train, study, session, session.folder
        clock = self.folder / CLOCK
        self.earlier_seconds = json.loads(clock.read_text()) if clock.exists() else 0.0
        self.steps = 0  # planned for every run, with --minutes
        self.longest = 1  # steps that the settings ask for
        self.costs: dict[str, Costs] = {}  # of each arm, with --minutes
        self.base: dict[tuple[str, bool], BaseLosses | None] = {}  # arm, choosing -> losses of its base

    def run(self, settings: dict[str, Any]) -> Comparison:
        steps = self._planned_steps()
        rates = self._search_rates(steps)
        runs = self._judging_runs(steps, rates)
        done = next((trial for trials in runs.values() for trial in trials if trial.done), None)
        if done is not None:
            self.session.note_truncated(done, self.train.max_length)
        seconds = json.loads((self.folder / CLOCK).read_text())
        return judge_arms(self.study, rates, runs, notes=self.session.notes, settings=settings, seconds=seconds)

    def _path(self, arm: str, name: str) -> Path:
        return self.folder / RUNS / arm / name

    def _trial(self, arm: str, name: str, *, judging: bool, **fixed: Any) -> Trial:
        """The run of this name, made now unless it was before. judging: on all held-out examples, with forgetting."""
        choosing = not judging
        spec = TrialSpec(
            arm_settings(self.train, self.study, arm, **fixed),
            forgetting=(self.study.forgetting_data or "") if judging else None,
            keep=judging and self.study.method(arm) != FULL,  # a whole model for every seed would fill the disk
            choosing=choosing,
            before=self.base.get((arm, choosing)),
            texts=str(self.folder / "texts.json"),
        )
        path = self._path(arm, name)
        is_new = not self.session.has_trial(path)
        trial = self.session.trial(spec, path)
        if is_new:
            seconds = self.earlier_seconds + self.session.seconds
            write_file(self.folder / CLOCK, json.dumps(seconds).encode())
        if self.base.get((arm, choosing)) is None:
            self.base[arm, choosing] = trial.base
        return trial

    def _missing(self, names: Mapping[str, str]) -> list[Costs]:
        """Costs of the runs (arm -> name) that are not made yet, as far as costs are known."""
        return [
            self.costs[arm]
            for arm, name in names.items()
            if arm in self.costs and not self.session.has_trial(self._path(arm, name))
        ]

    # ---- How long a run is

    def _planned_steps(self) -> dict[str, Any]:
        """`max_steps` that fit into --minutes, measured in a few steps of each arm; {} leaves the settings' own."""
        if self.study.minutes is None:
            return {}
        file = self.folder / PLAN
        for arm in self.study.arms:
            self._measure_costs(arm)
            if self.session.seconds_left < 0 and not file.exists():
                raise ConfigError(f"--minutes {self.study.minutes:g} were over when {arm} had been timed: give more")
        if not self.costs:
            raise ConfigError(f"no arm can be trained: {TIMING_STEPS} steps of each failed; see {self.folder / RUNS}")
        if not file.exists():
            costs = {arm: asdict(costs) for arm, costs in self.costs.items()}
            write_file(file, json.dumps({"max_steps": self._steps_that_fit(), "costs": costs}).encode())
        plan = json.loads(file.read_text())
        if "costs" in plan:  # measured in new processes, with all that such a process does
            self.costs = {arm: Costs(**costs) for arm, costs in plan["costs"].items()}
        self.steps = plan["max_steps"]
        self.session.log(f"{self.steps} steps in each run, planned to fit into the minutes")
        return {"max_steps": self.steps}

    def _measure_costs(self, arm: str) -> None:
        """Sets the arm's costs and what its base has; no costs if its run fails."""
        self.session.log(f"timing {TIMING_STEPS} steps of {arm}")
        begun, rate = self.session.seconds, self.study.first_rate(arm) / 100
        trial = self._trial(arm, TIMING, judging=True, learning_rate=rate, max_steps=TIMING_STEPS)
        if trial.done:
            self.costs[arm] = costs_of(trial, self.session.seconds - begun, choosing=False)
            self.base[arm, True] = on_choosing_half(trial.base)
            self.longest = longest_run(self.train, trial.numbers["examples"])

    def _steps_that_fit(self) -> int:
        """Steps of every run. Raises ConfigError for too little time."""
        tries, seeds = self.study.rate_tries, self.study.seeds
        fixed = sum(
            tries * costs.trial(0, evaluations=1) + seeds * costs.judging_run(0) for costs in self.costs.values()
        )
        step = (tries + seeds) * sum(costs.step for costs in self.costs.values())
        steps = int((self.session.seconds_left * SAFETY - fixed) / step)
        fewest = min(FEWEST_STEPS, self.longest)
        if steps < fewest:
            needs = math.ceil((self.session.seconds + (fixed + fewest * step) / SAFETY) / 60)
            raise ConfigError(
                f"--minutes {self.study.minutes:g} is too short for {tries + seeds} runs of {len(self.costs)} arms: "
                f"{fewest} steps each take {needs} minutes; give more, or fewer --seeds or --rate-tries"
            )
        return min(steps, self.longest)

    # ---- Which learning rate

    def _search_rates(self, steps: Mapping[str, Any]) -> dict[str, LearningRateSearch]:
        """The arms take turns, so that each has had as many tries when the time is up."""
        searches = {
            arm: LearningRateSearch(self.study.first_rate(arm), self.study.rate_tries) for arm in self.study.arms
        }
        while rates := {arm: rate for arm, own in searches.items() if (rate := own.next_rate()) is not None}:
            names = {arm: f"rate-{rate:.3g}" for arm, rate in rates.items()}
            if searches[next(iter(rates))].tried and self._too_late_for(names):
                self.session.note("the search for learning rates was cut short by --minutes")
                break
            for arm, rate in rates.items():
                trial = self._trial(arm, names[arm], judging=False, learning_rate=rate, **steps)
                loss = trial.loss()  # on the choosing half, which is all that was evaluated
                searches[arm].record(rate, loss, fits=trial.outcome != OUT_OF_MEMORY)
                result = f"held-out loss {loss:.4f}" if trial.done else trial.outcome
                self.session.log(f"{arm}: learning rate {rate:.2g}, {result}")
        return searches

    def _too_late_for(self, names: Mapping[str, str]) -> bool:
        """True if these tries (arm -> name), as far as they are new, would leave too little time for all seeds."""
        missing = self._missing(names)
        tries = sum(costs.trial(self.steps, evaluations=1) for costs in missing)
        judging = self.study.seeds * sum(costs.judging_run(self.steps) for costs in self.costs.values())
        return bool(missing) and self.session.seconds_left < tries + judging

    # ---- The runs that judge

    def _judging_runs(
        self, steps: Mapping[str, Any], rates: Mapping[str, LearningRateSearch]
    ) -> dict[str, list[Trial]]:
        best = {arm: search.best for arm, search in rates.items() if search.best is not None}
        runs: dict[str, list[Trial]] = {arm: [] for arm in best}
        for number in range(1, self.study.seeds + 1):
            seed = self.train.seed + number  # the rates were found with the seed itself
            names = {arm: f"seed-{seed}-rate-{rate:.3g}" for arm, rate in best.items()}
            needed = sum(costs.judging_run(self.steps) for costs in self._missing(names))
            if number > 1 and self.session.seconds_left < needed:
                self.session.note(f"--minutes left time for {number - 1} of {self.study.seeds} seeds")
                break
            for arm, rate in best.items():
                trial = self._trial(arm, names[arm], judging=True, learning_rate=rate, seed=seed, **steps)
                runs[arm].append(trial)
                self.session.log(f"{arm}: seed {seed} at its best rate {rate:.2g}, {trial.summary}")
        return runs
