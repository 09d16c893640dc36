"""The page of `search --lr-only`: the held-out loss while the learning rate rises."""

from functools import partial

import numpy as np

from tailora.report.blocks import Code, Column, Drawing, Figure, Number, Page, Section, Table, settings_table
from tailora.report.colours import SERIES, SOFT
from tailora.report.format import learning_rate
from tailora.study.lr_range import RateRange


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


def _draw(rates: RateRange, width: float) -> Drawing:
    from tailora.report import charts

    figure, axes = charts.canvas(width, 320)
    tried, losses = np.array(rates.curve).T
    axes.plot(tried, losses, color=SERIES[0], linewidth=2)
    top = rates.base_loss + 0.6 * rates.gain
    shown = losses <= top
    marks = axes.scatter(tried[shown], losses[shown], s=26, color=SERIES[0], zorder=3)
    marks.set_gid("losses")
    axes.axhline(rates.base_loss, color=SOFT, linewidth=1.2, linestyle=charts.DASHED)
    axes.axvline(rates.suggestion, color=SERIES[1], linewidth=2, label="suggested")
    axes.set_ylim(rates.base_loss - 1.15 * rates.gain, top)
    charts.log_axis(axes, "x")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("held-out loss, nats per token")
    charts.legend(figure, axes)
    tips = [f"{learning_rate(rate)}: {loss:.4f}" for rate, loss in rates.curve if loss <= top]
    return Drawing(figure, {"losses": tips})
