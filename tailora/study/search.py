"""Which settings are the best for this model and data, and which the cheapest that are as good.

    probe a few steps -> plan: steps of a trial
    trials: Optuna's TPE proposes, a process of its own trains, halving ends the worse half, judged on the choosing half
    finalists: several seeds each, judged on the other half -> best, cheapest, verdict

Several processes may do this in one folder, or machines with one database: each takes trials as long as some are
missing, then runs of finalists; all end with the same report. Interrupted, the same command goes on.
"""

import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.pruners import SuccessiveHalvingPruner
from optuna.samplers import TPESampler
from optuna.trial import FrozenTrial, TrialState

from tailora.errors import ConfigError, listing
from tailora.formats.io import write_file
from tailora.formats.run_folder import write_report
from tailora.study import study_store as folders
from tailora.study.budget import PROBE_STEPS, Plan, longest, planned, probe, probe_settings, read_plan
from tailora.study.config import SearchConfig
from tailora.study.judging import by_loss, finalists, judge
from tailora.study.results import Candidate, Finalist, SearchResult
from tailora.study.search_space import TARGETS, Axis, Range, at_edge, read_space, searched, settings, start
from tailora.study.trial import RESULT, Base, Progress, Spec, Told, Trial, choosing_part, halves, judging_half, try_out
from tailora.train.config import TrainConfig
from tailora.train.config_file import config_text

# ---- Optuna's part of a search: what is proposed, and which settings mattered.


RANDOM_TRIALS = 6  # before TPE has seen enough to model
BEST_SHARE = 0.25  # of the trials: what importances are about
FEWEST = 8  # trials, for two among the best quarter


