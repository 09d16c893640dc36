"""Finds learning rates: the useful range in one run, or with `LearningRateSearch` the best one in a few runs.

find_range   increases the rate by the same factor at every step (arXiv:1506.01186), from LOWEST to HIGHEST, evaluates
             the held-out loss every few steps, and finds where it begins to fall, is lowest, and has risen again

The training loss is noisy, because every step has different examples. This uses the loss of the same held-out examples
throughout, which gives a smooth curve. Rates above the lowest point undo the training.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tailora.errors import ConfigError
from tailora.formats.run_folder import write_report
from tailora.study.budget import SAFETY, START, TIMING_RATE, TIMING_STEPS, Costs, measure_costs, no_costs, too_short
from tailora.study.config import SearchConfig, trial_settings
from tailora.study.study_store import TIMING, TRIALS, Log, StudySession, locked, open_folder, study_settings
from tailora.study.trial import RESULT, Progress, RunTrial, Trial, TrialEvent, TrialSpec, run_in_subprocess
from tailora.train.config import GRPO, NATS_PER_TOKEN, TrainConfig

STUDY, RISING, KIND = "search.json", "rising", "learning-rates"
LOWEST, HIGHEST = 1e-6, 1.0
STEPS, EVAL_STEPS = 120, 3  # 20 steps per decade
SHORT_STEPS = 40  # 7 steps per decade, for a first idea
FEWEST_STEPS = 30
FALLEN, LOST = 0.05, 0.25  # shares of the gain that mark where the loss begins to fall and has risen again
LEAST_GAIN = 0.005  # a smaller gain counts as no gain


@dataclass(frozen=True)
class RangePlan:
    """The content of plan.json.    steps: of the run."""

    steps: int


@dataclass(frozen=True)
class RateRange:
    """Useful learning rates of this model, data, batch size and adapter.

    suggestion: the rate with the lowest loss.    low: where the loss begins to fall.
    high: where the loss has risen again, or the last rate tried.
    gain: decrease of the loss.    loss_unit: its unit.
    curve: (rate, held-out loss after the step with this rate).
    """

    suggestion: float
    low: float
    high: float
    gain: float
    curve: list[tuple[float, float]]
    diverged: bool
    base_loss: float
    steps: int
    settings: dict[str, Any]
    loss_unit: str = NATS_PER_TOKEN

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def verdict(self) -> str:
        has_risen = self.diverged or self.high < self.curve[-1][0]
        end = "has risen again" if has_risen else "is still low"
        return (
            f"The loss starts to fall at {self.low:.1e}, is lowest at {self.suggestion:.1e} ({self.gain:.3f} "
            f"{self.loss_unit} below the base's {self.base_loss:.3f}), and {end} at {self.high:.1e}"
            f"{'; then the run diverged' if self.diverged else ''}."
        )


def find_range(
    train: TrainConfig,
    study: SearchConfig,
    log: Log = lambda _: None,
    progress: Progress | None = None,
    run_trial: RunTrial = run_in_subprocess,
    *,
    processes: int = 1,
) -> RateRange:
    """Finds the range with a run in `train.output_dir`, or reads it if that run is complete.

    processes: number of processes of the run.
    Raises ConfigError, also if no rate lowers the loss, and any other error of a run.
    """
    if train.task == GRPO:
        raise ConfigError("--lr-only needs a loss that responds to every step; with --task grpo, use search without it")
    if "learning_rate" in train.model_fields_set:
        raise ConfigError("--lr-only searches for the learning rate, so it cannot be set as well; remove learning_rate")
    folder = Path(train.output_dir)
    settings = study_settings(train, processes, minutes=study.minutes, lr_only=True)
    session = StudySession(folder, study.minutes, log, progress, run_trial, processes)
    losses: list[float] = []

    def stop(event: TrialEvent) -> str | None:
        """Ends the run when the loss is well above the base's, because it only diverges from there."""
        if not event.held_out:
            return None
        losses.append(event.loss)
        gain = losses[0] - min(losses)
        return "diverging" if event.loss > losses[0] + max(gain, 0.1) else None

    with locked(folder, STUDY):
        begun = (folder / RISING / RESULT).exists() or (folder / TRIALS).exists()  # the second is a search
        open_folder(folder, STUDY, settings, begun=begun)
        steps = session.plan(lambda: RangePlan(_steps_that_fit(train, session)), RangePlan).steps
        log(f"up to {steps} steps with learning rates from {LOWEST:g} to {HIGHEST:g}, until the improvement is lost")
        spec = _spec(train, rising=(LOWEST, HIGHEST), max_steps=steps, eval_steps=EVAL_STEPS)
        trial = session.trial(spec, folder / RISING, stop)
        if not any(step and math.isfinite(loss) for step, loss in trial.curve):
            (folder / RISING / RESULT).unlink()
            text = f"the run ended before its first evaluation ({trial.outcome}: {trial.message})"
            raise ConfigError(f"{text}; the same command repeats it, or change the settings")
    rates = read_range(trial, steps, settings)
    write_report(folder, KIND, {"verdict": rates.verdict, **rates.to_dict()})
    return rates


