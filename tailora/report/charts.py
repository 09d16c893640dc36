"""The kinds of chart that pages are made of. Widths and heights are in CSS pixels; colours are those of `colours`."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from tailora.report.blocks import Drawing, HeatMap
from tailora.report.colours import GRID, HEAT, INK, PAPER, SERIES, SOFT
from tailora.report.format import learning_rate, one_line

LONGEST_LABEL = 28  # characters of a name beside an axis
DASHED = (0, (4, 3))
FEW_STEPS = 8  # runs of so many steps get no running mean

Floats: TypeAlias = NDArray[np.float64]
Show: TypeAlias = Callable[[float], str]


# ---- Axes and their labels


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width / 72, height / 72))
    return figure, figure.add_subplot()


def label(text: str, longest: int = LONGEST_LABEL) -> str:
    return one_line(text, longest)


def legend(figure: Figure, axes: Axes, columns: int = 4) -> None:
    """Above the axes."""
    handles, texts = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, texts, loc="outside upper left", ncols=columns, borderaxespad=0.2)


def log_axis(axes: Axes, which: str, show: Show = learning_rate) -> None:
    """Ticks at 1, 2 and 5 of each decade on a short axis, else at the decades; labels without superscripts."""
    getattr(axes, f"set_{which}scale")("log")
    low, high = getattr(axes, f"get_{which}lim")()
    axis = getattr(axes, f"{which}axis")
    decades = math.log10(high / low)
    ticks = (1.0, 2.0, 5.0) if decades < 1.7 else (1.0, 3.0) if decades < 2.6 else (1.0,)
    axis.set_major_locator(LogLocator(subs=ticks))
    axis.set_major_formatter(FuncFormatter(lambda number, _: show(number)))
    axis.set_minor_locator(NullLocator())


def powers_axis(axes: Axes, which: str, values: Sequence[float]) -> None:
    """A logarithmic axis with a tick at each of these values."""
    getattr(axes, f"set_{which}scale")("log", base=2)
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(FixedLocator(sorted(set(values))))
    axis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
    axis.set_minor_locator(NullLocator())


def whole_numbers(axes: Axes, which: str) -> None:
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    axis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:,.0f}"))


# ---- Values side by side


@dataclass(frozen=True)
class Estimate:
    """A value with its interval. runs: the values that it is the mean of."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    runs: tuple[float, ...] = ()


def estimates(
    width: float,
    rows: Sequence[Estimate],
    unit: str,
    *,
    reference: float | None = None,
    form: str = ".3f",
    colours: Sequence[int] | None = None,
) -> tuple[Figure, Axes]:
    """Dots with their intervals, one row each, the first at the top, with their values written above them.

    reference: a dashed line.    colours: of the rows, as numbers of a series; by default they all differ.
    """
    figure, axes = canvas(width, 64 + 44 * len(rows))
    for y, row in enumerate(rows):
        colour = SERIES[(colours[y] if colours else y) % len(SERIES)]
        if row.low is not None and row.high is not None:
            axes.plot([row.low, row.high], [y, y], color=colour, linewidth=3, alpha=0.45)
        axes.plot(row.runs, [y + 0.2] * len(row.runs), "o", color=colour, markersize=3.5)
        axes.plot([row.value], [y], "o", color=colour, markersize=9, markeredgecolor=PAPER, markeredgewidth=1.5)
        text = f"{row.value:{form}}".replace("-", "−")
        place: dict[str, Any] = {"xytext": (0, 9), "textcoords": "offset points", "ha": "center", "va": "bottom"}
        axes.annotate(text, (row.value, y), weight="bold", **place)
    if reference is not None:
        axes.axvline(reference, color=SOFT, linewidth=1.2, linestyle=DASHED)
    axes.set_yticks(range(len(rows)), [label(row.name, 18) for row in rows])
    axes.set_ylim(len(rows) - 0.45, -0.75)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5 if width < 600 else 8))
    axes.set_xlabel(unit)
    return figure, axes


def bars(width: float, values: Mapping[str, float], show: Show, *, one_colour: bool = False) -> Drawing:
    """Bars with their values, the first at the top. one_colour: the names are no series of other figures."""
    figure, axes = canvas(width, 24 + 30 * len(values))
    colours = [SERIES[0 if one_colour else y % len(SERIES)] for y in range(len(values))]
    axes.barh(range(len(values)), list(values.values()), height=0.62, color=colours)
    least, most = min(0.0, *values.values()), max(0.0, *values.values())
    for y, value in enumerate(values.values()):
        axes.annotate(show(value), (max(value, 0), y), (6, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(values)), [label(name, 18) for name in values])
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.set_xlim(least, most + 0.28 * (most - least or 1))  # room for the values
    axes.set_xticks([])
    axes.grid(visible=False)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.axvline(0, color=GRID, linewidth=1)
    return Drawing(figure)


# ---- Losses over the steps of training: thin as they were, thick smoothed


def loss_curves(axes: Axes, runs: Sequence[Sequence[float]], colour: str, name: str) -> None:
    """runs: the losses of every step of each run. The thick line is their mean, as far as all of them go."""
    if max(map(len, runs)) <= FEW_STEPS:
        for run in runs:
            axes.plot(range(1, len(run) + 1), run, color=colour, label=name if run is runs[0] else "")
        return
    for run in runs:
        axes.plot(range(1, len(run) + 1), run, color=colour, linewidth=1, alpha=0.4 if len(runs) == 1 else 0.25)
    shared = min(map(len, runs))
    mean = np.mean([run[:shared] for run in runs], axis=0)
    axes.plot(range(1, shared + 1), running_mean(mean), color=colour, label=name)


