"""The report of a training run: report.json, made from the files in the run's folder, and its page."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from tailora.data.dataset import sources_of
from tailora.errors import FormatError
from tailora.evaluation.metrics import LABEL_METRICS, PREFERENCE_METRICS
from tailora.evaluation.rewards import MEANINGS
from tailora.formats.run_folder import RUN, SAMPLES, write_report
from tailora.report.blocks import Answers, Block, Column, Figure, Number, Page, Section, Table
from tailora.report.charts import SERIES, Canvas
from tailora.report.format import NONE, count, decimals, duration, interval, one_line, plural, share
from tailora.report.pages.shared import INTERVAL, labels_section, settings_table
from tailora.report.run_verdict import WHEN, Effect, effect_of, run_verdict
from tailora.study.results import Measure, measure_of
from tailora.train.answers import ComparedAnswer
from tailora.train.config import NATS_PER_TOKEN
from tailora.train.memory import format_bytes
from tailora.train.run_log import COMPLETIONS, EXAMPLES, METRICS
from tailora.train.significance import Interval, Z

LONGEST = 300  # characters of a reply in the data
MOST_SHOWN = 8  # evaluations, and groups, whose samples are shown


# ---- report.json


@dataclass(frozen=True)
class LoggedStep:
    step: int
    loss: float
    reward: float | None = None  # of the sampled completions, in reinforcement learning
    reward_std_error: float | None = None  # over the groups


@dataclass(frozen=True)
class StepEvaluation:
    """The held-out loss after a step; in reinforcement learning minus the reward."""

    step: int
    loss: float
    reward_std_error: float | None = None  # over the prompts


@dataclass(frozen=True)
class HeldOut:
    """For each held-out example: the number of its losses (a language model's tokens), and their sums."""

    tokens: list[int]
    before: list[float]
    after: list[float]


@dataclass(frozen=True)
class Metric:
    """A metric of the held-out examples, before and after training, with 95% intervals."""

    name: str
    before: float | None  # None if there is no such number
    before_95: tuple[float, float] | None
    after: float | None
    after_95: tuple[float, float] | None
    change: float | None = None  # paired by example, for rewards
    change_95: tuple[float, float] | None = None


@dataclass(frozen=True)
class Result:
    """The numbers of a finished run (`train.events.TrainResult`), with 95% intervals."""

    steps: int
    train_tokens: int
    tokens_per_second: float
    best_step: int
    trainable_parameters: int
    total_parameters: int
    peak_memory_bytes: int
    seconds: float  # from loading to the last evaluation
    eval_loss_before: float | None = None  # None without held-out examples, and for rewards
    eval_loss_after: float | None = None
    total_seconds: float | None = None  # with answers and the verification file; None if a program called `run`
    eval_kl: float | None = None  # KL(base || tuned) in nats per token of held-out conversations, for preferences
    forgetting: dict[str, float] | None = None  # `evaluation.forgetting` on text by the base, for rewards
    drift_mean: float | None = None  # of rewards: nats per token between sampling and training, over all steps
    drift_max: float | None = None
    equal_groups: float | None = None  # share of the groups whose rewards were all equal
    over_limit: float | None = None  # completions of all steps on which a reward took too much time or memory
    eval_loss_before_95: tuple[float, float] | None = None
    eval_loss_after_95: tuple[float, float] | None = None


@dataclass(frozen=True)
class TrainReport:
    """The report.json of a run. run: run.json without settings and result."""

    settings: dict[str, Any]
    run: dict[str, Any]
    steps: list[LoggedStep]
    evaluations: list[StepEvaluation]
    samples: list[ComparedAnswer]
    result: Result | None  # None if the run was interrupted or diverged
    held_out: HeldOut | None
    verdict: str
    remedy: list[str] = field(default_factory=list)  # flags to try after a run that made the model worse
    metrics: list[Metric] = field(default_factory=list)  # of the task, besides the loss
    labels: dict[str, Any] = field(default_factory=dict)  # `evaluation.classification.label_details` after training
    completions: list[dict[str, Any]] = field(default_factory=list)  # the lines of completions.jsonl

    @property
    def shown(self) -> list[ComparedAnswer]:
        """The answers to show: of held-out prompts."""
        return [sample for sample in self.samples if not sample.is_training][: self.settings.get("samples", 3)]

    @property
    def answers(self) -> list[tuple[str, str, str]]:
        """Prompt, answer of the base, answer after training. The prompt says how many messages precede it."""
        rows = []
        for answer in self.shown:
            earlier = plural(answer.earlier_messages, "earlier message")
            after = f"[after {earlier}] " if answer.earlier_messages else ""
            texts = [text + "…" * facts.is_cut for text, facts in answer.pairs] or [answer.base, answer.tuned]
            rows.append((after + answer.prompt, texts[0], texts[1]))
        return rows


def write_train_report(folder: Path) -> dict[str, Any]:
    """Writes report.json and returns its content. Raises WriteError, and FormatError as `train_report`."""
    content = train_report(folder)
    write_report(folder, "train", content)
    return content


def train_report(folder: Path) -> dict[str, Any]:
    """Returns the content of report.json. Raises FormatError if a file of the run cannot be read."""
    header = read_run_file(folder / RUN)
    try:
        result, settings = header.pop("result"), header.pop("settings")
    except KeyError as missing:
        raise FormatError(f"{folder / RUN} has no {missing}; use the output folder of tailora train") from None
    lines = read_run_file(folder / METRICS)
    examples, completions, samples = (
        read_run_file(folder / name) if (folder / name).exists() else [] for name in (EXAMPLES, COMPLETIONS, SAMPLES)
    )
    examples = [row for row in examples if not row.get("chose")]  # those that chose the step do not evaluate it
    steps = [line for line in lines if "loss" in line]
    answers = TypeAdapter(list[ComparedAnswer]).validate_python(samples)
    effect = effect_of(header, examples, answers, (result or {}).pop("higher_is_better", {}))
    evaluations = [line for line in lines if "eval_loss" in line]
    effect = replace(effect, curve=[(line["step"], line["eval_loss"]) for line in evaluations])
    verdict = run_verdict(header, settings, result, steps, effect)
    after, before = effect.metrics.get("after", {}), effect.metrics.get("before", {})
    shared = [name for name in after if name in before]
    metrics = [
        _metric(name, {"before": metric.before, "after": metric.after, "change": metric.change.interval})
        for name, metric in effect.answers.items()
    ]
    metrics += [_metric(name, {part: of_part[name] for part, of_part in effect.metrics.items()}) for name in shared]
    return {
        "verdict": verdict.text,
        "finding": verdict.finding,
        "remedy": verdict.remedy,
        "settings": settings,
        "run": header,
        "steps": steps,
        "evaluations": [
            {"step": line["step"], "loss": line["eval_loss"], "reward_std_error": line.get("eval_reward_std_error")}
            for line in evaluations
        ],
        "samples": samples,
        "result": None if result is None else _with_intervals(result, header, steps, effect, metrics),
        "held_out": {name: [row[name] for row in examples] for name in ("tokens", *WHEN)} if examples else None,
        "metrics": metrics,
        "labels": effect.labels,
        "completions": completions,
    }


def _with_intervals(
    result: dict[str, Any],
    header: Mapping[str, Any],
    steps: Sequence[Mapping[str, Any]],
    effect: Effect,
    metrics: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Returns the numbers of the run with what its files say about them."""
    of_steps: dict[str, Any] = {
        "drift_mean": np.mean,
        "drift_max": np.max,
        "equal_groups": np.mean,
        "over_limit": np.sum,
    }
    for name, joined in of_steps.items():
        values = [step[name] for step in steps if name in step]
        result |= {name: float(joined(values))} if values else {}
    if header.get("rewards"):  # their loss is minus the reward
        result = {name: value for name, value in result.items() if not name.startswith("eval_loss")}
    elif effect.change is not None:
        losses = {**effect.losses, "change": effect.change.interval}
        result |= {"eval_loss_change": effect.change.interval.value}
        result |= {f"eval_loss_{name}": losses[name].value for name in WHEN}  # of those that did not choose the step
        result |= {f"eval_loss_{name}_95": _ends(loss) for name, loss in losses.items()}
    result |= {f"eval_{m['name']}_{key}": value for m in metrics for key, value in m.items() if key != "name"}
    scored = {name: metric.to_dict() for name, metric in effect.answers.items()}
    return result | {"metrics": scored, "answers": {name: asdict(fault) for name, fault in effect.faults.items()}}


def _metric(name: str, parts: Mapping[str, Interval]) -> dict[str, Any]:
    """Returns a `Metric`; what is not a number becomes None. parts: "before" and so on."""
    values = {part: None if math.isnan(estimate.value) else estimate.value for part, estimate in parts.items()}
    return {"name": name, **values, **{f"{part}_95": _ends(estimate) for part, estimate in parts.items()}}


def _ends(estimate: Interval) -> tuple[float, float] | None:
    return None if math.isnan(estimate.low) else (estimate.low, estimate.high)


def read_run_file(path: Path) -> Any:
    """Returns the content of a .json file, or of the lines of a .jsonl file, without an unfinished last line."""
    text, of_lines = path.read_text(encoding="utf-8"), path.suffix == ".jsonl"
    try:
        return [json.loads(line) for line in text.split("\n")[:-1]] if of_lines else json.loads(text)
    except ValueError as error:
        raise FormatError(f"{'a line of ' if of_lines else ''}{path} is not JSON: {error}") from None


# ---- The page


def train_page(report: TrainReport) -> Page:
    result, run = report.result, report.run
    model = str(report.settings["model"]).rstrip("/").rpartition("/")[2]
    numbers: list[Number] = []
    unit = str(run.get("loss_unit", NATS_PER_TOKEN))
    measure = measure_of(unit)
    by_reward = measure.sign < 0
    measured = "Nats per trained token" if unit == NATS_PER_TOKEN else f"Loss, {unit}"
    curve_text = f"{measured}: for each step's examples before its update, and for the held-out examples."
    if by_reward:
        curve_text = "Mean reward of each step's completions and of the held-out ones, with 95% intervals over prompts."
    answers: Block | None = None
    if result is not None:
        first = report.metrics[: 1 if by_reward else 2]  # those that say most
        numbers = [Number(f"{m.name} after", decimals(m.after), f"before {decimals(m.before)}") for m in first]
        if by_reward and not first:
            numbers = [Number("training reward", decimals(report.steps[-1].reward), "of the last step")]
        numbers += _numbers(result, unit, is_resumed=report.settings.get("resume_from_checkpoint") is not None)
        if report.evaluations:
            curve_text += f" The weights of step {result.best_step} were kept."
        if (held_out := report.held_out) is not None and not by_reward:
            better = sum(after < before for before, after in zip(held_out.before, held_out.after, strict=True))
            examples = plural(sum(map(bool, held_out.tokens)), "held-out example")
            curve_text += f" {better:,} of {examples} have a lower loss after training."
    shown = report.shown
    answers_text = f"Greedy answers to {len(shown)} of {plural(len(report.samples), 'prompt')}."
    if any(sample.reference for sample in shown):
        answers_text += " The arrow marks the reply in the data."
    if report.settings.get("data") == "demo":
        answers_text = f"The demo's data is small talk between strangers, so expect a casual tone. {answers_text}"
    if shown:
        arrows = [f"\n→ {one_line(s.reference, LONGEST)}" if s.reference else "" for s in shown]
        rows = [(text + arrow, base, new) for arrow, (text, base, new) in zip(arrows, report.answers, strict=True)]
        answers = Answers(("base", "tuned"), rows, [sample.images for sample in shown])
    decided = {name: value for name, value in run.items() if not isinstance(value, dict | list)}
    facts = run.get("data") or {}
    data = {name: value for name, value in facts.items() if name not in ("lengths", "sources")} | sources_of(facts)
    tables = {
        "Settings": report.settings,
        "Data": data,
        "Chosen automatically": decided,
        "Versions": run.get("versions") or {},
        "Machine": run.get("machine") or {},
    }
    meanings = MEANINGS if by_reward else LABEL_METRICS if run.get("labels") else PREFERENCE_METRICS
    sections = [
        *([_metrics(report.metrics, meanings)] if report.metrics else []),
        *([section] if (section := labels_section(report.labels)) else []),
        Section(measure.name.capitalize(), curve_text, [_curve(report, measure)]),
        *(_sampled(report.completions) if by_reward else []),
        Section("Answers before and after", answers_text, [answers]),
        Section("Settings and machine", "", [settings_table(title, ("", values)) for title, values in tables.items()]),
    ]
    title = f"{model}, fine-tuned: {report.settings.get('output_dir', '')}".removesuffix(": ")
    return Page("train", title, report.verdict, numbers, sections)


def _numbers(result: Result, unit: str, *, is_resumed: bool) -> list[Number]:
    numbers = []
    losses = result.eval_loss_before, result.eval_loss_after
    for when, loss, ends in zip(WHEN, losses, (result.eval_loss_before_95, result.eval_loss_after_95), strict=True):
        if loss is not None:
            perplexity = f"perplexity {math.exp(min(loss, 700)):,.1f}" if unit == NATS_PER_TOKEN else unit
            note = f"{interval(ends)}; {perplexity}" if ends else perplexity
            numbers.append(Number(f"held-out loss {when}", f"{loss:.3f}", note))
    of_all = f"{share(result.trainable_parameters, result.total_parameters)} of {count(result.total_parameters)}"
    kept = f"{count(result.train_tokens)} tokens; step {result.best_step:,} is kept"
    wait = result.seconds if result.total_seconds is None else result.total_seconds
    speed = f"{result.tokens_per_second:,.0f} tokens/s"
    steps = duration(result.train_tokens / result.tokens_per_second) if result.tokens_per_second else NONE
    since = f"since it was resumed; in total {steps} " if is_resumed else f"{steps} of it "
    if result.eval_kl is not None:
        numbers.append(Number("KL from the base", f"{result.eval_kl:.3f}", "nats per token of held-out conversations"))
    if (lost := result.forgetting) is not None:
        rise = f"{lost['loss_after'] - lost['loss_before']:+.3f}"
        of_base = f"KL from the base in nats per token, on text by the base; loss {rise}"
        numbers.append(Number("forgetting", f"{lost['kl']:.3f}", of_base))
    if result.drift_mean is not None and result.equal_groups is not None:
        of_drift = f"nats per token between sampling and training, at most {result.drift_max:.2g}"
        of_groups = "of the groups had equal rewards, so they trained nothing"
        numbers.append(Number("drift", f"{result.drift_mean:.2g}", of_drift))
        numbers.append(Number("equal groups", share(result.equal_groups, 1), of_groups))
    if result.over_limit:
        numbers.append(Number("over limit", f"{result.over_limit:,.0f}", "completions without a result of a reward"))
    return [
        *numbers,
        Number("trained parameters", count(result.trainable_parameters), of_all),
        Number("time", duration(wait), f"{since}in training steps, {speed}"),
        Number("peak memory", format_bytes(result.peak_memory_bytes)),
        Number("steps", f"{result.steps:,}", kept),
    ]


def _metrics(metrics: Sequence[Metric], meanings: Mapping[str, str]) -> Section:
    is_paired = any(m.change is not None for m in metrics)
    parts = (*WHEN, "change") if is_paired else WHEN
    ends = INTERVAL if is_paired else Column(INTERVAL.name)
    columns = [Column("metric"), *(column for part in parts for column in (Column(part, numeric=is_paired), ends))]
    rows = []
    for m in metrics:
        row = [m.name]
        for part in parts:
            show = "{:+.3f}".format if part == "change" else decimals
            value, of_part = getattr(m, part), getattr(m, f"{part}_95")
            row += [NONE if value is None else show(value), interval(of_part, show) or NONE]
        rows.append(row)
    names = {m.name.partition("@")[0] for m in metrics}  # of pass@8, pass
    note = "; ".join(f"{name}: {text}" for name, text in meanings.items() if name.partition("@")[0] in names)
    return Section("Metrics", "On the held-out examples.", [Table(columns, rows, note=note and f"{note}.")])


def _curve(report: TrainReport, measure: Measure) -> Figure | None:
    steps = [(s.step, s.loss if s.reward is None else s.reward, s.reward_std_error) for s in report.steps]
    held_out = [(point.step, measure.sign * point.loss, point.reward_std_error) for point in report.evaluations]
    if not steps:
        return None

    def draw(canvas: Canvas) -> None:
        axes = canvas.new_axes(320 if canvas.wide else 280, "step", measure.label, whole_numbers="x")
        canvas.losses([value for _, value, _ in steps], SERIES[0], "training, running mean")
        x, y, error = np.array(steps, dtype=float).T
        if np.isfinite(error).any():
            axes.fill_between(x, y - Z * error, y + Z * error, color=SERIES[0], alpha=0.15, linewidth=0)
        if held_out:
            x, y, error = np.array(held_out, dtype=float).T
            ends: dict[str, Any] = {"yerr": Z * error, "capsize": 3} if np.isfinite(error).all() else {}
            axes.errorbar(x, y, fmt="o-", color=SERIES[1], markersize=7, linewidth=1.5, label="held out", **ends)
        axes.margins(x=0.02)

    alt = f"Line chart. Training {measure.name} of {len(steps)} steps, from {steps[0][1]:.3f} to {steps[-1][1]:.3f}."
    if held_out:
        alt += f" Held-out {measure.name} from {held_out[0][1]:.3f} to {held_out[-1][1]:.3f}."
    caption = "Thin line: each step. Thick line: running mean. Dots: all held-out examples."
    return Figure(measure.name, draw, alt, caption, wide=True)


def _sampled(lines: Sequence[Mapping[str, Any]]) -> list[Section]:
    """Returns what some prompts got over time, and the group with the largest advantage of each part of the run."""
    evaluations = [line for line in lines if "held_out" in line]
    numbers = np.linspace(0, len(evaluations) - 1, min(MOST_SHOWN, len(evaluations))).round().astype(int)
    shown = [evaluations[number] for number in numbers]
    columns = [*map(Column, ("step", "reward", "completion"))]
    tables = []
    for of_prompt in zip(*(line["held_out"] for line in shown), strict=False):  # fewer with more ranks
        pairs = zip(shown, of_prompt, strict=True)
        rows = [(f"{line['step']:,}", decimals(sample["reward"]), sample["completion"]) for line, sample in pairs]
        tables.append(Table(columns, rows, one_line(of_prompt[0]["prompt"], LONGEST), detail="page"))
    groups, largest = [line for line in lines if "advantage" in line], []
    for part in np.array_split(np.array(groups, dtype=object), MOST_SHOWN):
        if len(part):
            group = max(part, key=itemgetter("advantage"))
            rewards = ", ".join(map(decimals, sorted(group["rewards"], reverse=True)))
            texts = [one_line(group["prompt"], LONGEST), group["best"], group["worst"], rewards]
            largest.append([f"{group['step']:,}", decimals(group["advantage"]), *texts])
    columns = [*map(Column, ("step", "advantage", "prompt", "best completion", "worst completion", "rewards"))]
    samples = "One completion of each of these held-out prompts after some steps, from the same random numbers."
    advantages = "The group with the largest advantage in each part of the run."
    table = Table(columns, largest, detail="page")
    return [Section("Samples over time", samples, tables), Section("Largest advantages", advantages, [table])]