def seconds_needed(costs: Costs, steps: int) -> float:
    """Returns the seconds of a run with this many steps, unless it ends early."""
    return costs.trial(steps, evaluations=1 + steps // EVAL_STEPS)


def _steps_that_fit(train: TrainConfig, session: StudySession) -> int:
    """Returns at most --max-steps (default STEPS). Raises ConfigError for too few."""
    most = STEPS if train.max_steps is None else train.max_steps
    if most < FEWEST_STEPS:
        raise ConfigError(f"--max-steps {most} is too low to cover the learning rates; use {FEWEST_STEPS} or more")
    if session.minutes is None:
        return most

    def check(costs: Costs, share: float = 1.0) -> float:
        """Returns the seconds left, times `share`. Raises ConfigError if that is too short."""
        left = share * session.seconds_left
        if seconds_needed(costs, FEWEST_STEPS) > left:
            what = f"the {FEWEST_STEPS} steps needed to cover the learning rates"
            raise too_short(session, seconds_needed(costs, FEWEST_STEPS), what)
        return left

    check(START)
    spec = _spec(train, learning_rate=TIMING_RATE, max_steps=TIMING_STEPS)
    timing = partial(session.trial, spec, session.folder / TIMING)
    costs, trial = measure_costs(session, timing, check, choosing=True)
    if costs is None:
        raise no_costs(trial)
    left = check(costs, SAFETY)
    return max(steps for steps in range(FEWEST_STEPS, most + 1) if seconds_needed(costs, steps) <= left)


def _spec(train: TrainConfig, rising: tuple[float, float] | None = None, **changes: Any) -> TrialSpec:
    settings = trial_settings(train, {"save_steps": 0, "early_stopping_patience": 0}, **changes)
    return TrialSpec(settings, keep=False, choosing=True, rising=rising)


# ---- Reading the curve


def read_range(trial: Trial, steps: int, settings: dict[str, Any]) -> RateRange:
    """steps: the planned number. Raises ConfigError if no rate lowers the loss."""
    rates = np.geomspace(LOWEST, HIGHEST, steps)
    (_, base_loss), *curve = trial.curve
    pairs = [(float(rates[step - 1]), loss) for step, loss in curve if math.isfinite(loss)]
    low, lowest, high, gain = landmarks(pairs, base_loss)
    if gain < LEAST_GAIN:
        raise ConfigError(
            f"no learning rate from {LOWEST:g} to {HIGHEST:g} lowered the held-out loss from {base_loss:.3f} within "
            f"{len(trial.losses)} steps; {trial.message or 'check --data and --eval-data'}"
        )
    return RateRange(
        suggestion=lowest,
        low=low,
        high=high,
        gain=gain,
        curve=pairs,
        diverged=not trial.done,
        base_loss=base_loss,
        steps=len(trial.losses),
        settings=settings,
        loss_unit=trial.loss_unit,
    )


def landmarks(curve: Sequence[tuple[float, float]], base_loss: float) -> tuple[float, float, float, float]:
    """Returns the rates where the loss begins to fall, is lowest, and has risen again, and the gain.

    curve: (rate, loss), from low to high rates.    base_loss: before the run.
    """
    rates, losses = np.array(curve).T
    lowest = int(losses.argmin())
    gain = float(base_loss - losses[lowest])
    # Use the running median of three, because a single low evaluation does not show that the loss falls.
    padded = np.concatenate([losses[:1], losses, losses[-1:]])
    smoothed = np.median(np.lib.stride_tricks.sliding_window_view(padded, 3), axis=1)
    fallen = int(np.argmax(base_loss - smoothed >= FALLEN * gain)) if gain > 0 else 0
    risen = np.flatnonzero(losses[lowest:] > losses[lowest] + LOST * max(gain, 0.0))
    end = lowest + int(risen[0]) if len(risen) else len(rates) - 1
    return float(rates[fallen]), float(rates[lowest]), float(rates[end]), gain


# ---- The best rate in a few runs

COARSE, FINE = 4.0, 2.0


@dataclass
class LearningRateSearch:
    """`next_rate` returns the rate to try, `record` stores its loss; repeat until `next_rate` returns None.

    It moves in steps of a factor of 4 from the first rate until the best rate has a worse one on either side. Then it
    tries once at a factor of 2 from the best. The loss is flat near its minimum (a factor of 2 costs a few thousandths
    of a nat), so a finer search is not worth its runs.

    tries: maximum number of rates, at least 1.    tried: rate -> loss.    fits: into memory; the same for every rate.
    """

    first_rate: float
    tries: int
    tried: dict[float, float] = field(default_factory=dict)
    fits: bool = True

    def next_rate(self) -> float | None:
        if len(self.tried) >= self.tries or not self.fits:
            return None
        if not self.tried:
            return self.first_rate
        best = self.best
        if best is None:  # all diverged
            return min(self.tried) / COARSE**2
        if best == max(self.tried):
            return best * COARSE
        if best == min(self.tried):
            return best / COARSE
        # Try a factor of 2 from the best, on the side of the better neighbor, unless it was tried before.
        finer = best * FINE, best / FINE
        candidates = [rate for rate in finer if not any(math.isclose(rate, tried) for tried in self.tried)]
        if not candidates:
            return None
        above = min(rate for rate in self.tried if rate > best)
        below = max(rate for rate in self.tried if rate < best)
        return max(candidates) if self.tried[above] < self.tried[below] else min(candidates)

    def record(self, rate: float, loss: float, *, fits: bool = True) -> None:
        """loss: infinite for a run that diverged.    fits: whether the run fit into memory."""
        self.tried[rate] = loss if math.isfinite(loss) else math.inf
        self.fits = self.fits and fits

    @property
    def best(self) -> float | None:
        """The rate with the lowest loss; None if all runs diverged."""
        finite = {rate: loss for rate, loss in self.tried.items() if math.isfinite(loss)}
        return min(finite, key=finite.__getitem__) if finite else None

    @property
    def losses(self) -> dict[float, float | None]:
        """Rate -> loss, None for a run that diverged."""
        return {rate: loss if math.isfinite(loss) else None for rate, loss in self.tried.items()}

    @property
    def bracketed(self) -> bool:
        """True if a lower and a higher rate were both worse than the best."""
        return self.best is not None and min(self.tried) < self.best < max(self.tried)