def sampler(seed: int, number: int) -> TPESampler:
    """Of one trial: its proposals depend on seed, number and what is known, not on which process asks.

    Trials that others are running count as bad ones (constant liar), so that nobody tries the same next to them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return TPESampler(seed=(seed * 1_000_003 + number) % 2**32, n_startup_trials=RANDOM_TRIALS, constant_liar=True)


def suggest(trial: optuna.Trial, axes: Mapping[str, Axis]) -> dict[str, Any]:
    """A value for every axis; an axis with one value is not searched."""
    values: dict[str, Any] = {}
    for name, axis in axes.items():
        if isinstance(axis, Range):
            values[name] = trial.suggest_float(name, axis.low, axis.high, log=axis.log)
        else:
            values[name] = axis[0] if len(axis) == 1 else trial.suggest_categorical(name, axis)
    return values


def axes(
    space: Mapping[str, Axis], parts: Mapping[str, Any], given: Mapping[str, Axis], note: Callable[[str], None]
) -> dict[str, Axis]:
    """The space as far as this model has it. parts: see `study.parts`.  given: what was asked for, not the default.

    Raises ConfigError for a value that was asked for and that the model cannot take.
    """
    found = {name: _fitting(name, axis, parts) for name, axis in space.items()}
    lost = {name: values for name, axis in space.items() if (values := _lost(axis, found[name]))}
    reasons = {name: f"{name} = {', '.join(map(str, values))}: {_why(name, parts)}" for name, values in lost.items()}
    if problems := [reason for name, reason in reasons.items() if name in given or not found[name]]:
        raise ConfigError(listing([f"space: {problem}" for problem in problems]))
    for reason in reasons.values():
        note(f"left out of the space: {reason}")
    return found


def _lost(axis: Axis, kept: Axis) -> list[Any]:
    return [] if isinstance(axis, Range) else [value for value in axis if value not in kept]


def _fitting(name: str, axis: Axis, parts: Mapping[str, Any]) -> Axis:
    if isinstance(axis, Range) or not parts:
        return axis
    if name == "r":
        return tuple(value for value in axis if value <= parts["largest_r"])
    if name == "target_modules":
        return tuple(value for value in axis if value not in TARGETS[1:] or value in parts)
    return axis


def _why(name: str, parts: Mapping[str, Any]) -> str:
    if name == "r":
        return f"the smallest matrix of the model takes ranks up to {parts['largest_r']}"
    return "the model's names do not tell its attention from its MLP; give names of layers, joined by +"


def importances(trials: Sequence[FrozenTrial]) -> dict[str, float]:
    """Share of each setting in being among the best quarter (PED-ANOVA, arXiv:2304.10255); {} for too few trials.

    Trials that were pruned or diverged count as worse than all that were not.
    """
    states = (TrialState.COMPLETE, TrialState.PRUNED)
    known = [trial for trial in trials if trial.state in states and trial.params]
    done = [trial.value for trial in known if trial.state == TrialState.COMPLETE and trial.value is not None]
    if len(known) < FEWEST or not done:
        return {}
    worst = max(done) + 1.0
    study = optuna.create_study()
    for trial in known:
        value = trial.value if trial.state == TrialState.COMPLETE else worst
        study.add_trial(optuna.trial.create_trial(params=trial.params, distributions=trial.distributions, value=value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        found = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator(target_quantile=BEST_SHARE))
    return {name: float(value) for name, value in found.items()}


# ---- The runs that judge: several seeds of each finalist, shared by all processes of a search through their folders.


LOCK = "run.lock"
Run = Callable[[Candidate, int, Path], Trial]  # finalist, seed, folder -> what came out, made now or before


@dataclass(frozen=True)
class Final:
    candidate: Candidate
    seed: int
    folder: Path


def finals(chosen: Sequence[Candidate], seeds: Sequence[int], folder: Path, first: int) -> Iterator[list[Final]]:
    """In rounds that are worth having as a whole: the first few finalists by seed, then each other with its seeds."""
    for seed in seeds:
        yield [_final(each, seed, folder) for each in chosen[:first]]
    for each in chosen[first:]:
        yield [_final(each, seed, folder) for seed in seeds]


def _final(candidate: Candidate, seed: int, folder: Path) -> Final:
    return Final(candidate, seed, folder / "finals" / f"{candidate.number:04d}" / f"seed-{seed}")


def shared(round_of: Sequence[Final], run: Run) -> list[Trial]:
    """The runs of a round: those that nobody makes are made here, for the others it waits. In order."""
    for final in round_of:
        _made(final, run, wait=False)
    return [trial for final in round_of if (trial := _made(final, run, wait=True)) is not None]


def _made(final: Final, run: Run, *, wait: bool) -> Trial | None:
    final.folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(final.folder / LOCK, timeout=-1 if wait else 0):
            return run(final.candidate, final.seed, final.folder)
    except Timeout:
        return None


# ---- What a search comes back with, and what is said beside its verdict.


FEW = 20  # held-out examples


def write_config(path: Path, train: TrainConfig, changes: Mapping[str, Any]) -> Path:
    """What `tailora train --config` takes: the run's settings with the chosen ones, in a folder beside the file."""
    own = train.model_dump(exclude_unset=True, exclude={"resume_from_checkpoint"})
    values = {**own, **changes, "output_dir": str(path.with_suffix(""))}
    TrainConfig(**values)
    write_file(path, config_text(values).encode())
    return path


def remarks(
    plan: Plan,
    axes: Mapping[str, Axis],
    candidates: Sequence[Candidate],
    best: Finalist,
    importances: Mapping[str, float],
    judged: int,
) -> list[str]:
    """What limits the verdict. judged: held-out examples that judge."""
    edges = [name for name, value in best.settings.items() if at_edge(axes[name], value)]
    rules = {
        f"{', '.join(edges)} of the best lies at the edge of its space: a wider one may hold better": edges,
        f"trials had {plan.steps:,} of the {plan.longest:,} steps that the settings ask for; in longer runs a "
        "lower learning rate and a higher rank may be better": plan.steps < plan.longest,
        f"{len(candidates)} trials are too few to say which settings matter": not importances,
        f"{judged} held-out examples judge: more, by --eval-data or --validation-split, would tell finer": judged < FEW,
    }
    return [text for text, holds in rules.items() if holds]


