"""Figures that the pages of compare and search share: losses, and differences from one of them, with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from tailora.evaluation.statistics import Difference
from tailora.report.blocks import Estimate, Figure
from tailora.report.colours import GRID
from tailora.report.format import interval, one_line

if TYPE_CHECKING:  # matplotlib is an optional package
    from tailora.report.charts import Canvas


@dataclass(frozen=True)
class JudgedLoss:
    """What an arm and a finalist have in common.

    ends: of the loss's 95% interval.    difference: from the reference.
    seed_losses: the loss of each seed.
    """

    name: str
    loss: float
    ends: tuple[float, float] | None
    difference: Difference | None
    seed_losses: Sequence[float] = ()


def losses_figure(rows: Sequence[JudgedLoss], base_loss: float) -> Figure | None:
    if not rows:
        return None
    values = "; ".join(f"{row.name} {row.loss:.3f} ({interval(*(row.ends or (None, None)))})" for row in rows)
    seeds = "; small dots: each seed" if any(row.seed_losses for row in rows) else ""
    return Figure(
        "losses",
        partial(_draw_losses, rows),
        f"Held-out loss of each with its 95% interval: {values}.",
        f"Held-out loss, with 95% intervals over examples and seeds{seeds}. The base has {base_loss:.3f}. All are "
        "judged on the same examples, so overlapping intervals say little: look at the differences.",
    )


def _draw_losses(rows: Sequence[JudgedLoss], canvas: "Canvas") -> None:
    estimates = []
    for row in rows:
        low, high = row.ends or (None, None)
        estimates.append(Estimate(row.name, row.loss, low, high, row.seed_losses))
    canvas.estimates(estimates, "held-out loss, nats per token")


def differences_figure(rows: Sequence[JudgedLoss], reference: str, margin: float | None) -> Figure | None:
    """margin: differences up to so many nats per token make no difference to the user."""
    differences = {row.name: row.difference for row in rows if row.difference}
    if not differences:
        return None
    values = "; ".join(
        f"{name} {difference.value:+.3f} ({interval(difference.low, difference.high, '+.3f')})"
        for name, difference in differences.items()
    )
    band = "" if margin is None else f" Shaded: within the margin of {margin:g}, which makes no difference."
    return Figure(
        "differences",
        partial(_draw_differences, rows, reference, margin),
        f"Difference of each from {reference} with its 95% interval: {values}.",
        f"Difference from {reference} on the same examples and seeds, with its 95% interval; left is better.{band}",
    )


def _draw_differences(rows: Sequence[JudgedLoss], reference: str, margin: float | None, canvas: "Canvas") -> None:
    judged = [(number, row.name, row.difference) for number, row in enumerate(rows) if row.difference]
    estimates = [Estimate(name, apart.value, apart.low, apart.high) for _, name, apart in judged]
    unit = f"loss − loss of {one_line(reference, 18)}, nats per token"
    colours = [number for number, _, _ in judged]  # those of the losses
    canvas.estimates(estimates, unit, reference=0.0, form="+.3f", colours=colours)
    if margin is not None:
        canvas.axes.axvspan(-margin, margin, color=GRID, alpha=0.6, linewidth=0, zorder=0)