def running_mean(values: Floats) -> Floats:
    """Over about a tenth of the run, less at its ends."""
    half = max(1, len(values) // 20)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    steps = np.arange(len(values))
    low, high = np.maximum(steps - half, 0), np.minimum(steps + half + 1, len(values))
    return np.asarray((sums[high] - sums[low]) / (high - low))


# ---- A third number as a colour


def heat_colour(value: float, low: float, high: float) -> str:
    """The colour of a value between these."""
    share = (value - low) / (high - low) if high > low else 0.0
    return HEAT[min(int(max(share, 0.0) * len(HEAT)), len(HEAT) - 1)]


def colour_scale(figure: Figure, axes: Axes | list[Axes], ends: tuple[float, float], show: Show, title: str) -> None:
    """What the colours from one end to the other mean, above the axes."""
    low, high = ends
    shades = ScalarMappable(Normalize(low, high if high > low else low + 1), ListedColormap(HEAT))
    bar = figure.colorbar(shades, ax=axes, location="top", shrink=0.5, aspect=26, anchor=(0.0, 0.0), pad=0.03)
    bar.outline.set_visible(False)
    ticks = np.linspace(low, high, 3)
    bar.set_ticks(ticks.tolist(), labels=[show(tick) for tick in ticks])
    bar.ax.tick_params(length=0, labelsize=11)
    bar.set_label(title, size=11.5, labelpad=6)


def heat_map(width: float, heat: HeatMap) -> Drawing:
    """A row for each name, in order of appearance, and a column for each layer."""
    rows = list(dict.fromkeys(row for row, _ in heat.cells))
    layers = sorted({layer for _, layer in heat.cells})
    figure, axes = canvas(width, 92 + 22 * len(rows))
    corners = [_square(layers.index(layer), rows.index(row)) for row, layer in heat.cells]
    colours = [heat_colour(value, 0, heat.top) for value in heat.cells.values()]
    squares = PolyCollection(corners, facecolors=colours, linewidths=0)
    squares.set_gid("cells")
    axes.add_collection(squares)
    axes.set_xlim(-0.5, len(layers) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [label(row, 18) for row in rows])
    every = math.ceil(len(layers) / (width / 34))
    axes.set_xticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
    axes.set_xlabel("layer")
    axes.grid(visible=False)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    colour_scale(figure, axes, (0, heat.top), heat.show, heat.title)
    tips = [f"layer {layer}, {row}: {heat.show(value)}" for (row, layer), value in heat.cells.items()]
    return Drawing(figure, {"cells": tips})


def _square(x: int, y: int) -> list[tuple[float, float]]:
    """The corners of a cell, with a gap around it."""
    half = 0.47
    return [(x - half, y - half), (x + half, y - half), (x + half, y + half), (x - half, y + half)]


# ---- A surface over two settings

DIFFERENT_VALUES = 4  # of each setting, without which there is no surface
GRID_POINTS = 50
WIDTH = 1.0  # of the smoothing, in octaves
NEAR = 0.1  # weight of the nearest point, below which nothing is drawn
RIDGE = 0.3  # holds down slopes that rest on few points


def surface(axes: Axes, x: Sequence[float], y: Sequence[float], z: Sequence[float], low: float, high: float) -> None:
    """Values z at points on logarithmic axes, low ones in strong colours; between enough points they are smoothed."""
    shades = [heat_colour(-value, -high, -low) for value in z]
    axes.scatter(x, y, s=130, c=PAPER, linewidths=0, zorder=3, clip_on=False)
    marks = axes.scatter(x, y, s=64, c=shades, edgecolors=INK, linewidths=1, zorder=3, clip_on=False)
    marks.set_gid("points")
    if len(set(x)) < DIFFERENT_VALUES or len(set(y)) < DIFFERENT_VALUES:
        return
    points = np.log2(np.stack([x, y], axis=1))  # (points, 2): a factor of 2 is a length of 1
    columns, rows = (np.linspace(float(axis.min()), float(axis.max()), GRID_POINTS) for axis in points.T)
    grid = np.stack(np.meshgrid(columns, rows), axis=-1)  # (rows, columns, 2)
    smooth = smoothed(points, np.minimum(z, high), grid)
    levels = np.linspace(low, high, len(HEAT) + 1)
    axes.contourf(2**columns, 2**rows, np.clip(smooth, low, high), levels=levels, colors=HEAT[::-1])


def smoothed(points: Floats, values: Floats, grid: Floats) -> Floats:
    """Local linear regression; NaN where no point is near.

    points: (points, 2); values: (points,); grid: (..., 2) -> (...).
    """
    offsets = points - grid[..., None, :]  # (..., points, 2)
    weights = np.exp(-0.5 * (offsets**2).sum(-1) / WIDTH**2)  # (..., points)
    terms = np.concatenate([np.ones((*offsets.shape[:-1], 1)), offsets], axis=-1)  # (..., points, 3)
    weighted = terms * weights[..., None]
    squares = np.einsum("...pi,...pj->...ij", weighted, terms) + RIDGE * np.diag([0.0, 1.0, 1.0])
    sums = np.einsum("...pi,p->...i", weighted, values)
    heights = np.linalg.solve(squares + 1e-9 * np.eye(3), sums[..., None])[..., 0, 0]
    return np.asarray(np.where(weights.max(-1) > NEAR, heights, np.nan))
