"""What the runs of a comparison say: numbers of each arm, differences from the reference, a verdict."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from tailora.errors import ConfigError
from tailora.evaluation.intervals import Interval
from tailora.evaluation.statistics import Difference, difference, holm, loss_interval
from tailora.study.config import FULL, CompareConfig
from tailora.study.halves import Places, halves
from tailora.study.lr_search import Rates
from tailora.study.trial import Trial
from tailora.study.verdict import Standing, verdict


@dataclass(frozen=True)
class ArmResult:
    name: str
    changes: dict[str, Any]
    outcome: str  # done, or why there are no numbers
    learning_rate: float | None = None
    rates: dict[float, float] = field(default_factory=dict)  # rate -> loss on the choosing half, infinite if it failed
    bracketed: bool = False
    eval_loss: float | None = None
    interval: tuple[float, float] | None = None
    difference: dict[str, Any] | None = None  # from the reference (`Difference`)
    seconds: float | None = None  # of training, mean over seeds
    peak_memory_bytes: int | None = None
    trainable_parameters: int | None = None
    bytes: int | None = None  # on disk
    forgetting: dict[str, float] | None = None  # mean over seeds; None where it is no number
    seed_losses: list[float] = field(default_factory=list)  # held-out loss of each seed, as eval_loss is their mean
    train_losses: list[list[float]] = field(default_factory=list)  # of each seed: of each step's examples, before it
    runs: list[str] = field(default_factory=list)  # folders


@dataclass(frozen=True)
class Comparison:
    arms: list[ArmResult]
    reference: str
    base_loss: float
    steps: int
    seeds: list[int]
    judged_examples: int
    verdict: str
    p_value: float | None  # of the arm that the verdict is about, adjusted as all below
    p_values: dict[str, float]  # arm -> p of no difference from the reference, adjusted for the number of arms (Holm)
    notes: list[str]
    settings: dict[str, Any]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: a rate that failed has the loss null."""
        content = asdict(self)
        for arm in content["arms"]:
            arm["rates"] = {rate: loss if math.isfinite(loss) else None for rate, loss in arm["rates"].items()}
        return content


def judged(
    study: CompareConfig,
    rates: Mapping[str, Rates],
    finals: Mapping[str, Sequence[Trial]],
    *,
    notes: list[str],
    settings: dict[str, Any],
    seconds: float,
) -> Comparison:
    """rates, finals: by arm.  Raises ConfigError when no arm could be trained."""
    done = {arm: trials for arm, trials in finals.items() if trials and all(trial.done for trial in trials)}
    why = {arm: _why(rates[arm], finals.get(arm, [])) for arm in study.arms if arm not in done}
    if not done:
        reasons = "; ".join(f"{arm}: {reason}" for arm, reason in why.items())
        raise ConfigError(f"no arm could be trained, so there is nothing to compare: {reasons}")
    reference = next((arm for arm in done if study.method(arm) == FULL), next(iter(done)))
    some = done[reference][0]
    judges = halves(len(some.counts))[1]
    counts = np.array(some.counts)[judges]
    nats = {arm: np.array([trial.sums for trial in trials])[:, judges] for arm, trials in done.items()}
    against = {arm: difference(nats[reference], nats[arm], counts) for arm in done if arm != reference}
    adjusted = dict(zip(against, holm([each.p_value for each in against.values()]), strict=True))
    arms = [
        _result(arm, study.arms[arm], rates[arm], done[arm], judges, loss_interval(nats[arm], counts), against.get(arm))
        if arm in done
        else ArmResult(arm, study.arms[arm], why[arm], rates=rates[arm].tried)
        for arm in study.arms
    ]
    standings = [
        Standing(arm.name, arm.trainable_parameters or 0, against.get(arm.name), adjusted.get(arm.name), arm.bracketed)
        for arm in arms
        if arm.name in done
    ]
    said, about = verdict(standings, reference, study.margin, why)
    return Comparison(
        arms=arms,
        reference=reference,
        base_loss=float(np.array(some.before)[judges].sum() / counts.sum()),
        steps=some.numbers["steps"],
        seeds=[trial.numbers["seed"] for trial in done[reference]],
        judged_examples=len(judges),
        verdict=said,
        p_value=adjusted.get(about) if about else None,
        p_values=adjusted,
        notes=notes,
        settings=settings,
        seconds=seconds,
    )


def _why(rates: Rates, trials: Sequence[Trial]) -> str:
    failed = next((trial for trial in trials if not trial.done), None)
    if failed is not None:
        return f"{failed.outcome} at its best rate with another seed"
    if not rates.fits:
        return "ran out of memory"
    return f"failed at every rate tried, {', '.join(f'{rate:.2g}' for rate in rates.tried)}"


def _result(
    arm: str,
    changes: dict[str, Any],
    rates: Rates,
    trials: Sequence[Trial],
    judges: Places,
    loss: Interval,
    against: Difference | None,
) -> ArmResult:
    forgotten = [trial.forgetting for trial in trials if trial.forgetting is not None]
    return ArmResult(
        name=arm,
        changes=changes,
        outcome="done",
        learning_rate=rates.best,
        rates=rates.tried,
        bracketed=rates.bracketed,
        eval_loss=loss.value,
        interval=(loss.low, loss.high),
        difference=None if against is None else asdict(against),
        seconds=float(np.mean([each.numbers["train_tokens"] / each.numbers["tokens_per_second"] for each in trials])),
        peak_memory_bytes=max(trial.numbers["peak_memory_bytes"] for trial in trials),
        trainable_parameters=trials[0].numbers["trainable_parameters"],
        bytes=trials[0].bytes,
        forgetting=_mean(forgotten),
        seed_losses=[trial.loss(judges) for trial in trials],
        train_losses=[trial.losses for trial in trials],
        runs=[trial.numbers["output_dir"] for trial in trials],
    )


def _mean(forgotten: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """Over the seeds; None where it was not measured, or a model is so broken that it is no number."""
    if not forgotten:
        return None
    means = {key: float(np.mean([each[key] for each in forgotten])) for key in forgotten[0]}
    return means if all(map(math.isfinite, means.values())) else None
