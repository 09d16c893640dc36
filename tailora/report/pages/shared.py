"""Columns, tables and figures that several pages have."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tailora.evaluation.statistics import Difference
from tailora.report.blocks import Column, Figure, Table
from tailora.report.charts import GRID, Canvas, Estimate
from tailora.report.format import interval, one_line, p_value, setting, signed
from tailora.study.study_store import LAUNCH, PROCESSES

INTERVAL = Column("95% interval", numeric=True, interval=True)


def numeric(*names: str) -> list[Column]:
    """Columns of numbers."""
    return [Column(name, numeric=True) for name in names]


def bar_figure(
    name: str,
    values: Mapping[str, float],
    show: Callable[[float], str],
    title: str,
    caption: str,
    *,
    wide: bool = False,
) -> Figure | None:
    """A bar with its number for each value. wide: in one colour, because no other figure shows these names."""
    if not values:
        return None
    alt = f"{title}: {', '.join(f'{label} {show(value)}' for label, value in values.items())}."
    return Figure(name, lambda canvas: canvas.bars(values, show, one_colour=wide), alt, caption, wide)


def settings_table(title: str, *groups: tuple[str, Mapping[str, object]]) -> Table | None:
    """A folded table of settings. groups: name of a group ("" for none) -> its settings."""
    rows = [[group, name, setting(value)] for group, settings in groups for name, value in settings.items()]
    if not rows:
        return None
    columns = [Column("of"), Column("setting"), Column("value")]
    if not any(group for group, *_ in rows):
        columns, rows = columns[1:], [row[1:] for row in rows]
    return Table(columns, rows, title, folded=True, detail="page")


def train_command(settings: Mapping[str, Any]) -> str:
    """Returns the start of a command that trains in as many processes as the runs of the study with these settings."""
    processes = settings.get(LAUNCH, {}).get(PROCESSES)
    return "tailora train" if processes is None else f"tailora train --nproc-per-node {processes}"


# ---- Losses, and differences from one of them: of a comparison's arms and of a search's finalists


def judged_figures(
    losses: Sequence[Estimate],
    base_loss: float,
    differences: Mapping[str, Difference | None],
    reference: str,
    margin: float | None,
    unit: str,
) -> list[Figure | None]:
    """differences: name of a loss -> its difference from the reference's loss.
    margin: smaller differences, in the loss's unit, do not matter to the user.
    """
    measured = {name: difference for name, difference in differences.items() if difference}
    listed = "; ".join(f"{loss.name} {loss.value:.3f} ({interval(loss.ends)})" for loss in losses)
    seeds = "; small dots: each seed" if any(loss.runs for loss in losses) else ""
    losses_figure = Figure(
        "losses",
        lambda canvas: canvas.estimates(losses, f"held-out loss, {unit}"),
        f"Held-out loss of each with its 95% interval: {listed}.",
        f"Held-out loss, with 95% intervals over examples and seeds{seeds}. The base has {base_loss:.3f}. All are "
        "judged on the same examples, so overlapping intervals say little: look at the differences.",
    )

    def draw_differences(canvas: Canvas) -> None:
        rows = [Estimate(name, value.value, (value.low, value.high)) for name, value in measured.items()]
        colours = [number for number, loss in enumerate(losses) if loss.name in measured]  # as in the figure of losses
        label = f"loss − loss of {one_line(reference, 18)}, {unit}"
        canvas.estimates(rows, label, reference=0.0, form="+.3f", colours=colours)
        if margin is not None:
            canvas.axes.axvspan(-margin, margin, color=GRID, alpha=0.6, linewidth=0, zorder=0)

    listed = "; ".join(
        f"{name} {value.value:+.3f} ({interval((value.low, value.high), '+.3f')})" for name, value in measured.items()
    )
    band = "" if margin is None else f" Shaded: within the margin of {margin:g}, which does not matter."
    differences_figure = Figure(
        "differences",
        draw_differences,
        f"Difference of each from {reference} with its 95% interval: {listed}.",
        f"Difference from {reference} on the same examples and seeds, with its 95% interval; left is better.{band}",
    )
    return [losses_figure if losses else None, differences_figure if measured else None]


def difference_cells(difference: Difference | None, p: float | None, missing: str = "") -> list[str]:
    """The difference, its interval and its p-value. missing: shown if there is no difference."""
    value = signed(difference.value) if difference else missing
    ends = f"{signed(difference.low)} to {signed(difference.high)}" if difference else ""
    return [value, ends, "" if p is None else p_value(p)]
