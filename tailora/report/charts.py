"""The few kinds of chart that the pages are made of. Called within `svg.look`; widths and heights in CSS pixels."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from tailora.report import words
from tailora.report.svg import GRID, PAPER, SERIES, SOFT

LONGEST = 28  # of a name beside an axis


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width / 72, height / 72))
    return figure, figure.add_subplot()


def label(text: str, longest: int = LONGEST) -> str:
    """Fit for a figure: one line, no control characters (no XML holds them), the middle left out where it is long."""
    clean = "".join(letter if letter.isprintable() else " " for letter in text)
    if len(clean) <= longest:
        return clean
    half = (longest - 1) // 2
    return f"{clean[:half]}…{clean[-half:]}"


def legend(figure: Figure, axes: Axes, columns: int = 4) -> None:
    """Above the axes."""
    handles, texts = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, texts, loc="outside upper left", ncols=columns, borderaxespad=0.2)


def log_axis(axes: Axes, which: str, say: Callable[[float], str] = words.rate) -> None:
    """Ticks at 1, 2, 5 of each decade where the axis is short, else at the decades; labels without superscripts."""
    getattr(axes, f"set_{which}scale")("log")
    low, high = getattr(axes, f"get_{which}lim")()
    axis = getattr(axes, f"{which}axis")
    decades = math.log10(high / low)
    axis.set_major_locator(
        LogLocator(subs=(1.0, 2.0, 5.0) if decades < 1.7 else (1.0, 3.0) if decades < 2.6 else (1.0,))
    )
    axis.set_major_formatter(FuncFormatter(lambda number, _: say(number)))
    axis.set_minor_locator(NullLocator())


def powers_axis(axes: Axes, which: str, values: Sequence[float]) -> None:
    """A logarithmic axis with a tick at each of these."""
    getattr(axes, f"set_{which}scale")("log", base=2)
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(FixedLocator(sorted(set(values))))
    axis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
    axis.set_minor_locator(NullLocator())


def whole_numbers(axes: Axes, which: str) -> None:
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    axis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:,.0f}"))


@dataclass(frozen=True)
class Estimate:
    """One row of `estimates`."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    runs: tuple[float, ...] = ()  # what it is the mean of


def estimates(
    width: float,
    rows: Sequence[Estimate],
    unit: str,
    *,
    reference: float | None = None,
    form: str = ".3f",
    colours: Sequence[int] | None = None,
    one_colour: bool = False,
) -> tuple[Figure, Axes]:
    """Dots with their intervals, one row each, first on top, and their values above them.

    colours: of each row, by default all differ.
    """
    figure, axes = canvas(width, 64 + 44 * len(rows))
    for place, row in enumerate(rows):
        colour = SERIES[0 if one_colour else (colours[place] if colours else place) % len(SERIES)]
        if row.low is not None and row.high is not None:
            axes.plot([row.low, row.high], [place, place], color=colour, linewidth=3, alpha=0.45)
        axes.plot(row.runs, [place + 0.2] * len(row.runs), "o", color=colour, markersize=3.5)
        axes.plot([row.value], [place], "o", color=colour, markersize=9, markeredgecolor=PAPER, markeredgewidth=1.5)
        axes.annotate(
            f"{row.value:{form}}".replace("-", "−"),
            (row.value, place),
            (0, 9),
            textcoords="offset points",
            ha="center",
            va="bottom",
            weight="bold",
        )
    if reference is not None:
        axes.axvline(reference, color=SOFT, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.set_yticks(range(len(rows)), [label(row.name, 18) for row in rows])
    axes.set_ylim(len(rows) - 0.45, -0.75)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5 if width < 600 else 8))
    axes.set_xlabel(unit)
    return figure, axes


def bars(
    width: float,
    names: Sequence[str],
    values: Sequence[float],
    say: Callable[[float], str],
    *,
    one_colour: bool = False,
) -> Figure:
    """Lengths side by side, first on top, each with its value. one_colour: names are no series of other figures."""
    figure, axes = canvas(width, 24 + 30 * len(names))
    colours = [SERIES[0 if one_colour else place % len(SERIES)] for place in range(len(names))]
    axes.barh(range(len(names)), values, height=0.62, color=colours)
    least, most = min(0.0, *values), max(0.0, *values)
    room = 0.28 * (most - least or 1)
    for place, value in enumerate(values):
        axes.annotate(say(value), (max(value, 0), place), (6, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(names)), [label(name, 18) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(least, most + room)
    axes.set_xticks([])
    axes.grid(visible=False)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.axvline(0, color=GRID, linewidth=1)
    return figure
