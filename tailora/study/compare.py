"""LoRA against full fine-tuning, or any arms against each other: same data, same order, same tokens, same seeds.

    probe each arm (with --minutes) -> steps that fit
    each arm: its own learning rate, judged on one half of the held-out examples
    each arm, each seed: a run at that rate, judged on the other half -> differences, verdict

An arm whose rate was not searched is no control, so every arm gets as many tries. The halves keep apart what chose
the rate and what judges it, and the runs that judge have other seeds than those that chose.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from tailora.errors import ConfigError
from tailora.formats.io import create_output_folder, write_file
from tailora.formats.run_folder import write_report
from tailora.study.budget import FEWEST_STEPS, PROBE_STEPS, SAFETY, Costs, costs_of, longest
from tailora.study.config import AT_THE_END, FULL, CompareConfig, arm_settings
from tailora.study.judging import judged
from tailora.study.lr_search import Rates
from tailora.study.results import Comparison
from tailora.study.trial import OUT_OF_MEMORY, RESULT, Base, Progress, Spec, Trial, choosing_part, judging_half, try_out
from tailora.train.config import TrainConfig, without_removed

STUDY, PLAN, CLOCK = "compare.json", "plan.json", "seconds.json"
LATER = {"seeds", "rate_tries", "minutes", "margin"}  # what a comparison may be asked for more of

Say = Callable[[str], None]


def compare(
    train: TrainConfig, study: CompareConfig, say: Say = lambda _: None, progress: Progress | None = None
) -> Comparison:
    """Runs what is missing of the study in `train.output_dir` and judges. Interrupted, it goes on when called again.

    Called again with more seeds, tries or minutes, or with another margin, it keeps the runs that it has.
    Raises ConfigError; whatever a run raises that is neither divergence nor lack of memory.
    """
    folder = Path(train.output_dir)
    settings = {
        "train": train.model_dump(mode="json", exclude={"output_dir"}),
        "compare": study.model_dump(mode="json"),
    }
    if set_here := sorted(name for name in AT_THE_END if getattr(train, name)):
        raise ConfigError(f"a comparison judges every run at its end: leave {' and '.join(set_here)} out")
    for arm in study.arms:
        arm_settings(train, study, arm, learning_rate=study.prior(arm))  # what contradicts itself is found at once
    _claim(folder, settings)
    try:
        with FileLock(folder / ".lock", timeout=0):
            comparison = _Study(train, study, folder, say, progress).run(settings)
    except Timeout:
        raise ConfigError(f"another comparison is writing to {folder} now; give another --output-dir") from None
    write_report(folder, "compare", comparison.to_dict())
    return comparison


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    known = folder / STUDY
    text = json.dumps(settings, indent=1)
    if known.exists() and not any((folder / "runs").glob(f"*/[!p]*/{RESULT}")):  # but probes: it may be asked anew
        shutil.rmtree(folder / "runs", ignore_errors=True)
        (folder / PLAN).unlink(missing_ok=True)
    elif known.exists():
        if _lasting(json.loads(known.read_text())) != _lasting(json.loads(text)):
            raise ConfigError(f"{folder} holds a comparison with other settings; give another --output-dir")
    elif folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty and holds no comparison; give another --output-dir")
    create_output_folder(folder)
    write_file(known, text.encode())


def _lasting(settings: dict[str, Any]) -> dict[str, Any]:
    """What makes two comparisons different ones. With minutes the steps are planned, without they are the settings'."""
    study = settings["compare"]
    kept = {name: value for name, value in study.items() if name not in LATER}
    planned = study["minutes"] is not None
    return {**settings, "train": without_removed(settings["train"]), "compare": {**kept, "planned": planned}}


