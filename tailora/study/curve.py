"""Measures how the held-out loss depends on the amount of data, and whether the data or the rank is the bottleneck.

    probe: a few steps                                   -> number of examples and steps
    one run per subset, evaluated several times          on the selection half -> its best number of steps
    final runs of that many steps, per seed              on the evaluation half -> differences, verdict

The subsets are an eighth, a quarter, a half and all of the data, nested for each seed; the runs are repeated at RANKS
times the rank, or at the model's highest. After --minutes, no further run starts. Each size has its best number of
steps: equal epochs would give small subsets too few steps to learn, and equal steps would make them overfit. All other
settings are equal. At the same lora_alpha, the scale alpha / r of the higher rank is a quarter.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from tailora.data.dataset import evaluation_half
from tailora.data.readers import parse_sources
from tailora.errors import ConfigError
from tailora.evaluation.statistics import Difference, difference_over_seeds
from tailora.formats.run_folder import write_report
from tailora.study import trial
from tailora.study.comparison_verdict import sample_size_advice
from tailora.study.config import CurveConfig, trial_settings
from tailora.study.results import CurvePoint, LearningCurve
from tailora.study.search_space import STEP_CHOICE
from tailora.study.study_store import FEWEST_SEEDS, Log, StudySession, locked, open_folder, study_settings
from tailora.study.trial import Listen, Trial, TrialEvent, TrialSpec
from tailora.train.config import GRPO, TrainConfig
from tailora.train.significance import Floats

STUDY, RUNS = "curve.json", "runs"
PARTS = (8, 4, 2, 1)  # the subsets are the data divided by these
RANKS = 4  # times the rank, for the second curve
EVALUATIONS = 8  # of a run with all data that finds the best number of steps; more with less data
PATIENCE, SHORTEST = 2, 0.25  # evaluations without improvement that end such a run; after this share of its steps
FEWEST_EXAMPLES = 32
Point = tuple[int, int]  # rank, number of examples


@dataclass(frozen=True)
class CurvePlan:
    """The content of plan.json."""

    max_steps: int  # the most of a run
    points: list[Point]  # rank and number of examples of each; the user's rank first
    train_examples: int  # number of training examples in total

    @property
    def sizes(self) -> list[int]:
        return [size for _, size in self.points[: len(PARTS)]]


def curve(
    train: TrainConfig,
    study: CurveConfig,
    log: Log = lambda _: None,
    progress: trial.Progress | None = None,
    run_trial: trial.RunTrial = trial.run_in_subprocess,
    *,
    processes: int = 1,
) -> LearningCurve:
    """Completes the learning curve in `train.output_dir` and returns its result.

    processes: number of processes in each run.    Raises ConfigError, and any error of a run.
    """
    wrong = {"--task grpo": train.task == GRPO, "--streaming": train.streaming, "--method full": train.method == "full"}
    wrong |= {"--metric": bool(train.metric)}  # it compares losses
    wrong |= {"--adapter": bool(train.adapter), "--rank-pattern": bool(train.rank_pattern)}  # they fix the rank
    wrong |= {name: bool(getattr(train, name)) for name in STEP_CHOICE}  # each run has its best number of steps
    wrong |= {f"--data {source}": source.weight != 1 for source in parse_sources(train.data)}
    if given := " and ".join(name for name, is_given in wrong.items() if is_given):
        raise ConfigError(f"a learning curve does not support {given}; remove it")
    folder = Path(train.output_dir)
    settings = study_settings(train, processes, curve=study.model_dump(mode="json"))
    with locked(folder, STUDY, wait=False):
        begun = any((folder / RUNS).glob(f"*/*/{trial.RESULT}"))
        open_folder(folder, STUDY, settings, begun=begun, identity=lambda stored: {**stored, "curve": {}})
        session = StudySession(folder, study.minutes, log, progress, run_trial, processes)
        plan = session.plan(partial(_probe, train, session), CurvePlan)
        if (highest := plan.points[-1][0]) < RANKS * train.r:
            session.note(f"the model supports ranks up to {highest}, so no run has {RANKS} times the rank")
        session.log(f"subsets of {', '.join(map(str, plan.sizes))} examples, at most {plan.max_steps} steps")
        steps, runs = CurveRuns(train, study, session, plan).complete()
        session.note_data(runs[plan.points[0]][0])
        limit = "--num-train-epochs" if train.max_steps is None else "--max-steps"
        result = evaluate_curve(study.margin, limit, plan, steps, runs, notes=session.notes, settings=settings)
    write_report(folder, "curve", result.to_dict())
    return result


def _probe(train: TrainConfig, session: StudySession) -> CurvePlan:
    """Raises ConfigError if there are too few examples."""
    spec = TrialSpec(trial_settings(train, {}), keep=False, describe=True)
    run, steps = session.probe(train, spec)
    total = largest = run.numbers["train_examples"]
    if train.max_steps:  # with few steps, the largest subset is smaller, so that each example is seen once
        largest = min(total, steps * run.numbers["examples_per_step"])
    if largest < FEWEST_EXAMPLES:
        raise ConfigError(
            f"a learning curve needs at least {FEWEST_EXAMPLES} training examples, got {largest} of {total}; use "
            "more data or more steps"
        )
    ranks = dict.fromkeys((train.r, min(RANKS * train.r, run.numbers["parts"]["highest_r"])))
    points = [(rank, largest // part) for rank in ranks for part in PARTS]
    return CurvePlan(steps, points, total)


# ---- The runs


class CurveRuns:
    """The runs at the points of a plan, one after another."""

    def __init__(self, train: TrainConfig, study: CurveConfig, session: StudySession, plan: CurvePlan) -> None:
        self.train, self.study, self.session, self.plan = train, study, session, plan
        self.base: dict[bool, trial.BaseLosses | None] = {}  # choosing -> losses of the base

    def complete(self) -> tuple[dict[Point, int], dict[Point, list[Trial]]]:
        """Returns the best number of steps of each point, and its final runs, with the same seeds at each point.

        Points of the higher rank may be missing if the time was up. Raises ConfigError if others are.
        """
        points, seeds = self.plan.points, [self.train.seed + 1 + number for number in range(self.study.seeds)]
        steps: dict[Point, int] = {}
        runs: dict[Point, list[Trial]] = {point: [] for point in points}
        for part in (seeds[:FEWEST_SEEDS], seeds[FEWEST_SEEDS:]):  # not the seed that chooses the steps
            for point in sorted(points, key=lambda point: (point[0], -point[1])):
                if point not in steps and (best := self._best_steps(point)) is not None:
                    steps[point] = best
                for seed in part if point in steps else ():
                    run = self._trial(f"seed-{seed}", point, choosing=False, seed=seed, max_steps=steps[point])
                    if run is not None:
                        runs[point].append(run)
                        self.session.log(f"{point[1]} examples, rank {point[0]}, seed {seed}: {run.summary}")
        done = {point: of_point for point, of_point in runs.items() if len(of_point) >= FEWEST_SEEDS}
        if missing := [size for rank, size in points[: len(PARTS)] if (rank, size) not in done]:
            raise self.session.no_verdict(
                f"{sum(map(len, runs.values()))} final runs, before any with {missing[0]} examples"
            )
        complete = min(map(len, done.values()))
        self.session.note_missing(len(done), len(points), "combinations of subset and rank")
        self.session.note_missing(complete, len(seeds), "seeds")
        return steps, {point: of_point[:complete] for point, of_point in done.items()}

    def _trial(
        self, name: str, point: Point, stop: Listen | None = None, *, choosing: bool, **fixed: Any
    ) -> Trial | None:
        """Reads the run of this name from its folder, or runs it; None if the time is up.

        Raises ConfigError if it failed.
        """
        rank, size = point
        path = self.session.folder / RUNS / f"r{rank}-{size}" / name
        if not self.session.may_run(path):
            return None
        spec = TrialSpec(
            trial_settings(self.train, {"r": rank}, **fixed),
            keep=False,
            choosing=choosing,
            before=self.base.get(choosing),
            subset=None if size == self.plan.train_examples else size,
        )
        run = self.session.trial(spec, path, stop)
        if run.done:  # a complete run has the base's losses for the others
            self.base[choosing] = run.base
        elif run.outcome != trial.PRUNED:
            (path / trial.RESULT).unlink()
            raise ConfigError(
                f"the run with {size} examples at rank {rank} failed ({run.outcome}: {run.message}). The same command "
                "repeats it; if it fails again, change the settings and use a different --output-dir"
            )
        return run

    def _best_steps(self, point: Point) -> int | None:
        """Returns the number of steps with the lowest loss on the selection half, in a run of the most steps."""
        losses: list[float] = []
        most = self.plan.max_steps
        every = math.ceil(most / EVALUATIONS * math.sqrt(point[1] / self.plan.sizes[-1]))

        def stop(event: TrialEvent) -> str | None:
            if event.held_out and event.step:
                losses.append(event.loss)
            is_over = min(losses[:-PATIENCE], default=math.inf) < min(losses[-PATIENCE:], default=0)
            return "no improvement" if is_over and event.step >= SHORTEST * most else None

        run = self._trial("steps", point, stop, choosing=True, max_steps=most, eval_steps=every)
        if run is None:
            return None
        step, loss = min(((step, loss) for step, loss in run.curve if step), key=lambda pair: pair[1])
        self.session.log(f"{point[1]} examples, rank {point[0]}: best after {step} steps, held-out loss {loss:.4f}")
        return step


# ---- What the runs show


def evaluate_curve(
    margin: float,
    limit: str,
    plan: CurvePlan,
    steps: Mapping[Point, int],
    runs: Mapping[Point, Sequence[Trial]],
    **fields: Any,
) -> LearningCurve:
    """limit: the flag that limits the steps.

    steps: of the final runs at each point.
    runs: all done, with the same seeds at each point.
    fields: the other fields of LearningCurve.
    """
    (rank, _), sizes, first = plan.points[0], plan.sizes, runs[plan.points[0]][0]
    indices = evaluation_half(len(first.counts))
    counts = np.array(first.counts)[indices]
    sums: dict[Point, Floats] = {  # each (seeds, examples)
        point: np.array([run.sums for run in of_point])[:, indices] for point, of_point in runs.items()
    }
    losses = {point: [run.loss(indices) for run in of_point] for point, of_point in runs.items()}
    largest, higher = (rank, sizes[-1]), plan.points[-1]
    # the slope of a line through the losses of all sizes, by the number of doublings
    doublings = np.arange(len(sizes)) - (len(sizes) - 1) / 2
    slope = sum(weight * sums[rank, size] for weight, size in zip(doublings / (doublings**2).sum(), sizes, strict=True))
    result = LearningCurve(
        points=[CurvePoint(size, r, steps[r, size], float(np.mean(of)), of) for (r, size), of in losses.items()],
        doublings=[difference_over_seeds(sums[rank, a], sums[rank, b], counts) for a, b in pairwise(sizes)],
        trend=difference_over_seeds(np.zeros_like(slope), slope, counts),
        quarter=difference_over_seeds(sums[largest], sums[rank, sizes[-3]], counts),
        high_rank=difference_over_seeds(sums[largest], sums[higher], counts) if higher in {*sums} - {largest} else None,
        verdict="",
        base_loss=float(np.array(first.before)[indices].sum() / counts.sum()),
        steps=plan.max_steps,
        judged_examples=len(indices),
        loss_unit=first.loss_unit,
        **fields,
    )
    return replace(result, verdict=curve_verdict(result, margin, limit, plan.train_examples))


def curve_verdict(curve: LearningCurve, margin: float, limit: str, train_examples: int) -> str:
    """Returns the sentences about more data, a quarter of it, a higher rank and more steps.

    limit: the flag that limits the steps.
    train_examples: number of training examples in total.
    """
    largest, last, trend, quarter = curve.largest, curve.doublings[-1], curve.trend, curve.quarter
    text, advice = (
        "More data helped" if _helps(last, margin) else "More data helped, perhaps by less than the margin",
        "",
    )
    if -margin < last.low and last.high < margin:
        text = "More data hardly helped"
    elif last.low > 0:
        text = "More data made it worse"
    elif last.high >= 0:
        text, advice = "Cannot tell whether more data helped", f" {sample_size_advice(last, margin)}"
    direction = "falls" if trend.high < 0 else "rises" if trend.low > 0 else "may fall or rise"
    few = "is worse" if quarter.low > 0 else "may be worse"
    if quarter.high < margin:
        few = "does better" if quarter.high < 0 else "does as well"
    sentences = [
        f"{text}: the last doubling, to {largest.examples:,} examples, changed the held-out loss by {_words(last)}, in "
        f"{curve.loss_unit}.{advice}",
        f"Over all sizes, the loss {direction} with more data: {_words(trend)} per doubling.",
        f"A quarter of the data {few}: {_words(quarter)}.",
        _bottleneck(_helps(last, margin), curve, margin),
    ]
    limits = []
    if curve.steps - largest.steps <= curve.steps / EVALUATIONS:
        steps = f"was lowest after {largest.steps:,} of at most {curve.steps:,} steps"
        limits.append(f"The loss with {largest.examples:,} examples {steps}, so more steps may help as well.")
    if largest.examples < train_examples:
        used = f"Only {largest.examples:,} of {train_examples:,} examples were used"
        limits.append(f"{used}, so this does not show whether {train_examples:,} are enough.")
    if limits:
        limits.append(f"Use a higher {limit} and a different --output-dir.")
    return " ".join([*sentences, *limits])


def _bottleneck(data_helps: bool | None, curve: LearningCurve, margin: float) -> str:
    if (high_rank := curve.high_rank) is None:
        return "Runs at a higher rank are missing."
    texts: dict[tuple[bool | None, bool | None], str] = {
        (True, False): "The data is the bottleneck, not the rank",
        (False, True): "The rank is the bottleneck, not the data",
        (True, True): "Both the data and the rank limit the result",
        (False, False): "Neither the data nor the rank is a bottleneck",
        (True, None): "The data is a bottleneck; cannot tell whether the rank is one, too",
        (None, True): "The rank is a bottleneck; cannot tell whether the data is one, too",
    }
    unknown = "Cannot tell whether the data or the rank is the bottleneck"
    text = texts.get((data_helps, _helps(high_rank, margin)), unknown)
    return f"{text}: rank {curve.points[-1].r} instead of {curve.points[0].r} changes the loss by {_words(high_rank)}."


def _helps(difference: Difference, margin: float) -> bool | None:
    """Returns whether it lowers the loss by the margin; None if that is not known."""
    if difference.high < 0 and difference.value <= -margin:
        return True
    return False if difference.low > -margin else None


def _words(difference: Difference) -> str:
    return f"{difference.value:+.3f} (95% interval {difference.low:+.3f} to {difference.high:+.3f})"
