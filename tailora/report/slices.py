"""Loss against one setting at a time."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from tailora.report import words
from tailora.report.charts import canvas, label, log_axis
from tailora.report.parts import Drawing, Picture
from tailora.report.svg import PAPER, SERIES

FEW = 7  # values of a number that are shown as such
ENOUGH = 5  # trials, to see anything
WIDE = 8  # a range of so much from end to end gets a logarithmic axis

Row = tuple[Mapping[str, Any], float]  # settings, loss


def slices(rows: Sequence[Row]) -> list[Picture]:
    """One for each setting that differs among the rows."""
    if len(rows) < ENOUGH:
        return []
    names = list(dict.fromkeys(name for settings, _ in rows for name in settings))
    held = {name: [(settings[name], loss) for settings, loss in rows if name in settings] for name in names}
    differ = [name for name in names if len({words.setting(value) for value, _ in held[name]}) > 1]
    return [
        Picture(
            f"slice-{place}",
            partial(_draw, held[name]),
            f"Loss of {len(held[name])} trials against {name}.",
            f"Loss of each trial by {name}.",
        )
        for place, name in enumerate(differ)
    ]


def _draw(rows: Sequence[tuple[Any, float]], width: float) -> Drawing:
    figure, axes = canvas(width, 220)
    values, losses = [value for value, _ in rows], [loss for _, loss in rows]
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    kinds = list(dict.fromkeys(map(words.setting, sorted(values) if numbers else values)))
    steps = not numbers or len(kinds) <= FEW
    places = [kinds.index(words.setting(value)) for value in values] if steps else values
    marks = axes.scatter(places, losses, s=40, color=SERIES[0], alpha=0.75, edgecolors=PAPER, linewidths=1)
    marks.set_gid("trials")
    if steps:
        axes.set_xticks(range(len(kinds)), [label(kind, 64 // len(kinds)) for kind in kinds])
        axes.set_xlim(-0.5, len(kinds) - 0.5)
    elif min(values) > 0 and max(values) >= WIDE * min(values):
        log_axis(axes, "x")
    axes.set_ylabel("loss")
    return Drawing(figure, {"trials": [f"{words.setting(value)}: {loss:.4f}" for value, loss in rows]})
