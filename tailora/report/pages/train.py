"""The page of a training run."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from tailora.report.blocks import Answers, Block, Figure, Number, Page, Paragraph, Section, settings_table
from tailora.report.colours import DASHED, INK, SERIES, SOFT
from tailora.report.format import count, duration, interval, plural, share
from tailora.report.train_report import HeldOut, Result, Step, TrainReport
from tailora.train.memory import format_bytes

if TYPE_CHECKING:  # matplotlib is an optional package
    from tailora.report.charts import Canvas

MOST_MARKS = 1000  # of a scatter plot
COLUMNS = [  # of metrics.jsonl -> unit, caption
    ("learning_rate", "learning rate", "Learning rate of each step."),
    ("grad_norm", "gradient norm", "Norm of the gradient of each step, before clipping."),
    ("tokens_per_second", "tokens per second", "Speed so far, without evaluations."),
    ("memory_bytes", "GB", "Peak memory so far."),
]


def train_page(report: TrainReport) -> Page:
    model = str(report.settings["model"]).rstrip("/").rpartition("/")[2]
    held_out = report.held_out
    sections = [
        Section("Loss", _loss_text(report), [_loss(report)]),
        Section(
            "Each held-out example",
            _examples_text(held_out) if held_out else "",
            [_examples(held_out), _changes(held_out)] if held_out else [],
        ),
        Section("Answers before and after", "Greedy answers to the same prompts.", [_answers(report)]),
        Section("The course of the run", "Schedule, gradients, speed and memory of every step.", _course(report.steps)),
        Section("Settings and machine", "", _origin(report)),
    ]
    numbers = [] if report.result is None else _numbers(report.result)
    return Page("train", f"{model}, fine-tuned", report.verdict, numbers, sections)


def _numbers(result: Result) -> list[Number]:
    numbers = [
        Number(f"held-out loss {when}", f"{loss:.3f}", _loss_note(loss, ends))
        for when, loss, ends in (
            ("before", result.eval_loss_before, result.eval_loss_before_95),
            ("after", result.eval_loss_after, result.eval_loss_after_95),
        )
        if loss is not None
    ]
    of_all = f"{share(result.trainable_parameters, result.total_parameters)} of {count(result.total_parameters)}"
    kept = f"{count(result.train_tokens)} tokens; step {result.best_step:,} is kept"
    return [
        *numbers,
        Number("trained parameters", count(result.trainable_parameters), of_all),
        Number("time", duration(result.seconds), f"{result.tokens_per_second:,.0f} tokens/s of training"),
        Number("peak memory", format_bytes(result.peak_memory_bytes)),
        Number("steps", f"{result.steps:,}", kept),
    ]


def _loss_note(loss: float, ends: tuple[float, float] | None) -> str:
    perplexity = f"perplexity {np.exp(min(loss, 700)):,.1f}"
    return f"{interval(*ends)}; {perplexity}" if ends else perplexity


# ---- Loss


def _loss_text(report: TrainReport) -> str:
    kept = f" The weights of step {report.result.best_step} are kept." if report.result and report.evaluations else ""
    return f"Nats per learned token: of each step's examples, before the step, and of the held-out examples.{kept}"


def _loss(report: TrainReport) -> Figure | None:
    steps, evaluations = report.steps, report.evaluations
    if not steps:
        return None
    alt = f"Line chart. Training loss of {len(steps)} steps, from {steps[0].loss:.3f} to {steps[-1].loss:.3f}."
    if evaluations:
        alt += f" Held-out loss from {evaluations[0].loss:.3f} to {evaluations[-1].loss:.3f}."
    caption = "Thin line: each step. Thick line: running mean. Dots: all held-out examples."
    return Figure("loss", partial(_draw_loss, report), alt, caption, wide=True)


def _draw_loss(report: TrainReport, canvas: "Canvas") -> None:
    axes = canvas.new_axes(320 if canvas.wide else 280, "step", "loss, nats per token")
    losses = [step.loss for step in report.steps]
    canvas.losses([losses], SERIES[0], "training, running mean")
    if report.evaluations:
        steps = [evaluation.step for evaluation in report.evaluations]
        losses = [evaluation.loss for evaluation in report.evaluations]
        axes.plot(steps, losses, "o-", color=SERIES[1], markersize=7, linewidth=1.5, label="held out")
    canvas.whole_numbers("x")
    axes.margins(x=0.02)
    canvas.legend()


# ---- Held-out examples


def _per_token(held_out: HeldOut) -> tuple[list[float], list[float]]:
    """Losses before and after, in nats per token, of each example that has tokens which count."""
    examples = zip(held_out.before, held_out.after, held_out.tokens, strict=True)
    pairs = [(before / tokens, after / tokens) for before, after, tokens in examples if tokens > 0]
    return [before for before, _ in pairs], [after for _, after in pairs]


def _examples_text(held_out: HeldOut) -> str:
    before, after = _per_token(held_out)
    better = sum(second < first for first, second in zip(before, after, strict=True))
    return f"{better:,} of {plural(len(before), 'example')} have a lower loss after training."


def _examples(held_out: HeldOut) -> Figure:
    alt = f"Scatter plot of {len(held_out.tokens)} held-out examples: loss before against loss after."
    caption = "Each dot is a held-out example; those below the line have improved."
    return Figure("examples", partial(_draw_examples, held_out), alt, caption)


def _draw_examples(held_out: HeldOut, canvas: "Canvas") -> None:
    axes = canvas.new_axes(330, "loss before", "loss after")
    before, after = _per_token(held_out)
    every = 1 + len(before) // MOST_MARKS
    before, after = before[::every], after[::every]
    marks = axes.scatter(before, after, s=26, color=SERIES[0], alpha=0.6, linewidths=0)
    ends = [min(*before, *after), max(*before, *after)]
    axes.plot(ends, ends, color=SOFT, linewidth=1.2, linestyle=DASHED)
    tips = [f"{first:.3f} to {second:.3f}" for first, second in zip(before, after, strict=True)]
    canvas.add_tips(marks, "examples", tips)


def _changes(held_out: HeldOut) -> Figure:
    alt = "Histogram of the change of the loss of each held-out example."
    caption = "Change of each example's loss, after - before; the dashed line marks no change."
    return Figure("changes", partial(_draw_changes, held_out), alt, caption)


def _draw_changes(held_out: HeldOut, canvas: "Canvas") -> None:
    axes = canvas.new_axes(330, "change, nats per token", "examples")
    before, after = map(np.array, _per_token(held_out))
    bins = min(30, max(5, len(before) // 4))
    axes.hist(after - before, bins=bins, color=SERIES[0], alpha=0.85, rwidth=0.92)
    axes.axvline(0, color=INK, linewidth=1.2, linestyle=DASHED)
    canvas.whole_numbers("y")
    axes.grid(visible=False, axis="x")


# ---- Answers, the course of the run, settings


def _answers(report: TrainReport) -> Block | None:
    if report.samples:
        return Answers(("base", "tuned"), [(answer.prompt, answer.base, answer.tuned) for answer in report.samples])
    if report.result is None:
        return None
    return Paragraph("No answers were compared: there was no held-out prompt, or --samples is 0.")


def _course(steps: Sequence[Step]) -> list[Figure]:
    if not steps:
        return []
    return [
        Figure(
            name.replace("_", "-"),
            partial(_draw_column, steps, name, unit),
            f"Line chart: {caption} From {getattr(steps[0], name):.3g} to {getattr(steps[-1], name):.3g}.",
            caption,
        )
        for name, unit, caption in COLUMNS
    ]


def _draw_column(steps: Sequence[Step], name: str, unit: str, canvas: "Canvas") -> None:
    axes = canvas.new_axes(200, "step", unit)
    values = np.array([getattr(step, name) for step in steps]) / (1e9 if name == "memory_bytes" else 1)
    axes.plot([step.step for step in steps], values, color=SERIES[0])
    canvas.whole_numbers("x")
    if name == "grad_norm" and values.min() > 0 and values.max() > 30 * values.min():
        canvas.log_axis("y")
    elif name != "tokens_per_second":
        axes.set_ylim(bottom=0)


def _origin(report: TrainReport) -> list[Block | None]:
    """The settings, the data and the machine."""
    run: dict[str, Any] = report.run
    decided = {name: value for name, value in run.items() if not isinstance(value, dict | list)}
    data = {name: value for name, value in (run.get("data") or {}).items() if name != "lengths"}
    return [
        settings_table("Settings", ("", report.settings)),
        settings_table("Data", ("", data)),
        settings_table("Decided by the run", ("", decided)),
        settings_table("Versions", ("", run.get("versions") or {})),
        settings_table("Machine", ("", run.get("machine") or {})),
    ]