def described(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items()
    )


# ----


STUDY, BEST, CHEAPEST = "search.json", "best.yaml", "cheapest.yaml"
POLL_SECONDS = 1.0
RESERVED = 2  # finalists that time is kept for: the best, and a cheaper one

Say = Callable[[str], None]


def search(
    train: TrainConfig, study: SearchConfig, say: Say = lambda _: None, progress: Progress | None = None
) -> SearchResult:
    """Runs what is missing of the search in `train.output_dir` and judges. Joins one that is under way.

    Raises ConfigError; whatever a run raises that is neither divergence nor lack of memory.
    """
    if study.lr_only:
        raise ConfigError("lr_only is for study.lr_range.find_range, which finds the learning rates alone")
    folder = Path(train.output_dir)
    space = searched(read_space(study.space), train)
    asked = {
        "train": train.model_dump(mode="json", exclude={"output_dir"}),
        "space": {name: str(axis) if not isinstance(axis, tuple) else list(axis) for name, axis in space.items()},
    }
    with folders.claimed(folder):
        folders.claim(folder, STUDY, asked, "search")
    with folders.seated(folder) as seat:
        found = _Search(train, study, space, folder, seat, say, progress).run(asked)
    write_report(folder, "search", found.to_dict())
    return found


class _Search:
    """One process's part of a search; what others have done is read from the study and the folder."""

    def __init__(
        self,
        train: TrainConfig,
        study: SearchConfig,
        space: dict[str, Axis],
        folder: Path,
        seat: int,
        say: Say,
        progress: Progress | None,
    ) -> None:
        self.train, self.study, self.space, self.folder = train, study, space, folder
        self.seat, self.say, self.progress = seat, say, progress
        self.started = time.monotonic()
        self.notes: list[str] = []
        self.groups: dict[str, Any] = {}
        self.base: dict[bool, Base | None] = {}  # whether choosing -> what it has on those held-out examples

    def run(self, asked: dict[str, Any]) -> SearchResult:
        with folders.claimed(self.folder):
            self.optuna, self.storage = folders.open_study(self.folder, self.study.storage, asked)
            plan, parts = self._plan()
            self.axes = axes(self.space, parts, read_space(self.study.space), self._note)
            if not self.optuna.get_trials(deepcopy=False):
                self.optuna.enqueue_trial(start(self.axes, self.train))
        self.plan, self.groups = plan, parts
        self.optuna.pruner = SuccessiveHalvingPruner(min_resource=plan.rung, reduction_factor=2)
        self._trials()
        return self._judged(asked)

    def _left(self) -> float:
        """Seconds until the time is up; infinite without --minutes."""
        if self.study.minutes is None:
            return math.inf
        return self.study.minutes * 60 - (time.monotonic() - self.started)

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            self.say(text)

    # ---- how long

    def _plan(self) -> tuple[Plan, dict[str, Any]]:
        """Steps of a trial, and the parts of the model: from a few steps, once for all processes. Under the claim."""
        known = self.folder / folders.PLAN
        if not known.exists():
            self.say(f"timing {PROBE_STEPS} steps")
            spec = self._spec(probe_settings(self.space, self.train), choosing=False, describe=True)
            costs, trial = probe(spec, self.folder / folders.PROBE, self.progress)
            halves(len(trial.counts))  # raises: too few are found before anything is kept
            asked, finals = longest(self.train, trial.numbers["examples"]), RESERVED * self.study.seeds
            plan = planned(costs, asked, self._left(), self.study.wanted, finals)
            if cut := trial.numbers.get("truncated"):
                self._note(f"{cut} examples are longer than --max-length {self.train.max_length} and were cut")
            content = {"plan": plan.to_dict(), "parts": trial.numbers["parts"], "base": trial.base}
            write_file(known, json.dumps(content).encode())
        content = json.loads(known.read_text())
        plan, base = read_plan(content["plan"]), content.get("base")
        self.base = {True: choosing_part(base), False: base}
        cut = f" of the {plan.longest:,} that the settings ask for" if plan.steps < plan.longest else ""
        self.say(f"a trial has {plan.steps:,} steps{cut} and takes up to {plan.trial_seconds:,.0f} s")
        return plan, content["parts"]

    # ---- trials

    def _trials(self) -> None:
        """Until enough are finished, by whomever, or the time is up."""
        while True:
            with folders.claimed(self.folder):
                if again := folders.bury(self.optuna, self.folder, self.seat):
                    self.say(f"{again} trial{'s' * (again > 1)} of a process that ended early will be run again")
                running, missing = self._standing()
                late = self._left() < self.plan.trial_seconds + self._time_of_finals()
                begun = self._begin() if missing and not late else None
            if begun is not None:
                self._trial(begun)
            elif running and not late:
                time.sleep(POLL_SECONDS)
            else:
                break
        if missing and self.study.wanted is not None:
            self._note(f"--minutes left time for {len(self._candidates())} of {self.study.wanted} trials")

    def _standing(self) -> tuple[int, bool]:
        """How many trials are running, and whether another one is wanted."""
        running = len(self.optuna.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))
        wanted = self.study.wanted
        return running, wanted is None or running + len(self._candidates()) < wanted

    def _candidates(self) -> list[Candidate]:
        """The finished trials, whoever made them."""
        trials = self.optuna.get_trials(deepcopy=False)
        return [folders.outcome(trial) for trial in trials if folders.OUTCOME in trial.user_attrs]

    def _begin(self) -> optuna.Trial:
        return folders.begin(self.optuna, folders.home(self.folder), self.seat)

    def _trial(self, begun: optuna.Trial) -> None:
        try:
            with folders.beating(self.storage, begun._trial_id):
                self.optuna.sampler = sampler(self.train.seed, begun.number)
                candidate = self._tried(begun, suggest(begun, self.axes))
        except BaseException:
            self.optuna.tell(begun, state=TrialState.FAIL, skip_if_finished=True)  # queued again when it goes on
            raise
        if folders.finish(self.optuna, begun, candidate):
            self.say(_line(candidate))
        else:
            self._note(f"trial {begun.number} was taken for dead, since this process was still for too long")

    def _tried(self, begun: optuna.Trial, params: dict[str, Any]) -> Candidate:
        started = time.monotonic()
        until = started + self._left() - self._time_of_finals()
        spec = self._spec(params, choosing=True, max_steps=self.plan.steps, eval_steps=self.plan.rung)

        def judged(told: Told) -> str | None:
            if told.held_out and 0 < told.step < told.steps:
                begun.report(told.loss, told.step)
                if begun.should_prune():
                    return f"in the worse half at step {told.step}"
            return "out of time" if time.monotonic() > until else None

        made = try_out(spec, self.folder / "trials" / f"{begun.number:04d}", self.progress, judged)
        own = [loss for step, loss in made.curve if step > 0]
        return Candidate(
            number=begun.number,
            state=made.outcome,
            settings=params,
            eval_loss=own[-1] if own else None,
            trainable_parameters=made.parameters or None,
            seconds=time.monotonic() - started,
            curve=made.curve,
            message=made.message,
        )

    def _spec(self, params: Mapping[str, Any], *, choosing: bool, describe: bool = False, **given: Any) -> Spec:
        """Of a trial with these values of the space."""
        common = self.train.model_dump(exclude_unset=True, exclude={"output_dir", "resume_from_checkpoint"})
        split = self.train.seed if self.train.split_seed is None else self.train.split_seed
        changes = settings(params, self.groups, self.train)
        own = {"samples": 0, "split_seed": split, "save_steps": 0, "eval_steps": 0, "early_stopping_patience": 0}
        values = {**common, **changes, **own, **given}
        TrainConfig(**values)
        return Spec(values, keep=False, choosing=choosing, describe=describe, before=self.base.get(choosing))

    # ---- finals

    def _time_of_finals(self) -> float:
        return RESERVED * self.study.seeds * self.plan.final_seconds

    def _judged(self, asked: dict[str, Any]) -> SearchResult:
        candidates = self._candidates()
        chosen = finalists(candidates, self.study.margin, self.study.finalists)
        if not chosen:
            ends = "; ".join(f"trial {each.number} {each.state}" for each in candidates)
            raise ConfigError(f"no trial was finished, so there is nothing to choose from: {ends or 'none was begun'}")
        runs = self._finals(chosen)
        judged = judge([each for each in by_loss(chosen) if each.number in runs], runs, self.study.margin)
        best, _ = (
            write_config(self.folder / name, self.train, settings(each.settings, self.groups, self.train))
            for name, each in ((BEST, judged.best), (CHEAPEST, judged.cheapest))
        )
        shares = importances(self.optuna.get_trials(deepcopy=False))
        return SearchResult(
            best=judged.best,
            cheapest=judged.cheapest,
            finalists=judged.finalists,
            trials=candidates,
            importances=shares,
            verdict=judged.verdict,
            base_loss=judged.base_loss,
            steps=self.plan.steps,
            seeds=judged.seeds,
            judged_examples=judged.judged_examples,
            notes=[
                *self.notes,
                *remarks(self.plan, self.axes, candidates, judged.best, shares, judged.judged_examples),
            ],
            settings={**asked, "search": self.study.model_dump(mode="json")},
            seconds=sum(each.seconds or 0.0 for each in candidates) + sum(map(_seconds, chain(*runs.values()))),
            config=str(best),
        )

    def _finals(self, chosen: Sequence[Candidate]) -> dict[int, list[Trial]]:
        """number -> its runs, equally many of all; those that failed with a seed are left out."""
        runs: dict[int, list[Trial]] = {each.number: [] for each in chosen}
        seeds = [self.train.seed + number for number in range(1, self.study.seeds + 1)]  # other than the trials'
        for round_of in finals(chosen, seeds, self.folder, RESERVED):
            needed = len(round_of) * self.plan.final_seconds
            if any(runs.values()) and self._left() < needed:
                self._note("--minutes left no time for all seeds and finalists")
                break
            for final, trial in zip(round_of, shared(round_of, self._final), strict=True):
                runs[final.candidate.number].append(trial)
        failed = {number: [run for run in its if not run.done] for number, its in runs.items()}
        for number, its in failed.items():
            if its:
                self._note(f"trial {number} is no finalist: {its[0].outcome} with another seed")
        most = max(map(len, runs.values()))
        good = {number: its for number, its in runs.items() if len(its) == most and not failed[number]}
        if not good:
            raise ConfigError("all finalists failed with another seed, so there is nothing to choose from")
        return good

    def _final(self, candidate: Candidate, seed: int, folder: Path) -> Trial:
        spec = self._spec(candidate.settings, choosing=False, max_steps=self.plan.steps, seed=seed)
        new = not (folder / RESULT).exists()
        trial = try_out(spec, folder, self.progress)
        if new:
            said = f"held-out loss {trial.loss(judging_half(len(trial.counts))):.4f}" if trial.done else trial.outcome
            self.say(f"trial {candidate.number} again, seed {seed}: {said}")
        return trial


def _seconds(run: Trial) -> float:
    return float(run.numbers["seconds"])


def _line(each: Candidate) -> str:
    """A trial in a line of the log."""
    said = f"{each.eval_loss:.4f}" if each.eval_loss is not None else "no loss"
    ended = "" if each.state == "done" else f", {each.state}: {each.message}"
    return f"trial {each.number}: {said}{ended}  ({described(each.settings)})"
