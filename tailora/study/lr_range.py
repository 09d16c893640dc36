"""Finds learning rates: the useful range in one run, or with `LearningRateSearch` the best of an arm in a few runs.

find_range   the rate rises by the same factor at every step (arXiv:1506.01186), LOWEST..HIGHEST -> held-out loss every
             few steps -> where it begins to fall, is lowest, has risen again

The loss of a step's own examples is noisy, since each step has others. Here it is the loss of the same held-out
examples throughout, which gives a smooth curve. Rates above the lowest point undo what was learned.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tailora.errors import ConfigError
from tailora.formats.run_folder import write_report
from tailora.study.budget import SAFETY, START, TIMING_RATE, TIMING_STEPS, Costs, measure_costs, too_short
from tailora.study.config import SearchConfig, trial_settings
from tailora.study.study_store import TIMING, Log, StudySession, launch_settings, locked, open_folder
from tailora.study.trial import RESULT, Progress, RunTrial, Trial, TrialEvent, TrialSpec, run_in_subprocess
from tailora.train.config import NATS_PER_TOKEN, TrainConfig

STUDY, RISING, KIND = "search.json", "rising", "learning-rates"
LOWEST, HIGHEST = 1e-6, 1.0
STEPS, EVAL_STEPS = 120, 3  # 20 steps per decade
FEWEST_STEPS = 30
FALLEN, LOST = 0.05, 0.25  # shares of the gain: reached where the loss begins to fall, lost where it has risen again
LEAST_GAIN = 0.005  # a smaller gain counts as none


@dataclass(frozen=True)
class RangePlan:
    """plan.json.    steps: of the run."""

    steps: int


@dataclass(frozen=True)
class RateRange:
    """Useful learning rates of this model, data, batch size and adapter.

    suggestion: the rate of the lowest loss.    low: where the loss begins to fall.
    high: where the loss has risen again, or the last rate that was tried.
    gain: by how much the loss fell.    loss_unit: what it is measured in.
    curve: (rate, held-out loss after its step).
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
            f"The loss falls from {self.low:.1e}, is lowest at {self.suggestion:.1e} ({self.gain:.3f} {self.loss_unit} "
            f"below the base's {self.base_loss:.3f}), and {end} at {self.high:.1e}"
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
    """Finds the range by a run in `train.output_dir`, unless it was done before.

    processes: that train together in the run.
    Raises ConfigError, also if no rate lowers the loss, and whatever else a run raises.
    """
    if "learning_rate" in train.model_fields_set:
        raise ConfigError("--lr-only finds the learning rate: leave out learning_rate")
    folder = Path(train.output_dir)
    settings = {
        "train": train.model_dump(mode="json", exclude={"output_dir"}),
        "minutes": study.minutes,
        "lr_only": True,
        **launch_settings(processes),
    }
    session = StudySession(folder, study.minutes, log, progress, run_trial, processes)
    losses: list[float] = []

    def stop(event: TrialEvent) -> str | None:
        """Ends the run when the loss is well above that of the base: what follows is divergence."""
        if not event.held_out:
            return None
        losses.append(event.loss)
        gain = losses[0] - min(losses)
        return "diverging" if event.loss > losses[0] + max(gain, 0.1) else None

    with locked(folder, STUDY):
        begun = (folder / RISING / RESULT).exists()
        open_folder(folder, STUDY, settings, begun=begun)
        steps = session.plan(lambda: RangePlan(_steps_that_fit(train, session)), RangePlan).steps
        log(f"up to {steps} steps, at learning rates from {LOWEST:g} to {HIGHEST:g}, until the gain is lost")
        spec = _spec(train, rising=(LOWEST, HIGHEST), max_steps=steps, eval_steps=EVAL_STEPS)
        trial = session.trial(spec, folder / RISING, stop)
    rates = read_range(trial, steps, settings)
    write_report(folder, KIND, {"verdict": rates.verdict, **rates.to_dict()})
    return rates


