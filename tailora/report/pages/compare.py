"""The page of a comparison."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from tailora.report.blocks import Block, Column, Figure, Number, Page, Section, Table
from tailora.report.charts import PAPER, Canvas, Estimate, series_colour
from tailora.report.format import count, duration, interval, learning_rate, one_line, plural, signed
from tailora.report.pages.shared import (
    INTERVAL,
    difference_cells,
    further_tables,
    loss_figures,
    numeric,
    settings_table,
)
from tailora.study.results import ArmResult, Comparison, Measure
from tailora.train.memory import format_bytes

COSTS: list[tuple[str, str, Callable[[float], str]]] = [  # attribute of an arm, column, format
    ("seconds", "training", duration),
    ("peak_memory_bytes", "peak memory", format_bytes),
    ("trainable_parameters", "trained", count),
    ("bytes", "on disk", format_bytes),
]


def compare_page(comparison: Comparison) -> Page:
    arms = [arm for arm in comparison.arms if arm.eval_loss is not None]
    seeds, steps, measure = plural(len(comparison.seeds), "seed"), plural(comparison.steps, "step"), comparison.measure
    changes = [(f"{arm.name}:", arm.changes) for arm in comparison.arms]
    parts = comparison.settings.items()
    shared = [(part, {key: value for key, value in settings.items() if key != "arms"}) for part, settings in parts]
    sections = [
        Section(
            "Which is better",
            f"Each variant at its own best learning rate, {steps}, {seeds}, evaluated on "
            f"{comparison.judged_examples:,} held-out examples that were not used to choose a learning rate.",
            _losses(comparison, arms),
        ),
        Section("What it costs", "Means over the seeds; memory is the maximum.", [_costs(arms)]),
        Section(
            "Learning rates tried",
            f"A comparison is only fair if every variant has its own best learning rate. These are the {measure.names} "
            "on the half of the held-out examples that is used to choose the rate.",
            [_rates(comparison.arms, measure)],
        ),
        Section("Settings", "", [settings_table("Settings", *changes, *shared)]),
    ]
    numbers = [
        Number(
            f"held-out {measure.name}, {one_line(arm.name, 20)}", f"{arm.eval_loss:.3f}", interval(arm.interval), "page"
        )
        for arm in arms[:3]
    ]
    numbers += [
        Number(f"held-out {measure.name}, base", f"{comparison.base_loss:.3f}", "before training"),
        Number("seeds", str(len(comparison.seeds)), f"{steps} each", detail="page"),
        Number("total time", duration(comparison.seconds)),
    ]
    names = [arm.name for arm in comparison.arms]
    title = " vs. ".join(names) if len(names) == 2 else f"{len(names)} variants compared"
    failed = [f"{arm.name}: {arm.outcome}" for arm in comparison.arms if arm.eval_loss is None]
    return Page("compare", title, comparison.verdict, numbers, sections, [*failed, *comparison.notes])


def _losses(comparison: Comparison, arms: Sequence[ArmResult]) -> list[Block | None]:
    losses = [Estimate(arm.name, arm.eval_loss or 0.0, arm.interval, arm.seed_losses) for arm in arms]
    differences = {arm.name: arm.difference for arm in arms}
    margin = comparison.settings.get("compare", {}).get("margin")
    rows = []
    for arm in arms:
        rate = "" if arm.learning_rate is None else learning_rate(arm.learning_rate)
        rate = rate if arm.bracketed else f"{rate} (edge)"
        cells = difference_cells(arm.difference, comparison.p_values.get(arm.name))
        rows.append([arm.name, rate, f"{arm.eval_loss:.3f}", interval(arm.interval), *cells])
    first = [Column("name"), *numeric("learning rate", f"held-out {comparison.measure.name}"), INTERVAL]
    reference = comparison.reference
    columns = [*first, *numeric(f"- {reference}"), INTERVAL, Column("p", numeric=True, priority=1)]
    figures = loss_figures(losses, comparison.base_loss, differences, reference, margin, comparison.measure)
    further = further_tables({arm.name: arm.further for arm in arms}, reference)
    return [*figures, Table(columns, rows), *further]


def _costs(arms: Sequence[ArmResult]) -> Table:
    columns = [Column("name"), *numeric(*(column for _, column, _ in COSTS))]
    rows = []
    for arm in arms:
        costs = [(getattr(arm, name), show) for name, _, show in COSTS]
        rows.append([arm.name, *("" if value is None else show(value) for value, show in costs)])
    if not any(arm.forgetting for arm in arms):
        return Table(columns, rows)
    for arm, row in zip(arms, rows, strict=True):
        lost = arm.forgetting
        row += ["", ""] if lost is None else [f"{lost['kl']:.3f}", signed(lost["loss_after"] - lost["loss_before"])]
    note = "KL from the base and rise of the loss, in nats per token on text of other tasks, measure forgetting."
    return Table([*columns, *numeric("KL from base", "rise of loss")], rows, note=note)


def _rates(arms: Sequence[ArmResult], measure: Measure) -> Figure | None:
    losses = {  # without failed runs
        arm.name: {rate: loss for rate, loss in sorted(arm.rates.items()) if loss is not None and math.isfinite(loss)}
        for arm in arms
    }
    tried = [arm for arm in arms if losses[arm.name]]

    def draw(canvas: Canvas) -> None:
        axes = canvas.new_axes(310, "learning rate", measure.label)
        for number, arm in enumerate(tried):
            arm_losses, colour, label = losses[arm.name], series_colour(number), one_line(arm.name, 28)
            hollow: dict[str, Any] = {"markerfacecolor": PAPER, "markersize": 7}
            axes.plot(list(arm_losses), list(arm_losses.values()), "o-", color=colour, label=label, **hollow)
            if arm.learning_rate in arm_losses:
                axes.plot([arm.learning_rate], [arm_losses[arm.learning_rate]], "o", color=colour, markersize=10)
        canvas.log_axis("x")

    best = "; ".join(f"{arm.name} best at {learning_rate(arm.learning_rate)}" for arm in tried if arm.learning_rate)
    caption = f"Held-out {measure.name} at each learning rate tried; filled: the one chosen."
    at_edge = [arm.name for arm in tried if not arm.bracketed]
    if at_edge:
        caption += f" The best rate of {', '.join(at_edge)} is at the edge of the range."
    figure = Figure("rates", draw, f"{measure.name.capitalize()} against learning rate. {best}.", caption, wide=True)
    return figure if tried else None
