"""The page of `search --lr-only`: the held-out loss while the learning rate rises."""

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from tailora.report.blocks import Code, Column, Figure, Number, Page, Section, Table, settings_table
from tailora.report.colours import DASHED, SERIES, SOFT
from tailora.report.format import learning_rate
from tailora.study.lr_range import RateRange

if TYPE_CHECKING:  # matplotlib is an optional package
    from tailora.report.charts import Canvas


def lr_range_page(rates: RateRange) -> Page:
    suggestion = learning_rate(rates.suggestion)
    lowest = f"{rates.base_loss - rates.gain:.3f}"
    columns = [Column("learning rate", numeric=True), Column("held-out loss", numeric=True)]
    rows = [[learning_rate(rate), f"{loss:.4f}"] for rate, loss in rates.curve]
    sections = [
        Section(
            "Loss while the learning rate rises",
            "One run, each step at a higher learning rate; the loss is always that of the same held-out examples.",
            [_figure(rates, suggestion, lowest), Table(columns, rows, "All losses", folded=True)],
        ),
        Section("Settings", "", [settings_table("Settings", ("", rates.settings.get("train", {})))]),
    ]
    conclusion = Section("To train with it", "", [Code(f"tailora train --learning-rate {rates.suggestion:.1e}")])
    numbers = [
        Number("suggested learning rate", suggestion),
        Number("lowest loss", lowest, f"at {suggestion}"),
        Number("held-out loss, base", f"{rates.base_loss:.3f}", "before any training"),
        Number("steps", f"{rates.steps:,}"),
    ]
    return Page("learning rates", "Learning rates", rates.verdict, numbers, sections, conclusion=conclusion)


def _figure(rates: RateRange, suggestion: str, lowest: str) -> Figure:
    return Figure(
        "rates",
        partial(_draw, rates),
        f"Held-out loss against the learning rate, from {rates.base_loss:.3f} down to {lowest} at {suggestion}.",
        "Dashed line: the base. Losses above the top of the figure are left out.",
        wide=True,
    )


def _draw(rates: RateRange, canvas: "Canvas") -> None:
    axes = canvas.new_axes(320, "learning rate", "held-out loss, nats per token")
    tried, losses = np.array(rates.curve).T
    axes.plot(tried, losses, color=SERIES[0], linewidth=2)
    top = rates.base_loss + 0.6 * rates.gain
    shown = losses <= top
    marks = axes.scatter(tried[shown], losses[shown], s=26, color=SERIES[0], zorder=3)
    axes.axhline(rates.base_loss, color=SOFT, linewidth=1.2, linestyle=DASHED)
    axes.axvline(rates.suggestion, color=SERIES[1], linewidth=2, label="suggested")
    axes.set_ylim(rates.base_loss - 1.15 * rates.gain, top)
    canvas.log_axis("x")
    canvas.legend()
    tips = [f"{learning_rate(rate)}: {loss:.4f}" for rate, loss in rates.curve if loss <= top]
    canvas.add_tips(marks, "losses", tips)
