"""The page of a comparison."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from pydantic import BaseModel

from tailora.study.report import words
from tailora.study.report.charts import Estimate, bars, canvas, estimates, label, legend, log_axis
from tailora.study.report.parts import Drawing, Page, Picture, Points, Section, Table, Tile
from tailora.study.report.svg import GRID, PAPER, SERIES


class Apart(BaseModel):
    value: float
    low: float
    high: float
    p_value: float
    examples: int
    seeds: int


class Arm(BaseModel):
    """One that could not be trained has an outcome other than 'done', and no numbers."""

    name: str
    changes: dict[str, Any] = {}
    outcome: str = "done"
    learning_rate: float | None = None
    rates: dict[float, float] = {}
    bracketed: bool = True
    eval_loss: float | None = None
    interval: tuple[float, float] | None = None
    difference: Apart | None = None
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    trainable_parameters: int | None = None
    bytes: int | None = None
    forgetting: dict[str, float] | None = None


class Comparison(BaseModel):
    arms: list[Arm]
    reference: str
    base_loss: float
    steps: int
    seeds: list[int]
    judged_examples: int
    verdict: str
    p_values: dict[str, float] = {}
    notes: list[str] = []
    settings: dict[str, Any] = {}
    seconds: float

    @property
    def done(self) -> list[Arm]:
        return [arm for arm in self.arms if arm.eval_loss is not None]

    @property
    def margin(self) -> float | None:
        """Nats per token that make no difference."""
        found = self.settings.get("compare", {}).get("margin")
        return None if found is None else float(found)


def compare_page(content: Mapping[str, Any]) -> Page:
    found = Comparison.model_validate(content)
    seeds = words.plural(len(found.seeds), "seed")
    judged = f"judged on {found.judged_examples:,} held-out examples that chose no learning rate"
    sections = [
        Section(
            "Which is better",
            f"Each arm at its own best learning rate, {found.steps:,} steps, {seeds}, {judged}.",
            [_losses(found), _differences(found)],
        ),
        Section("What it costs", "Means over the seeds; memory is the most of any.", _costs(found)),
        Section(
            "What was forgotten",
            "How far each arm is from the base on text that the task did not ask for, beside what it learned.",
            [_forgetting(found)],
        ),
        Section(
            "Learning rates tried",
            "An arm whose rate was not searched is no control. Judged on the other half of the held-out examples.",
            [_rates(found)],
        ),
        Section("All numbers", "", [_table(found), _rate_table(found), _settings(found), _notes(found)]),
    ]
    title = (
        " against ".join(arm.name for arm in found.arms) if len(found.arms) == 2 else f"{len(found.arms)} arms compared"
    )
    return Page("compare", title, found.verdict, _tiles(found), sections)


def _tiles(found: Comparison) -> list[Tile]:
    tiles = [
        Tile(f"held-out loss, {arm.name}", f"{arm.eval_loss:.3f}", words.between(*(arm.interval or (None, None))))
        for arm in found.done[:3]
    ]
    return [
        *tiles,
        Tile("held-out loss, base", f"{found.base_loss:.3f}", "before any training"),
        Tile("seeds", str(len(found.seeds)), f"{found.steps:,} steps each"),
        Tile("time in all", words.duration(found.seconds)),
    ]


# ---- which is better


def _losses(found: Comparison) -> Picture | None:
    rows = [Estimate(arm.name, arm.eval_loss or 0.0, *(arm.interval or (None, None))) for arm in found.done]
    if not rows:
        return None
    said = "; ".join(f"{row.name} {row.value:.3f} ({words.between(row.low, row.high)})" for row in rows)
    return Picture(
        "losses",
        lambda width: Drawing(estimates(width, rows, "held-out loss, nats per token")[0]),
        f"Held-out loss of each arm with its 95% interval: {said}.",
        f"Held-out loss, with 95% intervals over examples and seeds; lower is better. The base: {found.base_loss:.3f}. "
        "Arms share their examples, so overlapping intervals say little: see the differences.",
    )


def _differences(found: Comparison) -> Picture | None:
    rows = [
        Estimate(arm.name, arm.difference.value, arm.difference.low, arm.difference.high)
        for arm in found.done
        if arm.difference
    ]
    if not rows:
        return None
    said = "; ".join(f"{row.name} {row.value:+.3f} ({words.between(row.low, row.high, '+.3f')})" for row in rows)
    band = "" if found.margin is None else f" Shaded: within {found.margin:g}, which was said to make no difference."
    return Picture(
        "differences",
        partial(_draw_differences, found, rows),
        f"Difference of each arm from {found.reference} with its 95% interval: {said}.",
        f"Difference from {found.reference} on the same examples and seeds, with its 95% interval; left is better."
        f"{band}",
    )


def _draw_differences(found: Comparison, rows: Sequence[Estimate], width: float) -> Drawing:
    places = [[arm.name for arm in found.done].index(row.name) for row in rows]
    figure, axes = estimates(
        width,
        rows,
        f"loss - loss of {label(found.reference, 18)}, nats per token",
        reference=0.0,
        form="+.3f",
        colours=places,
    )
    if found.margin is not None:
        axes.axvspan(-found.margin, found.margin, color=GRID, alpha=0.6, linewidth=0, zorder=0)
    return Drawing(figure)


# ---- what it costs


def _costs(found: Comparison) -> list[Picture]:
    columns = [
        ("seconds", "Time of training", words.duration),
        ("peak_memory_bytes", "Peak memory", words.size),
        ("trainable_parameters", "Trained parameters", words.count),
        ("bytes", "Size on disk", words.size),
    ]
    pictures = []
    for name, title, say in columns:
        values = {arm.name: float(getattr(arm, name)) for arm in found.done if getattr(arm, name) is not None}
        if values:
            said = ", ".join(f"{arm} {say(value)}" for arm, value in values.items())
            draw = partial(_draw_bars, list(values), list(values.values()), say)
            pictures.append(Picture(f"cost-{name.replace('_', '-')}", draw, f"{title}: {said}.", f"{title}."))
    return pictures


def _draw_bars(names: Sequence[str], values: Sequence[float], say: Any, width: float) -> Drawing:
    return Drawing(bars(width, names, values, say))


# ---- what was forgotten


def _forgetting(found: Comparison) -> Picture | None:
    arms = [arm for arm in found.done if arm.forgetting]
    if not arms:
        return None
    said = "; ".join(f"{arm.name}: KL {(arm.forgetting or {})['kl']:.3f}, loss {arm.eval_loss:.3f}" for arm in arms)
    return Picture(
        "forgetting",
        partial(_draw_forgetting, arms),
        f"Held-out loss against distance from the base. {said}.",
        "Left: learned more. Low: forgot less. KL(base || tuned) in nats per token of text that is not the task's.",
        wide=True,
    )


def _draw_forgetting(arms: Sequence[Arm], width: float) -> Drawing:
    figure, axes = canvas(width, 280)
    for place, arm in enumerate(arms):
        kl = (arm.forgetting or {})["kl"]
        axes.plot(
            [arm.eval_loss or 0.0],
            [kl],
            "o",
            color=SERIES[place % 8],
            markersize=11,
            markeredgecolor=PAPER,
            label=label(arm.name),
        )
    axes.set_xlabel("held-out loss, nats per token")
    axes.set_ylabel("KL from the base, nats per token")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.15, y=0.2)
    legend(figure, axes)
    return Drawing(figure)


# ---- learning rates


def _rates(found: Comparison) -> Picture | None:
    tried = [arm for arm in found.arms if any(map(math.isfinite, arm.rates.values()))]
    if not tried:
        return None
    said = "; ".join(f"{arm.name} best at {words.rate(arm.learning_rate)}" for arm in tried if arm.learning_rate)
    edge = [arm.name for arm in tried if not arm.bracketed]
    caption = "Held-out loss at each rate tried; the filled ones were taken."
    if edge:
        caption += f" The best of {', '.join(edge)} lies at the edge of those tried."
    return Picture("rates", partial(_draw_rates, tried), f"Loss against learning rate. {said}.", caption, wide=True)


def _draw_rates(arms: Sequence[Arm], width: float) -> Drawing:
    figure, axes = canvas(width, 310)
    for place, arm in enumerate(arms):
        points = sorted((rate, loss) for rate, loss in arm.rates.items() if math.isfinite(loss))
        colour = SERIES[place % 8]
        axes.plot(
            *zip(*points, strict=True), "o-", color=colour, markerfacecolor=PAPER, markersize=7, label=label(arm.name)
        )
        if arm.learning_rate in arm.rates:
            axes.plot([arm.learning_rate], [arm.rates[arm.learning_rate]], "o", color=colour, markersize=10)
    log_axis(axes, "x")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss, nats per token")
    legend(figure, axes)
    return Drawing(figure)


# ---- all numbers


def _table(found: Comparison) -> Table:
    heads = ("arm", "rate", "loss", "95%", f"- {found.reference}", "95%", "p", "time", "peak", "trained", "disk", "KL")
    return Table(heads, [_row(arm, found.p_values.get(arm.name)) for arm in found.arms])


def _row(arm: Arm, p_value: float | None) -> list[str]:
    if arm.eval_loss is None:
        return [arm.name, arm.outcome, *[""] * 10]
    apart = arm.difference
    return [
        arm.name,
        words.rate(arm.learning_rate) if arm.learning_rate else "",
        f"{arm.eval_loss:.4f}",
        words.between(*(arm.interval or (None, None))),
        f"{apart.value:+.4f}" if apart else "",
        words.between(apart.low, apart.high, "+.3f") if apart else "",
        "" if p_value is None else words.p_value(p_value),
        "" if arm.seconds is None else words.duration(arm.seconds),
        "" if arm.peak_memory_bytes is None else words.size(arm.peak_memory_bytes),
        "" if arm.trainable_parameters is None else words.count(arm.trainable_parameters),
        "" if arm.bytes is None else words.size(arm.bytes),
        f"{arm.forgetting['kl']:.3f}" if arm.forgetting else "",
    ]


def _rate_table(found: Comparison) -> Table | None:
    rows = [
        [arm.name, words.rate(rate), f"{loss:.4f}" if math.isfinite(loss) else "failed"]
        for arm in found.arms
        for rate, loss in sorted(arm.rates.items())
    ]
    return Table(("arm", "rate", "loss"), rows, folded="Learning rates tried") if rows else None


def _settings(found: Comparison) -> Table | None:
    rows = [[f"{arm.name}:", name, words.value(each)] for arm in found.arms for name, each in arm.changes.items()]
    rows += [
        [part, name, words.value(each)]
        for part, content in found.settings.items()
        for name, each in content.items()
        if name != "arms"
    ]
    return Table(("", "setting", "value"), rows, words=3, folded="Settings") if rows else None


def _notes(found: Comparison) -> Points | None:
    return Points(found.notes) if found.notes else None
