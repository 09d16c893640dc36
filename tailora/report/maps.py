"""Charts whose third number is a colour: heat maps by layer, a surface over two settings, spectra by depth."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from tailora.report.charts import label
from tailora.report.parts import Drawing
from tailora.report.svg import HEAT, INK, PAPER

SHADES = ListedColormap(HEAT)
ENOUGH = 4  # different values of each setting, for a surface
GRID_POINTS = 50
WIDTH, NEAR, RIDGE = 1.0, 0.1, 0.3  # of the smoothing: octaves; a weight; against slopes that few points give

Floats: TypeAlias = NDArray[np.float64]

Say = Callable[[float], str]
Cells = Mapping[tuple[str, int], float]  # (row, column) -> value


def heat(value: float, low: float, high: float) -> str:
    """The colour of a value between these."""
    place = (value - low) / (high - low) if high > low else 0.0
    return HEAT[min(int(max(place, 0.0) * len(HEAT)), len(HEAT) - 1)]


def heat_map(
    width: float, cells: Cells, top: float, say: Say, title: str, names: Mapping[tuple[str, int], str]
) -> Drawing:
    """A row for each name, in order of appearance, a column for each layer. top: the value of the strongest colour.

    names: what each cell is called when pointed at.
    """
    rows = list(dict.fromkeys(row for row, _ in cells))
    numbers = sorted({column for _, column in cells})
    figure = Figure(figsize=(width / 72, (92 + 22 * len(rows)) / 72))
    axes = figure.add_subplot()
    corners = [_corners(numbers.index(column), rows.index(row)) for row, column in cells]
    squares = PolyCollection(corners, facecolors=[heat(value, 0, top) for value in cells.values()], linewidths=0)
    squares.set_gid("cells")
    axes.add_collection(squares)
    axes.set_xlim(-0.5, len(numbers) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [label(row, 18) for row in rows])
    every = math.ceil(len(numbers) / (width / 34))
    axes.set_xticks(range(0, len(numbers), every), [str(each) for each in numbers[::every]])
    axes.set_xlabel("layer")
    axes.grid(visible=False)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    scale(figure, axes, (0, top), say, title)
    return Drawing(figure, {"cells": [f"{names[place]}: {say(value)}" for place, value in cells.items()]})


def _corners(x: int, y: int) -> list[tuple[float, float]]:
    """Of a cell, with a gap around it."""
    half = 0.47
    return [(x - half, y - half), (x + half, y - half), (x + half, y + half), (x - half, y + half)]


def scale(figure: Figure, axes: Axes | list[Axes], ends: tuple[float, float], say: Say, title: str) -> None:
    """What the colours from one end to the other mean, above the axes."""
    low, high = ends
    shades = ScalarMappable(Normalize(low, high if high > low else low + 1), SHADES)
    bar = figure.colorbar(shades, ax=axes, location="top", shrink=0.5, aspect=26, anchor=(0.0, 0.0), pad=0.03)
    bar.outline.set_visible(False)
    ticks = np.linspace(low, high, 3)
    bar.set_ticks(ticks.tolist(), labels=[say(each) for each in ticks])
    bar.ax.tick_params(length=0, labelsize=11)
    bar.set_label(title, size=11.5, labelpad=6)


def surface(axes: Axes, x: Sequence[float], y: Sequence[float], z: Sequence[float], low: float, high: float) -> None:
    """Values at points on logarithmic axes, low ones in strong colours; smoothed between them, if there are enough."""
    shades = [heat(-value, -high, -low) for value in z]
    axes.scatter(x, y, s=130, c=PAPER, linewidths=0, zorder=3, clip_on=False)
    marks = axes.scatter(x, y, s=64, c=shades, edgecolors=INK, linewidths=1, zorder=3, clip_on=False)
    marks.set_gid("points")
    if len(set(x)) < ENOUGH or len(set(y)) < ENOUGH:
        return
    places = np.log2(np.stack([x, y], axis=1))  # (points, 2): a factor of 2 is a length of 1
    ends = np.stack([places.min(0), places.max(0)])
    columns, rows = (np.linspace(float(first), float(last), GRID_POINTS) for first, last in ends.T)
    grid = np.stack(np.meshgrid(columns, rows), axis=-1)  # (rows, columns, 2)
    smooth = smoothed(places, np.minimum(z, high), grid)
    levels = np.linspace(low, high, len(HEAT) + 1)
    axes.contourf(2**columns, 2**rows, np.clip(smooth, low, high), levels=levels, colors=HEAT[::-1])


def smoothed(places: Floats, values: Floats, grid: Floats) -> Floats:
    """Local linear regression; NaN where no point is near.

    places: (points, 2); values: (points,); grid: (..., 2) -> (...).
    """
    apart = places - grid[..., None, :]  # (..., points, 2)
    near = np.exp(-0.5 * (apart**2).sum(-1) / WIDTH**2)  # (..., points)
    ones = np.concatenate([np.ones((*apart.shape[:-1], 1)), apart], axis=-1)  # (..., points, 3)
    weighted = ones * near[..., None]
    squares = np.einsum("...pi,...pj->...ij", weighted, ones) + RIDGE * np.diag([0.0, 1.0, 1.0])
    sums = np.einsum("...pi,p->...i", weighted, values)
    found = np.linalg.solve(squares + 1e-9 * np.eye(3), sums[..., None])[..., 0, 0]
    return np.asarray(np.where(near.max(-1) > NEAR, found, np.nan))
