"""Losses over the steps of training: thin as they were, thick smoothed."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from tailora.report.charts import canvas, label, legend, whole_numbers
from tailora.report.parts import Drawing, Picture
from tailora.report.svg import SERIES

FEW = 8  # steps, which are drawn as they are

Floats = NDArray[np.float64]


def running_mean(values: Floats) -> Floats:
    """Over about a tenth of the run, less at its ends."""
    half = max(1, len(values) // 20)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    low, high = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return np.asarray((sums[high] - sums[low]) / (high - low))


def draw_losses(axes: Axes, runs: Sequence[Sequence[float]], colour: str, name: str) -> None:
    """runs: losses of each step from the first on; smoothed is their mean, as far as all of them go."""
    if max(map(len, runs)) <= FEW:
        for run in runs:
            axes.plot(range(1, len(run) + 1), run, color=colour, label=name if run is runs[0] else "")
        return
    for run in runs:
        axes.plot(range(1, len(run) + 1), run, color=colour, linewidth=1, alpha=0.4 if len(runs) == 1 else 0.25)
    shared = min(map(len, runs))
    mean = np.mean([run[:shared] for run in runs], axis=0)
    axes.plot(range(1, shared + 1), running_mean(mean), color=colour, label=name)


def training(arms: Mapping[str, Sequence[Sequence[float]]], places: Mapping[str, int]) -> Picture | None:
    """arms: name -> losses of each run.    places: name -> which colour it has on the page."""
    held = {name: own for name, runs in arms.items() if (own := [run for run in runs if run])}
    if not held:
        return None
    said = "; ".join(f"{name} from {runs[0][0]:.3f} to {runs[0][-1]:.3f}" for name, runs in held.items())
    return Picture(
        "training",
        partial(_draw, held, places),
        f"Line chart of training losses. {said}.",
        "Loss of each step's examples before the step, in nats per token. Thin: each seed. Thick: running mean of all.",
        wide=True,
    )


def _draw(arms: Mapping[str, Any], places: Mapping[str, int], width: float) -> Drawing:
    figure, axes = canvas(width, 310)
    for name, runs in arms.items():
        draw_losses(axes, runs, SERIES[places[name] % len(SERIES)], label(name))
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    whole_numbers(axes, "x")
    axes.margins(x=0.02)
    legend(figure, axes)
    return Drawing(figure)
