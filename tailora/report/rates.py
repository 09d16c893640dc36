"""The page of `search --lr-only`: held-out loss while the learning rate rises."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from pydantic import BaseModel

from tailora.report import words
from tailora.report.charts import canvas, legend, log_axis
from tailora.report.parts import Code, Drawing, Page, Picture, Section, Table, Tile
from tailora.report.svg import SERIES, SOFT


class Rates(BaseModel):
    """Rates, and losses in nats per token."""

    suggestion: float
    low: float
    high: float
    gain: float
    curve: list[tuple[float, float]]
    base_loss: float
    steps: int
    verdict: str
    settings: dict[str, Any] = {}


def rates_page(content: Mapping[str, Any]) -> Page:
    found = Rates.model_validate(content)
    sections = [
        Section(
            "Loss while the rate rises",
            "One run, each step at a higher rate; the loss is that of the same held-out examples throughout.",
            [_picture(found), Code(f"tailora train --learning-rate {found.suggestion:.1e}")],
        ),
        Section("All numbers", "", [_table(found), _settings(found)]),
    ]
    return Page("learning rates", "Learning rates", found.verdict, _tiles(found), sections)


def _tiles(found: Rates) -> list[Tile]:
    return [
        Tile("suggested rate", words.rate(found.suggestion)),
        Tile("lowest loss", f"{found.base_loss - found.gain:.3f}", f"at {words.rate(found.suggestion)}"),
        Tile("held-out loss, base", f"{found.base_loss:.3f}", "before any training"),
        Tile("steps", f"{found.steps:,}"),
    ]


def _picture(found: Rates) -> Picture:
    return Picture(
        "rates",
        partial(_draw, found),
        f"Held-out loss against the learning rate, from {found.base_loss:.3f} down to "
        f"{found.base_loss - found.gain:.3f} at {words.rate(found.suggestion)}.",
        "Dashed: the base. Losses above the figure's top are left out.",
        wide=True,
    )


def _draw(found: Rates, width: float) -> Drawing:
    figure, axes = canvas(width, 320)
    rates, losses = np.array(found.curve).T
    axes.plot(rates, losses, color=SERIES[0], linewidth=2)
    top = found.base_loss + 0.6 * found.gain
    shown = losses <= top
    marks = axes.scatter(rates[shown], losses[shown], s=26, color=SERIES[0], zorder=3)
    marks.set_gid("losses")
    axes.axhline(found.base_loss, color=SOFT, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.axvline(found.suggestion, color=SERIES[1], linewidth=2, label="suggested")
    axes.set_ylim(found.base_loss - 1.15 * found.gain, top)
    log_axis(axes, "x")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("held-out loss, nats per token")
    legend(figure, axes)
    return Drawing(figure, {"losses": [f"{words.rate(rate)}: {loss:.4f}" for rate, loss in found.curve if loss <= top]})


def _table(found: Rates) -> Table:
    rows = [[words.rate(rate), f"{loss:.4f}"] for rate, loss in found.curve]
    return Table(("learning rate", "held-out loss"), rows, folded="Losses")


def _settings(found: Rates) -> Table | None:
    rows = [[name, words.value(each)] for name, each in found.settings.get("train", {}).items()]
    return Table(("setting", "value"), rows, words=2, folded="Settings") if rows else None
