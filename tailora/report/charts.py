"""The colours of figures, and a canvas with the charts that several pages use.

Widths and heights are in CSS pixels. matplotlib is optional, so it is only imported for drawing.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tailora.report.format import learning_rate, one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.ticker import Locator

# Placeholders for the page's variables, which have a light and a dark value (style.css)
INK, SOFT, GRID, PAPER = "#010101", "#020202", "#030303", "#040404"
SERIES = [f"#0a0a0{i}" for i in range(8)]
VARIABLES = {INK: "ink", SOFT: "soft", GRID: "grid", PAPER: "paper"}
VARIABLES |= {colour: f"series-{i}" for i, colour in enumerate(SERIES)}
DASHED = (0, (4, 3))
LEGEND_COLUMNS = 4

FEW_STEPS = 8  # runs of at most this many steps get no running mean

Floats: TypeAlias = NDArray[np.float64]
Show: TypeAlias = Callable[[float], str]


def series_colour(number: int) -> str:
    return SERIES[number % len(SERIES)]


@dataclass(frozen=True)
class Estimate:
    """A value for a figure. ends: of its interval."""

    name: str
    value: float
    ends: tuple[float | None, float | None] | None = None
    runs: Sequence[float] = ()  # the values that it averages


class Canvas:
    """A matplotlib figure of a given width."""

    axes: "Axes"  # created by `new_axes`

    def __init__(self, width: float) -> None:
        from matplotlib.figure import Figure

        self.width = width
        self.wide = width > 600
        self.figure = Figure()

    def new_axes(self, height: float, x_label: str = "", y_label: str = "", *, whole_numbers: str = "") -> "Axes":
        """whole_numbers: "x" or "y", the axis with ticks only at whole numbers."""
        from matplotlib.ticker import MaxNLocator

        self.figure.set_size_inches(self.width / 72, height / 72)
        self.axes = self.figure.add_subplot()
        self.axes.set_xlabel(x_label)
        self.axes.set_ylabel(y_label)
        if whole_numbers:
            self._set_ticks(whole_numbers, MaxNLocator(integer=True, nbins=7), "{:,.0f}".format)
        return self.axes

    def add_legend(self) -> None:
        """Adds a legend above the axes if something has a label."""
        handles, texts = self.figure.axes[0].get_legend_handles_labels()
        if handles:
            place: dict[str, Any] = {"loc": "outside upper left", "borderaxespad": 0.2}
            self.figure.legend(handles, texts, ncols=LEGEND_COLUMNS, **place)

    # ---- Axes

    def log_axis(self, which: str, show: Show = learning_rate) -> None:
        """Puts ticks at 1, 2 and 5 of each decade if there are few, otherwise at the decades. No superscripts."""
        from matplotlib.ticker import LogLocator

        getattr(self.axes, f"set_{which}scale")("log")
        low, high = getattr(self.axes, f"get_{which}lim")()
        decades = math.log10(high / low)
        ticks = (1.0, 2.0, 5.0) if decades < 1.7 else (1.0, 3.0) if decades < 2.6 else (1.0,)
        self._set_ticks(which, LogLocator(subs=ticks), show)

    def _set_ticks(self, which: str, locator: "Locator", show: Show) -> None:
        from matplotlib.ticker import FuncFormatter, NullLocator

        axis = getattr(self.axes, f"{which}axis")
        axis.set_major_locator(locator)
        axis.set_major_formatter(FuncFormatter(lambda number, _: show(number)))
        axis.set_minor_locator(NullLocator())

    # ---- Values side by side, the first at the top

    def estimates(
        self,
        rows: Sequence[Estimate],
        unit: str,
        *,
        reference: float | None = None,
        form: str = ".3f",
        colours: Sequence[int] | None = None,
    ) -> None:
        """Draws a row for each estimate: a dot with its interval, and the value above it.

        reference: position of a dashed line.
        colours: number of each row's series colour; by default all differ.
        """
        from matplotlib.ticker import MaxNLocator

        axes = self.new_axes(64 + 44 * len(rows), unit)
        place: dict[str, Any] = {"xytext": (0, 9), "textcoords": "offset points", "ha": "center", "va": "bottom"}
        for y, row in enumerate(rows):
            colour = series_colour(colours[y] if colours else y)
            low, high = row.ends or (None, None)
            if low is not None and high is not None:
                axes.plot([low, high], [y, y], color=colour, linewidth=3, alpha=0.45)
            axes.plot(row.runs, [y + 0.2] * len(row.runs), "o", color=colour, markersize=3.5)
            axes.plot([row.value], [y], "o", color=colour, markersize=9, markeredgecolor=PAPER, markeredgewidth=1.5)
            axes.annotate(f"{row.value:{form}}".replace("-", "−"), (row.value, y), weight="bold", **place)
        if reference is not None:
            axes.axvline(reference, color=SOFT, linewidth=1.2, linestyle=DASHED)
        axes.set_yticks(range(len(rows)), [one_line(row.name, 22) for row in rows])
        axes.spines["left"].set_visible(False)
        axes.set_ylim(len(rows) - 0.45, -0.75)
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8 if self.wide else 5))

    # ---- Losses over the steps of training

    def losses(self, losses: Sequence[float], colour: str, name: str) -> None:
        """Draws a thin line for the losses of each step, and a thick line for their running mean."""
        steps = range(1, len(losses) + 1)
        self.axes.plot(steps, losses, color=colour, linewidth=1, alpha=0.4)
        self.axes.plot(steps, running_mean(np.array(losses)), color=colour, label=name)


def running_mean(values: Floats) -> Floats:
    """Averages over about a tenth of the run, less at its ends. Runs of at most FEW_STEPS are not averaged."""
    half = max(1, len(values) // 20) if len(values) > FEW_STEPS else 0
    window = np.ones(2 * half + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")
