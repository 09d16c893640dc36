"""The colours of figures, and a canvas with the charts that several pages use.

Widths and heights are in CSS pixels. matplotlib is optional, so it is only imported for drawing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
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
HEAT = [f"#0b0b{i:02x}" for i in range(16)]  # from low to high
VARIABLES = {INK: "ink", SOFT: "soft", GRID: "grid", PAPER: "paper"}
VARIABLES |= {colour: f"series-{i}" for i, colour in enumerate(SERIES)}
VARIABLES |= {colour: f"heat-{i}" for i, colour in enumerate(HEAT)}
DASHED = (0, (4, 3))

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
    """A matplotlib figure of a given width.

    legend_columns: number of columns in the legend.
    """

    axes: "Axes"  # created by `new_axes`
    legend_columns = 4

    def __init__(self, width: float) -> None:
        from matplotlib.figure import Figure

        self.width = width
        self.wide = width > 600
        self.figure = Figure()

    def set_height(self, height: float) -> None:
        self.figure.set_size_inches(self.width / 72, height / 72)

    def new_axes(self, height: float, x_label: str = "", y_label: str = "", *, whole_numbers: str = "") -> "Axes":
        """whole_numbers: "x" or "y", the axis with ticks only at whole numbers."""
        from matplotlib.ticker import MaxNLocator

        self.set_height(height)
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
            self.figure.legend(handles, texts, ncols=self.legend_columns, **place)

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

    def _name_rows(self, names: Sequence[str]) -> None:
        """Labels the rows, the first at the top."""
        self.axes.set_yticks(range(len(names)), [one_line(name, 22) for name in names])
        self.axes.spines["left"].set_visible(False)

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
        self._name_rows([row.name for row in rows])
        axes.set_ylim(len(rows) - 0.45, -0.75)
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8 if self.wide else 5))

    # ---- Losses over the steps of training

    def losses(self, losses: Sequence[float], colour: str, name: str) -> None:
        """Draws a thin line for the losses of each step, and a thick line for their running mean."""
        steps = range(1, len(losses) + 1)
        self.axes.plot(steps, losses, color=colour, linewidth=1, alpha=0.4)
        self.axes.plot(steps, running_mean(np.array(losses)), color=colour, label=name)

    # ---- A third number as a colour

    def heat_map(self, cells: Mapping[tuple[str, int], float], top: float, show: Show, title: str) -> None:
        """A row for each name, in order of appearance, and a column for each layer. `top` has the strongest colour."""
        from matplotlib.cm import ScalarMappable
        from matplotlib.collections import PolyCollection
        from matplotlib.colors import ListedColormap, Normalize

        rows = list(dict.fromkeys(row for row, _ in cells))
        layers = sorted({layer for _, layer in cells})
        axes = self.new_axes(92 + 22 * len(rows), "layer")
        centres = [(layers.index(layer), rows.index(row)) for row, layer in cells]
        square = ((-0.47, -0.47), (0.47, -0.47), (0.47, 0.47), (-0.47, 0.47))  # leaves a gap between cells
        corners = [[(x + right, y + down) for right, down in square] for x, y in centres]
        shades = ScalarMappable(Normalize(0, top or 1), ListedColormap(HEAT))
        colours = shades.to_rgba(np.array(list(cells.values())))
        axes.add_collection(PolyCollection(corners, facecolors=colours, linewidths=0))
        axes.set_xlim(-0.5, len(layers) - 0.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        self._name_rows(rows)
        every = math.ceil(len(layers) / (self.width / 34))
        axes.set_xticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)
        bar = self.figure.colorbar(shades, ax=axes, location="top", shrink=0.5, aspect=26, anchor=(0.0, 0.0), pad=0.03)
        bar.outline.set_visible(False)
        ticks = np.linspace(0, top, 3)
        bar.set_ticks(ticks.tolist(), labels=[show(tick) for tick in ticks])
        bar.ax.tick_params(length=0, labelsize=11)
        bar.set_label(title, size=11.5, labelpad=6)


def running_mean(values: Floats) -> Floats:
    """Averages over about a tenth of the run, less at its ends. Runs of at most FEW_STEPS are not averaged."""
    half = max(1, len(values) // 20) if len(values) > FEW_STEPS else 0
    window = np.ones(2 * half + 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")
