"""Measures how the held-out loss depends on the amount of data, and whether the data or the rank is the bottleneck.

    time a few steps                                     -> steps that fit, sizes of the subsets
    one run per subset, evaluated several times          on the selection half -> its best number of steps
    final runs of that many steps, per seed              on the evaluation half -> points, curve, verdict

The subsets are an eighth, a quarter, a half and all of the data, nested for each seed; the runs are repeated at RANKS
times the rank, with --minutes only for the largest. Each size has its best number of steps, as in studies of data
scaling (arXiv:1712.00409, arXiv:2001.08361): equal epochs would give small subsets too few steps to learn, and equal
steps would make them overfit. All other settings are equal. At the same lora_alpha, the scale alpha / r of the higher
rank is a quarter.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tailora.data.readers import parse_sources
from tailora.errors import ConfigError
from tailora.evaluation.statistics import LEVEL, difference_over_seeds, t_quantile
from tailora.formats.run_folder import write_report
from tailora.study import budget, data_scaling, trial
from tailora.study.budget import TIMING_RATE, TIMING_STEPS, Costs, Extent
from tailora.study.config import CurveConfig, trial_settings
from tailora.study.results import Change, CurvePoint, LearningCurve
from tailora.study.search_space import STEP_CHOICE
from tailora.study.study_store import TIMING, Log, StudySession, locked, open_folder, study_settings
from tailora.study.trial import Listen, Trial, TrialEvent, TrialSpec
from tailora.train.config import GRPO, TrainConfig, batches_per_step

STUDY, RUNS = "curve.json", "runs"
PARTS = (8, 4, 2, 1)  # the subsets are the data divided by these
RANKS = 4  # times the rank, for the second curve
EVALUATIONS = 8  # of a run with all data that finds the best number of steps; more with less data
EVALUATION_SHARE = 1 / 3  # of --minutes; fewer held-out examples are used if they would need more
PATIENCE, SHORTEST = 2, 0.25  # evaluations without improvement that end such a run; after this share of its steps
FEWEST_EXAMPLES = 32
Point = tuple[int, int]  # rank, number of examples


@dataclass(frozen=True)
class CurvePlan:
    """The content of plan.json.

    max_steps: the most of a run.    points: rank and number of examples of each; the user's rank first.
    train_examples, examples: number of training and held-out examples in total.    held_out: number used, None for all.
    minutes: the time limit of the plan.    limit: the flag that limits the steps.
    """

    max_steps: int
    points: list[Point]
    costs: Costs
    held_out: int | None
    examples: int
    train_examples: int
    processes: int
    minutes: float | None = None
    limit: str = "--num-train-epochs"

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
        plan = session.plan(partial(_measure, train, study, session), CurvePlan)
        session.check_processes(plan.processes)
        if study.minutes is not None and study.minutes < (plan.minutes or math.inf):
            planned = "without --minutes" if plan.minutes is None else f"with --minutes {plan.minutes:g}"
            text = f"--minutes {study.minutes:g} is too short: the curve in {folder} was planned {planned}"
            raise ConfigError(f"{text}; use the same, or a different --output-dir")
        session.note_minutes(plan.minutes, f"runs have at most {plan.max_steps} steps")
        session.log(f"subsets of {', '.join(map(str, plan.sizes))} examples, at most {plan.max_steps} steps")
        if plan.held_out:
            session.note(f"only {plan.held_out:,} of {plan.examples:,} held-out examples fit into --minutes")
        steps, runs = CurveRuns(train, study, session, plan).complete()
        session.note_data(runs[plan.points[0]][0])
        result = evaluate_curve(study.margin, plan, steps, runs, notes=session.notes, settings=settings)
    write_report(folder, "curve", result.to_dict())
    return result


# ---- How much fits into the minutes


def _measure(train: TrainConfig, study: CurveConfig, session: StudySession) -> CurvePlan:
    """Times a few steps. Raises ConfigError if --minutes is too short, or if there are too few examples."""
    # with --minutes, as many steps as possible; more seeds if time is left in the end
    wanted = Extent(tries=len(PARTS), seeds=study.seeds)
    if study.minutes is not None:
        wanted = Extent(1, study.seeds if "seeds" in study.model_fields_set else budget.FEWEST_SEEDS)
    what = f"{len(PARTS) + wanted.tries} subsets with {wanted.seeds} seeds each, {{}} steps per run,"
    limit = budget.TimeLimit(session, wanted, 1, ["tries", "seeds"], lambda _, steps: what.format(steps))
    session.log(f"timing {TIMING_STEPS} steps")
    settings = trial_settings(train, {"r": RANKS * train.r}, learning_rate=TIMING_RATE, max_steps=TIMING_STEPS)
    spec = TrialSpec(settings, keep=False, held_out=budget.FEWEST_HELD_OUT)
    costs, timing = budget.measure_costs(
        session,
        partial(session.trial, spec, session.folder / TIMING),
        lambda costs: limit.check(partial(_needed, costs), train.max_steps),
        choosing=False,
    )
    if costs is None:
        raise budget.no_costs(timing)
    total, held_out = timing.numbers["train_examples"], timing.numbers["held_out"]
    costs, longest = costs.on_part(held_out / len(timing.counts)), budget.longest_run(train, timing)
    seconds = session.seconds_left  # infinite without --minutes
    if _needed(costs, wanted, longest) > budget.SAFETY * seconds:
        evaluations = _needed(replace(costs, fixed=0, step=0), wanted, 0)
        part = max(EVALUATION_SHARE * seconds / evaluations, budget.FEWEST_HELD_OUT / held_out)
        limit = replace(limit, wanted=replace(wanted, part=min(1.0, part)))
    extent, steps = limit.choose(partial(_needed, costs), longest, held_out)
    # with few steps, the largest subset is smaller, so that each example is seen once
    per_step = train.per_device_train_batch_size * batches_per_step(train.model_dump(), session.processes)
    largest = min(total, math.ceil(steps * per_step / min(train.num_train_epochs, 1)))
    if largest < FEWEST_EXAMPLES:
        raise ConfigError(
            f"a learning curve needs at least {FEWEST_EXAMPLES} training examples, got {largest} of {total}; use "
            "more data or more steps"
        )
    points = [(rank, largest // part) for rank in (train.r, RANKS * train.r) for part in PARTS]
    in_settings = "--num-train-epochs" if train.max_steps is None else "--max-steps"
    return CurvePlan(
        max_steps=steps,
        points=points[: len(PARTS)] + points[-extent.tries :],
        costs=costs.on_part(extent.part),
        held_out=extent.held_out(held_out),
        examples=held_out,
        train_examples=total,
        processes=session.processes,
        minutes=study.minutes,
        limit=in_settings if steps == longest else "--minutes",
    )


def _needed(costs: Costs, extent: Extent, steps: int) -> float:
    """Returns the seconds of all runs. extent: its tries are the subsets at the higher rank."""
    costs = costs.on_part(extent.part)
    parts = (*PARTS, *PARTS[-extent.tries :])
    # runs of small subsets often end early, but not if the learning rate is low
    choosing = sum(costs.trial(steps, evaluations=EVALUATIONS * math.sqrt(part)) for part in parts)
    return choosing + len(parts) * extent.seeds * costs.final_run(steps)


# ---- The runs


class CurveRuns:
    """The runs at the points of a plan, one after another."""

    def __init__(self, train: TrainConfig, study: CurveConfig, session: StudySession, plan: CurvePlan) -> None:
        self.train, self.study, self.session, self.plan = train, study, session, plan
        self.base: dict[bool, trial.BaseLosses | None] = {}  # choosing -> losses of the base

    def complete(self) -> tuple[dict[Point, int], dict[Point, list[Trial]]]:
        """Returns the best number of steps of each point, and its final runs, with the same seeds at each point."""
        # the largest first: a complete run has the base's losses for the others
        steps = {point: self._best_steps(point) for point in reversed(self.plan.points)}
        return steps, self._final_runs(steps)

    def _path(self, point: Point, name: str) -> Path:
        return self.session.folder / RUNS / "r{}-{}".format(*point) / name

    def _trial(self, name: str, point: Point, stop: Listen | None = None, *, choosing: bool, **fixed: Any) -> Trial:
        """Reads the run of this name from its folder, or runs it. Raises ConfigError if it failed."""
        rank, size = point
        spec = TrialSpec(
            trial_settings(self.train, {"r": rank}, **fixed),
            keep=False,
            choosing=choosing,
            before=self.base.get(choosing),
            held_out=self.plan.held_out,
            subset=None if size == self.plan.train_examples else size,
        )
        run = self.session.trial(spec, self._path(point, name), stop)
        if run.done:
            self.base[choosing] = run.base
        elif run.outcome != trial.PRUNED:
            (self._path(point, name) / trial.RESULT).unlink()
            raise ConfigError(
                f"the run with {size} examples at rank {rank} failed ({run.outcome}: {run.message}). The same command "
                "repeats it; if it fails again, change the settings and use a different --output-dir"
            )
        return run

    def _best_steps(self, point: Point) -> int:
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
        step, loss = min(((step, loss) for step, loss in run.curve if step), key=lambda pair: pair[1])
        self.session.log(f"{point[1]} examples, rank {point[0]}: best after {step} steps, held-out loss {loss:.4f}")
        return step

    def _final_runs(self, steps: Mapping[Point, int]) -> dict[Point, list[Trial]]:
        runs: dict[Point, list[Trial]] = {point: [] for point in self.plan.points}
        for done in range(self.study.seeds):
            seed = self.train.seed + 1 + done  # not the seed that chose the steps
            missing = [n for p, n in steps.items() if not self.session.has_trial(self._path(p, f"seed-{seed}"))]
            needed = sum(map(self.plan.costs.final_run, missing))
            if done >= budget.FEWEST_SEEDS and self.session.seconds_left < needed:
                self.session.note(f"only {done} of {self.study.seeds} seeds fit into --minutes")
                break
            for point in runs:
                run = self._trial(f"seed-{seed}", point, choosing=False, seed=seed, max_steps=steps[point])
                runs[point].append(run)
                self.session.log(f"{point[1]} examples, rank {point[0]}, seed {seed}: {run.summary}")
        return runs


# ---- What the runs show


def evaluate_curve(
    margin: float, plan: CurvePlan, steps: Mapping[Point, int], runs: Mapping[Point, Sequence[Trial]], **fields: Any
) -> LearningCurve:
    """steps: of the final runs at each point.    runs: all done, with the same seeds at each point.
    fields: the other fields of LearningCurve.
    """
    (rank, _), sizes, first = plan.points[0], plan.sizes, runs[plan.points[0]][0]
    largest, indices = (rank, sizes[-1]), trial.evaluation_half(len(first.counts))
    counts = np.array(first.counts)[indices]
    sums = {point: np.array([run.sums for run in of_point])[:, indices] for point, of_point in runs.items()}
    losses = {point: np.array([run.loss(indices) for run in of_point]) for point, of_point in runs.items()}
    fit = data_scaling.fit(sizes, [losses[rank, size] for size in sizes])

    def compared(point: Point) -> tuple[Change, float]:
        """Returns loss of the point - loss of the largest subset, and its error from the choice of examples."""
        difference = difference_over_seeds(sums[largest], sums[point], counts)
        half_width = (difference.high - difference.low) / 2 * math.sqrt(difference.from_examples)
        error = half_width / t_quantile(LEVEL, difference.examples - 1)
        ends = fit.difference(difference.value, error, difference.seeds)
        return Change(difference.value, (ends.low, ends.high)), error

    half, error = compared((rank, sizes[-2]))
    # the choice of held-out examples affects the next doubling about as much as the last one
    doubling = Change.of(fit.change(2, error)) if data_scaling.FORECASTS else None
    quarter, high_rank = (compared(point)[0] for point in ((rank, sizes[-3]), (RANKS * rank, sizes[-1])))
    end = sizes[-1] * (2 if doubling else 1)
    result = LearningCurve(
        points=[CurvePoint(size, r, steps[r, size], float(of.mean()), of.tolist()) for (r, size), of in losses.items()],
        doubling=doubling,
        half=half,
        quarter=quarter,
        high_rank=high_rank,
        band=[(size, *data_scaling.interval(fit.curve(size))) for size in np.geomspace(sizes[0], end, 25).tolist()],
        candidates=fit.weights,
        verdict="",
        base_loss=float(np.array(first.before)[indices].sum() / counts.sum()),
        steps=plan.max_steps,
        judged_examples=len(indices),
        loss_unit=first.loss_unit,
        **fields,
    )
    return replace(result, verdict=curve_verdict(result, margin, plan.limit, plan.train_examples))


def curve_verdict(curve: LearningCurve, margin: float, limit: str, train_examples: int) -> str:
    """Returns the sentences about more data, a quarter of it, a higher rank and more steps.

    limit: the flag that limits the steps.    train_examples: number of training examples in total.
    """
    largest, change = curve.largest, curve.doubling or -curve.half
    helps, may_help, hardly_helps = "would help", "may help", "would hardly help"
    what = f"twice the {largest.examples:,} examples would change"
    if curve.doubling is None:
        helps, may_help, hardly_helps = "helped", "helped, but perhaps by less than the margin", "hardly helped"
        what = f"the last doubling, to {largest.examples:,} examples, changed"
    low, high = change.interval
    text = f"More data {helps if change.helps(margin) else may_help}"
    if -margin < low and high < margin:
        text = f"More data {hardly_helps}"
    elif low > 0:  # no forecast
        text = "More data did not help"
    elif high >= 0:
        text = "Cannot tell the curve from a flat one"
    low, high = curve.quarter.interval
    few = "does as well" if high < margin else "is worse" if low > 0 else "may be worse"
    bottlenecks: dict[tuple[bool | None, ...], str] = {
        (True, False): "The data is the bottleneck, not the rank",
        (False, True): "The rank is the bottleneck, not the data",
        (True, True): "Both the data and the rank limit the result",
        (False, False): "Neither the data nor the rank is a bottleneck",
        (True, None): "The data is a bottleneck; cannot tell whether the rank is one, too",
        (None, True): "The rank is a bottleneck; cannot tell whether the data is one, too",
    }
    unknown = "Cannot tell whether the data or the rank is the bottleneck"
    bottleneck = bottlenecks.get((change.helps(margin), curve.high_rank.helps(margin)), unknown)
    verdict = (
        f"{text}: {what} the held-out loss by {change}, in {curve.loss_unit}. A quarter of the data {few}: "
        f"{curve.quarter}. {bottleneck}: {RANKS} times the rank changes the loss by {curve.high_rank}."
    )
    limits = []
    if curve.steps - largest.steps <= curve.steps / EVALUATIONS:
        steps = f"was lowest after {largest.steps:,} of at most {curve.steps:,} steps"
        limits.append(f"The loss with {largest.examples:,} examples {steps}, so more steps may help as well.")
    if largest.examples < train_examples:
        used = f"Only {largest.examples:,} of {train_examples:,} examples were used"
        limits.append(f"{used}, so this does not show whether {train_examples:,} are enough.")
    if limits:
        limits.append(f"Use a higher {limit} and a different --output-dir.")
    return " ".join([verdict, *limits])