def _steps_that_fit(train: TrainConfig, session: StudySession) -> int:
    """At most --max-steps, by default STEPS. Raises ConfigError for too few."""
    most = STEPS if train.max_steps is None else train.max_steps
    if most < FEWEST_STEPS:
        raise ConfigError(f"a range of learning rates needs {FEWEST_STEPS} steps, and --max-steps is {most}: give more")
    if session.minutes is None:
        return most

    def needed(costs: Costs, steps: int) -> float:
        return costs.trial(steps, evaluations=1 + steps // EVAL_STEPS)

    def check(costs: Costs, share: float = 1.0) -> float:
        """Returns the seconds left. Raises ConfigError if they are too few. share: of them that is planned."""
        left = share * session.seconds_left
        if needed(costs, FEWEST_STEPS) > left:
            what = f"{FEWEST_STEPS} steps, which a range of learning rates needs,"
            raise too_short(session, needed(costs, FEWEST_STEPS), what)
        return left

    check(START)
    spec = _spec(train, learning_rate=TIMING_RATE, max_steps=TIMING_STEPS)
    timing = partial(session.trial, spec, session.folder / TIMING)
    costs, trial = measure_costs(session, timing, check, choosing=True)
    if costs is None:
        raise ConfigError(f"{TIMING_STEPS} steps at a learning rate of {TIMING_RATE:g} already fail: {trial.message}")
    left = check(costs, SAFETY)
    return max(steps for steps in range(FEWEST_STEPS, most + 1) if needed(costs, steps) <= left)


def _spec(train: TrainConfig, rising: tuple[float, float] | None = None, **changes: Any) -> TrialSpec:
    settings = trial_settings(train, {"save_steps": 0, "early_stopping_patience": 0}, **changes)
    return TrialSpec(settings, keep=False, choosing=True, rising=rising)


# ---- Reading the curve


def read_range(trial: Trial, steps: int, settings: dict[str, Any]) -> RateRange:
    """steps: that were planned. Raises ConfigError when no rate lowers the loss."""
    rates = np.geomspace(LOWEST, HIGHEST, steps)
    (_, base_loss), *curve = trial.curve
    pairs = [(float(rates[step - 1]), loss) for step, loss in curve if math.isfinite(loss)]
    low, lowest, high, gain = landmarks(pairs, base_loss)
    if gain < LEAST_GAIN:
        raise ConfigError(
            f"no learning rate from {LOWEST:g} to {HIGHEST:g} lowered the held-out loss of {base_loss:.3f} within "
            f"{len(trial.losses)} steps: {trial.message or 'look at the data, --data and --eval-data'}"
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
    """Returns the rates where the loss begins to fall, is lowest, and has risen again; and the gain.

    curve: (rate, loss), from low to high rates.    base_loss: before the run.
    """
    rates, losses = np.array(curve).T
    lowest = int(losses.argmin())
    gain = float(base_loss - losses[lowest])
    # Where the running median of three has fallen, since a single low evaluation does not show that the loss does.
    padded = np.concatenate([losses[:1], losses, losses[-1:]])
    smoothed = np.median(np.lib.stride_tricks.sliding_window_view(padded, 3), axis=1)
    fallen = int(np.argmax(base_loss - smoothed >= FALLEN * gain)) if gain > 0 else 0
    risen = np.flatnonzero(losses[lowest:] > losses[lowest] + LOST * max(gain, 0.0))
    end = lowest + int(risen[0]) if len(risen) else len(rates) - 1
    return float(rates[fallen]), float(rates[lowest]), float(rates[end]), gain


# ---- The best rate of an arm

COARSE, FINE = 4.0, 2.0


class LearningRateSearch:
    """`next_rate` returns the rate to try, `record` takes its loss; repeat until `next_rate` returns None.

    It goes from the first rate in steps of a factor of 4 until the best rate has a worse one on either side. Then it
    tries once at a factor of 2 from the best. The loss is flat near its best (a factor of 2 costs a few thousandths of
    a nat), so a finer search is not worth its runs.
    """

    def __init__(self, first_rate: float, tries: int) -> None:
        """tries: the most rates in all, at least 1."""
        self.tries = tries
        self.tried: dict[float, float] = {}  # rate -> loss
        self.fits = True  # into memory, which is the same for every rate
        self._first_rate = first_rate

    def next_rate(self) -> float | None:
        if len(self.tried) >= self.tries or not self.fits:
            return None
        if not self.tried:
            return self._first_rate
        best = self.best
        if best is None:  # all diverged
            return min(self.tried) / COARSE**2
        if best == max(self.tried):
            return best * COARSE
        if best == min(self.tried):
            return best / COARSE
        # At a factor of 2 from the best, on the side of the better neighbour, unless that was tried.
        candidates = [
            rate for rate in (best * FINE, best / FINE) if not any(math.isclose(rate, tried) for tried in self.tried)
        ]
        if not candidates:
            return None
        above = min(rate for rate in self.tried if rate > best)
        below = max(rate for rate in self.tried if rate < best)
        return max(candidates) if self.tried[above] < self.tried[below] else min(candidates)

    def record(self, rate: float, loss: float, *, fits: bool = True) -> None:
        """loss: infinite for a run that diverged.    fits: whether the run fitted into memory."""
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
