"""How arms or finalists stand: their losses, and their differences from one of them, each with its interval."""

from collections.abc import Sequence
from functools import partial

from pydantic import BaseModel

from tailora.report import words
from tailora.report.charts import Estimate, estimates, label
from tailora.report.parts import Drawing, Picture
from tailora.report.svg import GRID


class Apart(BaseModel):
    """`evaluation.statistics.Difference`."""

    value: float
    low: float
    high: float
    p_value: float
    examples: int
    seeds: int


class Standing(BaseModel):
    """What both an arm and a finalist have."""

    name: str
    loss: float
    interval: tuple[float, float] | None
    apart: Apart | None  # from the reference
    runs: list[float] = []  # loss of each seed


def losses(rows: Sequence[Standing], base_loss: float) -> Picture | None:
    shown = [_estimate(row) for row in rows]
    if not shown:
        return None
    said = "; ".join(f"{row.name} {row.value:.3f} ({words.between(row.low, row.high)})" for row in shown)
    seeds = "; small: each seed" if any(row.runs for row in shown) else ""
    return Picture(
        "losses",
        lambda width: Drawing(estimates(width, shown, "held-out loss, nats per token")[0]),
        f"Held-out loss of each with its 95% interval: {said}.",
        f"Held-out loss, with 95% intervals over examples and seeds{seeds}. The base: {base_loss:.3f}. "
        "All have the same examples, so overlapping intervals say little: see the differences.",
    )


def _estimate(row: Standing) -> Estimate:
    low, high = row.interval or (None, None)
    return Estimate(row.name, row.loss, low, high, tuple(row.runs))


def differences(rows: Sequence[Standing], reference: str, margin: float | None) -> Picture | None:
    """margin: nats per token that make no difference, if that was said."""
    shown = [Estimate(row.name, row.apart.value, row.apart.low, row.apart.high) for row in rows if row.apart]
    if not shown:
        return None
    said = "; ".join(f"{row.name} {row.value:+.3f} ({words.between(row.low, row.high, '+.3f')})" for row in shown)
    band = "" if margin is None else f" Shaded: within {margin:g}, which was said to make no difference."
    places = [place for place, row in enumerate(rows) if row.apart]
    return Picture(
        "differences",
        partial(_draw_differences, shown, places, reference, margin),
        f"Difference of each from {reference} with its 95% interval: {said}.",
        f"Difference from {reference} on the same examples and seeds, with its 95% interval; left is better.{band}",
    )


def _draw_differences(
    rows: Sequence[Estimate], places: Sequence[int], reference: str, margin: float | None, width: float
) -> Drawing:
    unit = f"loss − loss of {label(reference, 18)}, nats per token"
    figure, axes = estimates(width, rows, unit, reference=0.0, form="+.3f", colours=places)
    if margin is not None:
        axes.axvspan(-margin, margin, color=GRID, alpha=0.6, linewidth=0, zorder=0)
    return Drawing(figure)
