"""Figures that the pages of compare and search share: losses, and differences from one of them, with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from tailora.evaluation.statistics import Difference
from tailora.report.blocks import Drawing, Figure
from tailora.report.colours import GRID
from tailora.report.format import interval


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


def _draw_losses(rows: Sequence[JudgedLoss], width: float) -> Drawing:
    from tailora.report import charts

    estimates = []
    for row in rows:
        low, high = row.ends or (None, None)
        estimates.append(charts.Estimate(row.name, row.loss, low, high, tuple(row.seed_losses)))
    return Drawing(charts.estimates(width, estimates, "held-out loss, nats per token")[0])


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


def _draw_differences(rows: Sequence[JudgedLoss], reference: str, margin: float | None, width: float) -> Drawing:
    from tailora.report import charts

    judged = [(number, row.name, row.difference) for number, row in enumerate(rows) if row.difference]
    estimates = [charts.Estimate(name, d.value, d.low, d.high) for _, name, d in judged]
    unit = f"loss − loss of {charts.label(reference, 18)}, nats per token"
    colours = [number for number, _, _ in judged]  # those of the losses
    figure, axes = charts.estimates(width, estimates, unit, reference=0.0, form="+.3f", colours=colours)
    if margin is not None:
        axes.axvspan(-margin, margin, color=GRID, alpha=0.6, linewidth=0, zorder=0)
    return Drawing(figure)