class _Study:
    """The runs of one comparison, in order; finished ones are read from their folders."""

    def __init__(
        self, train: TrainConfig, study: CompareConfig, folder: Path, say: Say, progress: Progress | None
    ) -> None:
        self.train, self.study, self.folder, self.say, self.progress = train, study, folder, say, progress
        self.started = time.monotonic()
        self.earlier = json.loads((folder / CLOCK).read_text()) if (folder / CLOCK).exists() else 0.0  # seconds
        self.notes: list[str] = []
        self.steps = 0  # planned for every run, with --minutes
        self.longest = 1  # steps that the settings ask for
        self.costs: dict[str, Costs] = {}  # of each arm, with --minutes
        self.base: dict[tuple[str, bool], Base | None] = {}  # arm, whether choosing -> what its base has

    def run(self, settings: dict[str, Any]) -> Comparison:
        steps = self._steps()
        rates = self._search(steps)
        finals = self._finals(steps, rates)
        if cut := next((run.numbers.get("truncated") for runs in finals.values() for run in runs if run.done), None):
            self._note(f"{cut} examples are longer than --max-length {self.train.max_length} and were cut")
        seconds = json.loads((self.folder / CLOCK).read_text())
        return judged(self.study, rates, finals, notes=self.notes, settings=settings, seconds=seconds)

    def _left(self) -> float:
        """Seconds until the time is up; infinite without --minutes."""
        if self.study.minutes is None:
            return np.inf
        return self.study.minutes * 60 - (time.monotonic() - self.started)

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self.say(text)

    def _trial(self, arm: str, where: str, *, final: bool, **given: Any) -> Trial:
        texts = (self.study.forgetting_data or "") if final else None
        spec = Spec(
            arm_settings(self.train, self.study, arm, **given),
            texts,
            keep=final and self.study.method(arm) != FULL,  # a whole model for every seed would fill the disk
            choosing=not final,
            before=self.base.get((arm, not final)),
            texts=str(self.folder / "texts.json"),
        )
        folder = self.folder / "runs" / arm / where
        new = not (folder / RESULT).exists()
        trial = try_out(spec, folder, self.progress)
        if new:
            write_file(self.folder / CLOCK, json.dumps(self.earlier + time.monotonic() - self.started).encode())
        if self.base.get((arm, not final)) is None:
            self.base[arm, not final] = trial.base
        return trial

    # ---- how long

    def _steps(self) -> dict[str, Any]:
        """`max_steps` that fit into --minutes, measured on a few steps of each arm; {} leaves the settings' own."""
        if self.study.minutes is None:
            return {}
        for arm in self.study.arms:
            self._probe(arm)
            if self._left() < 0 and not (self.folder / PLAN).exists():
                raise ConfigError(f"--minutes {self.study.minutes:g} were over when {arm} had been timed: give more")
        if not self.costs:
            raise ConfigError(f"no arm can be trained: {PROBE_STEPS} steps of each failed; see {self.folder / 'runs'}")
        known = self.folder / PLAN
        if not known.exists():
            costs = {arm: asdict(each) for arm, each in self.costs.items()}
            write_file(known, json.dumps({"max_steps": self._fitting(), "costs": costs}).encode())
        planned = json.loads(known.read_text())
        if "costs" in planned:  # as they were with all that a fresh process does
            self.costs = {arm: Costs(**each) for arm, each in planned["costs"].items()}
        self.steps = planned["max_steps"]
        self.say(f"{self.steps} steps in each run, planned to fit into the minutes")
        return {"max_steps": self.steps}

    def _probe(self, arm: str) -> None:
        """What the arm's runs cost, and its base on the held-out examples. Without costs when it does not run."""
        self.say(f"timing {PROBE_STEPS} steps of {arm}")
        started, rate = time.monotonic(), self.study.prior(arm) / 100
        trial = self._trial(arm, "probe", final=True, learning_rate=rate, max_steps=PROBE_STEPS)
        if trial.done:
            self.costs[arm] = costs_of(trial, time.monotonic() - started, halves=2)
            self.base[arm, True] = choosing_part(trial.base)
            self.longest = longest(self.train, trial.numbers["examples"])

    def _fitting(self) -> int:
        """Steps of every run. Raises ConfigError for too little time."""
        runs = self.study.rate_tries + self.study.seeds
        fixed, step = self._seconds(0), runs * sum(costs.step for costs in self.costs.values())
        steps, fewest = int((self._left() * SAFETY - fixed) / step), min(FEWEST_STEPS, self.longest)
        if steps < fewest:
            needs = math.ceil((time.monotonic() - self.started + (fixed + fewest * step) / SAFETY) / 60)
            raise ConfigError(
                f"--minutes {self.study.minutes:g} is too short for {runs} runs of {len(self.costs)} arms: "
                f"{fewest} steps each take {needs} minutes; give more, or fewer --seeds or --rate-tries"
            )
        return min(steps, self.longest)

    def _seconds(self, steps: int) -> float:
        """Of all runs of so many steps."""
        tries, seeds = self.study.rate_tries, self.study.seeds
        return sum(
            tries * costs.trial(steps, evaluations=1) + seeds * costs.final(steps) for costs in self.costs.values()
        )

    # ---- which rate

    def _search(self, steps: Mapping[str, Any]) -> dict[str, Rates]:
        """In turns, so that every arm has had as many tries when the time is up."""
        searches = {arm: Rates(self.study.prior(arm), self.study.rate_tries) for arm in self.study.arms}
        while asked := {arm: rate for arm, rates in searches.items() if (rate := rates.ask()) is not None}:
            folders = {arm: f"rate-{rate:.3g}" for arm, rate in asked.items()}
            if searches[next(iter(asked))].tried and self._late(folders):
                self._note("the search for learning rates was cut short by --minutes")
                break
            for arm, rate in asked.items():
                trial = self._trial(arm, folders[arm], final=False, learning_rate=rate, **steps)
                loss = trial.loss()  # on the choosing half, all that was evaluated
                searches[arm].tell(rate, loss, fits=trial.outcome != OUT_OF_MEMORY)
                said = f"held-out loss {loss:.4f}" if trial.done else trial.outcome
                self.say(f"{arm}: learning rate {rate:.2g}, {said}")
        return searches

    def _late(self, tries: Mapping[str, str]) -> bool:
        """Whether these tries (arm: folder), as far as they are new, would leave too little time for all seeds."""
        new = [self.costs[arm] for arm in self._missing(tries)]
        needed = sum(costs.trial(self.steps, evaluations=1) for costs in new)
        finals = self.study.seeds * sum(costs.final(self.steps) for costs in self.costs.values())
        return bool(new) and self._left() < needed + finals

    def _missing(self, runs: Mapping[str, str]) -> list[str]:
        """Arms with costs whose run, by folder, is not there yet."""
        there = {arm for arm, where in runs.items() if (self.folder / "runs" / arm / where / RESULT).exists()}
        return [arm for arm in runs if arm in self.costs and arm not in there]

    # ---- the runs that judge

    def _finals(self, steps: Mapping[str, Any], rates: Mapping[str, Rates]) -> dict[str, list[Trial]]:
        finals: dict[str, list[Trial]] = {arm: [] for arm, found in rates.items() if found.best is not None}
        for number in range(1, self.study.seeds + 1):
            seed = self.train.seed + number  # the rates were found with the seed itself
            folders = {arm: f"seed-{seed}-rate-{rates[arm].best:.3g}" for arm in finals}
            needed = sum(self.costs[arm].final(self.steps) for arm in self._missing(folders))
            if number > 1 and self._left() < needed:
                self._note(f"--minutes left time for {number - 1} of {self.study.seeds} seeds")
                break
            for arm, trials in finals.items():
                rate = rates[arm].best
                trial = self._trial(arm, folders[arm], final=True, learning_rate=rate, seed=seed, **steps)
                trials.append(trial)
                said = (
                    f"held-out loss {trial.loss(judging_half(len(trial.counts))):.4f}" if trial.done else trial.outcome
                )
                self.say(f"{arm}: seed {seed} at its best rate {rate:.2g}, {said}")
        return finals
