"""The page of a training run."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from pydantic import BaseModel

from tailora.report import words
from tailora.report.charts import canvas, legend, log_axis, whole_numbers
from tailora.report.curves import FEW, draw_losses
from tailora.report.parts import Answers, Code, Drawing, Page, Picture, Section, Table, Tile
from tailora.report.svg import INK, SERIES, SOFT

MOST_MARKS = 1000  # of a scatter


class Step(BaseModel):
    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens_per_second: float
    memory_bytes: float


class Evaluation(BaseModel):
    step: int
    loss: float


class Sample(BaseModel):
    prompt: str
    base: str
    tuned: str


class HeldOut(BaseModel):
    """Of each held-out example: tokens that count, and their nats before and after."""

    tokens: list[int]
    before: list[float]
    after: list[float]


class Result(BaseModel):
    steps: int
    train_tokens: int
    tokens_per_second: float
    eval_loss_before: float | None
    eval_loss_after: float | None
    eval_loss_before_95: tuple[float, float] | None = None
    eval_loss_after_95: tuple[float, float] | None = None
    best_step: int
    trainable_parameters: int
    total_parameters: int
    peak_memory_bytes: int
    seconds: float


class Run(BaseModel):
    settings: dict[str, Any]
    run: dict[str, Any]  # of run.json: versions, machine, data, and what was decided
    steps: list[Step]
    evaluations: list[Evaluation]
    samples: list[Sample]
    result: Result | None  # None where the run was interrupted or diverged
    held_out: HeldOut | None
    verdict: str


def train_page(content: Mapping[str, Any]) -> Page:
    run = Run.model_validate(content)
    model = str(run.settings["model"]).rstrip("/").rpartition("/")[2]
    sections = [
        Section("Loss", _loss_reading(run), [_curves(run)]),
        Section(
            "Each held-out example",
            _example_reading(run.held_out),
            [_examples(run.held_out), _changes(run.held_out)] if run.held_out else [],
        ),
        Section("Answers", "The same prompts to the base and to what was trained; greedy.", [_answers(run.samples)]),
        Section("How it went", "Schedule, gradients, speed and memory of every step.", _course(run.steps)),
        Section("What it was", "", _origin(run)),
    ]
    return Page("train", f"{model}, fine-tuned", run.verdict, _tiles(run), sections)


def _tiles(run: Run) -> list[Tile]:
    result = run.result
    if result is None:
        return []
    tiles = []
    for when, loss, spread in (
        ("before", result.eval_loss_before, result.eval_loss_before_95),
        ("after", result.eval_loss_after, result.eval_loss_after_95),
    ):
        if loss is not None:
            tiles.append(Tile(f"held-out loss {when}", f"{loss:.3f}", words.between(*(spread or (None, None)))))
    whole = (
        f"{words.share(result.trainable_parameters, result.total_parameters)} of {words.count(result.total_parameters)}"
    )
    return [
        *tiles,
        Tile("trained parameters", words.count(result.trainable_parameters), whole),
        Tile("time", words.duration(result.seconds), f"{result.tokens_per_second:,.0f} tokens/s of training"),
        Tile("peak memory", words.size(result.peak_memory_bytes)),
        Tile("steps", f"{result.steps:,}", f"{words.count(result.train_tokens)} tokens"),
    ]


# ---- loss


def _loss_reading(run: Run) -> str:
    kept = f" What is kept is of step {run.result.best_step}." if run.result and run.evaluations else ""
    return f"Nats per learned token, of each step's examples before the step, and of the held-out ones.{kept}"


def _curves(run: Run) -> Picture | None:
    if not run.steps:
        return None
    last = run.steps[-1]
    alt = f"Line chart. Training loss of {len(run.steps)} steps, from {run.steps[0].loss:.3f} to {last.loss:.3f}."
    if run.evaluations:
        alt += f" Held-out loss from {run.evaluations[0].loss:.3f} to {run.evaluations[-1].loss:.3f}."
    caption = "Thin: each step. Thick: running mean. Dots: held-out examples, whole." if len(run.steps) > FEW else ""
    return Picture("loss", partial(_draw_curves, run), alt, caption or "Dots: held-out examples, whole.", wide=True)


def _draw_curves(run: Run, width: float) -> Drawing:
    figure, axes = canvas(width, 320 if width > 600 else 280)
    draw_losses(axes, [[each.loss for each in run.steps]], SERIES[0], "training, running mean")
    if run.evaluations:
        at, held = [each.step for each in run.evaluations], [each.loss for each in run.evaluations]
        axes.plot(at, held, "o-", color=SERIES[1], markersize=7, linewidth=1.5, label="held out")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    whole_numbers(axes, "x")
    axes.margins(x=0.02)
    legend(figure, axes)
    return Drawing(figure)


# ---- held-out examples


def _per_token(held: HeldOut) -> tuple[list[float], list[float]]:
    """Nats per token of each example that has tokens which count, before and after."""
    rows = [each for each in zip(held.before, held.after, held.tokens, strict=True) if each[2] > 0]
    return [before / count for before, _, count in rows], [after / count for _, after, count in rows]


def _example_reading(held: HeldOut | None) -> str:
    if held is None:
        return ""
    before, after = _per_token(held)
    better = sum(second < first for first, second in zip(before, after, strict=True))
    return f"{better:,} of {words.plural(len(before), 'example')} have a lower loss afterwards."


def _examples(held: HeldOut) -> Picture:
    return Picture(
        "examples",
        partial(_draw_examples, held),
        f"Scatter of {len(held.tokens)} held-out examples: loss before against loss after.",
        "Each dot is a held-out example; below the line it got better.",
    )


def _draw_examples(held: HeldOut, width: float) -> Drawing:
    figure, axes = canvas(width, 330)
    before, after = _per_token(held)
    every = 1 + len(before) // MOST_MARKS
    before, after = before[::every], after[::every]
    marks = axes.scatter(before, after, s=26, color=SERIES[0], alpha=0.6, linewidths=0)
    marks.set_gid("examples")
    ends = [min(*before, *after), max(*before, *after)]
    axes.plot(ends, ends, color=SOFT, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.set_xlabel("loss before")
    axes.set_ylabel("loss after")
    tips = [f"{first:.3f} to {second:.3f}" for first, second in zip(before, after, strict=True)]
    return Drawing(figure, {"examples": tips})


def _changes(held: HeldOut) -> Picture:
    return Picture(
        "changes",
        partial(_draw_changes, held),
        "Histogram of the change of loss of each held-out example.",
        "Change of each example's loss, after - before; the line marks no change.",
    )


def _draw_changes(held: HeldOut, width: float) -> Drawing:
    figure, axes = canvas(width, 330)
    before, after = (np.array(each) for each in _per_token(held))
    axes.hist(after - before, bins=min(30, max(5, len(before) // 4)), color=SERIES[0], alpha=0.85, rwidth=0.92)
    axes.axvline(0, color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.set_xlabel("change, nats per token")
    axes.set_ylabel("examples")
    whole_numbers(axes, "y")
    axes.grid(visible=False, axis="x")
    return Drawing(figure)


# ---- the rest


def _answers(samples: Sequence[Sample]) -> Answers | None:
    rows = [(each.prompt, each.base, each.tuned) for each in samples]
    return Answers(("base", "tuned"), rows) if rows else None


def _course(steps: Sequence[Step]) -> list[Picture]:
    if not steps:
        return []
    columns = [
        ("learning_rate", "learning rate", "Learning rate of each step."),
        ("grad_norm", "gradient norm", "Norm of the gradient of each step, before clipping."),
        ("tokens_per_second", "tokens per second", "Speed so far, evaluations left out."),
        ("memory_bytes", "GB", "Peak memory so far."),
    ]
    return [
        Picture(
            name.replace("_", "-"),
            partial(_draw_column, steps, name, unit),
            f"Line chart: {said} From {getattr(steps[0], name):.3g} to {getattr(steps[-1], name):.3g}.",
            said,
        )
        for name, unit, said in columns
    ]


def _draw_column(steps: Sequence[Step], name: str, unit: str, width: float) -> Drawing:
    figure, axes = canvas(width, 200)
    values = np.array([getattr(each, name) for each in steps]) / (1e9 if name == "memory_bytes" else 1)
    axes.plot([each.step for each in steps], values, color=SERIES[0])
    axes.set_ylabel(unit)
    axes.set_xlabel("step")
    whole_numbers(axes, "x")
    if name == "grad_norm" and values.min() > 0 and values.max() > 30 * values.min():
        log_axis(axes, "y")
    elif name != "tokens_per_second":
        axes.set_ylim(bottom=0)
    return Drawing(figure)


def _origin(run: Run) -> list[Table | Code]:
    """Where it came from: the data, the settings, the machine."""
    facts = {key: each for key, each in run.run.items() if not isinstance(each, dict | list)}
    data = {key: each for key, each in (run.run.get("data") or {}).items() if key != "lengths"}
    parts: list[Table | Code] = []
    for title, content in (
        ("Settings", run.settings),
        ("Data", data),
        ("Decided by the run", facts),
        ("Versions", run.run.get("versions") or {}),
        ("Machine", run.run.get("machine") or {}),
    ):
        rows = [(name, words.value(each)) for name, each in content.items()]
        if rows:
            parts.append(Table(("", ""), rows, words=2, folded=title))
    return parts
