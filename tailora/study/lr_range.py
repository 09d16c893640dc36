"""Which learning rates are useful at all, by one run whose rate rises by the same factor at every step.

    rates low..high -> held-out loss every few steps -> where it begins to fall, is lowest, is up again

The loss of a step is noisy, since each has other examples: here it is that of the same held-out examples throughout
(arXiv:1506.01186 looks at accuracy so), which leaves a smooth curve. Rates above the lowest point undo what was
learned.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tailora.errors import ConfigError
from tailora.formats.io import write_file
from tailora.formats.run_folder import write_report
from tailora.study import study_store as folders
from tailora.study.budget import PROBE_STEPS, SAFETY, SMALL_RATE, probe
from tailora.study.config import SearchConfig
from tailora.study.trial import Progress, Spec, Told, Trial, try_out
from tailora.train.config import TrainConfig

STUDY, KIND = "search.json", "learning-rates"
LOWEST, HIGHEST = 1e-6, 1.0
STEPS, BETWEEN = 120, 3  # 20 steps a decade; evaluations every 3
FEWEST = 30
BEGUN, LOST = 0.05, 0.25  # shares of the whole gain: where it begins, where so much of it is lost again
NOTHING = 0.005  # nats per token: a gain below it is none

Say = Callable[[str], None]


@dataclass(frozen=True)
class RateRange:
    """Learning rates of this model, data, batch size and adapter."""

    suggestion: float  # the rate of the lowest loss
    low: float  # where the loss begins to fall
    high: float  # where it has risen again, or the last rate that was tried
    gain: float  # nats per token by which the loss fell
    curve: list[tuple[float, float]]  # rate, held-out loss after its step
    diverged: bool
    base_loss: float
    steps: int
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def verdict(self) -> str:
        risen = self.diverged or self.high < self.curve[-1][0]
        ended = f"up again at {self.high:.1e}" if risen else f"still low at {self.high:.1e}, the highest tried"
        return (
            f"The loss falls from {self.low:.1e}, is lowest at {self.suggestion:.1e} ({self.gain:.3f} nats per token "
            f"below the base's {self.base_loss:.3f}), and is {ended}{' and then diverged' if self.diverged else ''}."
        )


def find_range(
    train: TrainConfig, study: SearchConfig, say: Say = lambda _: None, progress: Progress | None = None
) -> RateRange:
    """The run, in `train.output_dir`, unless it was made before.

    Raises ConfigError, also where no rate lowers the loss; whatever else a run raises.
    """
    if "learning_rate" in train.model_fields_set:
        raise ConfigError("--lr-only finds the learning rate: leave out learning_rate")
    folder = Path(train.output_dir)
    asked = {"train": train.model_dump(mode="json", exclude={"output_dir"}), "minutes": study.minutes, "lr_only": True}
    with folders.claimed(folder):
        folders.claim(folder, STUDY, asked, "search")
        steps = _planned(train, study.minutes, folder, progress)
        say(f"up to {steps} steps, at learning rates from {LOWEST:g} to {HIGHEST:g}, until the loss is lost")
        spec = _spec(train, {"max_steps": steps, "eval_steps": BETWEEN}, rising=(LOWEST, HIGHEST))
        trial = try_out(spec, folder / "rising", progress, _until_lost())
    found = read_range(trial, steps, asked)
    write_report(folder, KIND, {"verdict": found.verdict, **found.to_dict()})
    return found


def _planned(train: TrainConfig, minutes: float | None, folder: Path, progress: Progress | None) -> int:
    """Steps of the run, found once."""
    known = folder / folders.PLAN
    if not known.exists():
        steps = STEPS if minutes is None else _fitting(train, minutes, folder, progress)
        write_file(known, json.dumps({"steps": steps}).encode())
    kept: int = json.loads(known.read_text())["steps"]
    return kept


def _fitting(train: TrainConfig, minutes: float, folder: Path, progress: Progress | None) -> int:
    """Steps that fit into the time, at most STEPS. Raises ConfigError for too few."""
    spec = _spec(train, {"learning_rate": SMALL_RATE, "max_steps": PROBE_STEPS})
    costs, _ = probe(spec, folder / folders.PROBE, progress)
    each, beside = costs.step + costs.evaluation / BETWEEN, costs.fixed + costs.evaluation
    left = minutes * 60 * SAFETY - beside - costs.trial(PROBE_STEPS)
    steps = min(STEPS, int(left / each))
    if steps < FEWEST:
        needs = (beside + costs.trial(PROBE_STEPS) + FEWEST * each) / SAFETY / 60
        raise ConfigError(f"{FEWEST} steps take {needs:.1f} minutes: give more --minutes than {minutes:g}")
    return steps


def _spec(train: TrainConfig, given: dict[str, Any], rising: tuple[float, float] | None = None) -> Spec:
    common = train.model_dump(exclude_unset=True, exclude={"output_dir", "resume_from_checkpoint"})
    split = train.seed if train.split_seed is None else train.split_seed
    values = {**common, "samples": 0, "save_steps": 0, "split_seed": split, "early_stopping_patience": 0, **given}
    TrainConfig(**values)
    return Spec(values, keep=False, choosing=True, rising=rising)


def _until_lost() -> Callable[[Told], str | None]:
    """Ends the run when more is lost than was ever gained: what comes is divergence."""
    heard: list[float] = []

    def judged(told: Told) -> str | None:
        if told.held_out:
            heard.append(told.loss)
        gain = heard[0] - min(heard) if heard else 0.0
        return "diverging" if heard and heard[-1] > heard[0] + max(gain, 0.1) else None

    return judged


def read_range(trial: Trial, steps: int, asked: dict[str, Any]) -> RateRange:
    """steps: that were planned. Raises ConfigError when no rate lowers the loss."""
    rates = np.geomspace(LOWEST, HIGHEST, steps)
    (_, base), *curve = trial.curve
    pairs = [(float(rates[step - 1]), loss) for step, loss in curve if math.isfinite(loss)]
    low, lowest, high, gain = landmarks(pairs, base)
    if gain < NOTHING:
        raise ConfigError(
            f"no learning rate from {LOWEST:g} to {HIGHEST:g} lowered the held-out loss of {base:.3f} within "
            f"{len(trial.losses)} steps: {trial.message or 'look at the data, --data and --eval-data'}"
        )
    return RateRange(
        suggestion=lowest,
        low=low,
        high=high,
        gain=gain,
        curve=pairs,
        diverged=not trial.done,
        base_loss=base,
        steps=len(trial.losses),
        settings=asked,
    )


def landmarks(curve: Sequence[tuple[float, float]], base: float) -> tuple[float, float, float, float]:
    """Rates where the loss begins to fall, is lowest, and has risen again; and by how much it fell at most.

    curve: rate, loss, in the order of rates.    base: the loss before.
    """
    rates, losses = np.array(curve).T
    place = int(losses.argmin())
    gain = float(base - losses[place])
    begun = int(np.argmax(base - _smoothed(losses) >= BEGUN * gain)) if gain > 0 else 0
    risen = np.flatnonzero(losses[place:] > losses[place] + LOST * max(gain, 0.0))
    end = place + int(risen[0]) if len(risen) else len(rates) - 1
    return float(rates[begun]), float(rates[place]), float(rates[end]), gain


def _smoothed(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """A running median of three: where it begins to fall, one evaluation by itself says nothing."""
    padded = np.concatenate([losses[:1], losses, losses[-1:]])
    middle: NDArray[np.float64] = np.median(np.lib.stride_tricks.sliding_window_view(padded, 3), axis=1)
    return middle
