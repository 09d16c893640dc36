"""The trials of a search, and how they look: in their order, over their steps, by cost, by rate and rank."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from pydantic import BaseModel

from tailora.report import words
from tailora.report.charts import canvas, legend, log_axis, powers_axis, whole_numbers
from tailora.report.maps import scale, surface
from tailora.report.parts import Drawing, Picture
from tailora.report.standings import Apart
from tailora.report.svg import INK, PAPER, SERIES, SOFT

FEWEST = 4  # trials, for a surface
SPREAD = 0.8  # quantile of the losses at which colours end: those that failed say no more than that


class Trial(BaseModel):
    number: int
    state: str
    settings: dict[str, Any]
    eval_loss: float | None = None  # of a pruned one at its last evaluation
    trainable_parameters: int | None = None
    seconds: float | None = None
    curve: list[tuple[int, float]] = []
    message: str = ""

    @property
    def done(self) -> bool:
        return self.state == "done" and self.eval_loss is not None

    @property
    def loss(self) -> float:
        assert self.eval_loss is not None
        return self.eval_loss


class Finalist(BaseModel):
    number: int
    settings: dict[str, Any]
    trainable_parameters: int
    eval_loss: float
    interval: tuple[float, float] | None = None
    difference: Apart | None = None
    p_value: float | None = None
    seconds: float | None = None
    peak_memory_bytes: int | None = None

    @property
    def name(self) -> str:
        return f"trial {self.number}"


class Found(BaseModel):
    best: Finalist
    cheapest: Finalist
    finalists: list[Finalist] = []
    trials: list[Trial]
    importances: dict[str, float] = {}
    verdict: str
    base_loss: float
    steps: int
    seeds: list[int] = []
    judged_examples: int
    notes: list[str] = []
    settings: dict[str, Any] = {}
    seconds: float

    @property
    def done(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.done]

    @property
    def ceiling(self) -> float:
        """Losses above it, of runs that came apart, are drawn there: they would leave the others no room."""
        start = max([self.base_loss, *(trial.curve[0][1] for trial in self.trials if trial.curve)])
        best = min((trial.loss for trial in self.done), default=start)
        return start + max(0.3 * (start - best), 0.05)

    @property
    def margin(self) -> float | None:
        value = self.settings.get("search", {}).get("margin")
        return None if value is None else float(value)


def history(found: Found) -> Picture | None:
    if not found.done:
        return None
    best = min(found.done, key=lambda each: each.loss)
    return Picture(
        "history",
        partial(_draw_history, found),
        f"Loss of {len(found.trials)} trials in the order in which they began; the best, {best.loss:.3f}, is number "
        f"{best.number}.",
        "Loss of each trial on the examples that choose. Filled: ran to the end; hollow: ended early, at its last "
        "evaluation. Line: the best so far. What came apart is drawn at the top.",
        wide=True,
    )


def _draw_history(found: Found, width: float) -> Drawing:
    figure, axes = canvas(width, 300)
    done = found.done
    early = [each for each in found.trials if not each.done and each.eval_loss is not None]
    axes.step(
        [each.number for each in done],
        np.minimum.accumulate([each.loss for each in done]),
        where="post",
        color=SOFT,
        linewidth=1.3,
        label="best so far",
    )
    tips = {}
    for name, trials, face in (("ended early", early, PAPER), ("ran to the end", done, SERIES[0])):
        if trials:
            marks = axes.scatter(
                [each.number for each in trials], [min(each.loss, found.ceiling) for each in trials], s=46, c=face,
                edgecolors=SERIES[0], linewidths=1.4, label=name, zorder=3,
            )  # fmt: skip
            marks.set_gid(name.replace(" ", "-"))
            tips[name.replace(" ", "-")] = [_tip(each) for each in trials]
    for place, (chosen, name) in enumerate(((found.best, "best"), (found.cheapest, "cheapest"))):
        losses = [each.loss for each in done if each.number == chosen.number]
        axes.scatter(
            [chosen.number] * len(losses), losses, s=170 + 90 * place, facecolors="none", edgecolors=SERIES[1 + place],
            linewidths=2, label=name, zorder=4,
        )  # fmt: skip
    axes.set_xlabel("trial")
    axes.set_ylabel("loss, nats per token")
    whole_numbers(axes, "x")
    legend(figure, axes, 5 if width > 600 else 3)
    return Drawing(figure, tips)


def _tip(trial: Trial) -> str:
    settings = ", ".join(f"{name} {words.setting(value)}" for name, value in trial.settings.items())
    return f"trial {trial.number}: {trial.loss:.4f}, {trial.state}; {settings}"


def curves(found: Found) -> Picture | None:
    if not any(len(each.curve) > 1 for each in found.trials):
        return None
    return Picture(
        "trial-curves",
        partial(_draw_curves, found),
        f"Held-out loss of {len(found.trials)} trials over their steps; trial {found.best.number} is marked.",
        "Held-out loss over the steps; those in the worse half are ended early. Marked: the best.",
    )


def _draw_curves(found: Found, width: float) -> Drawing:
    figure, axes = canvas(width, 300)
    for trial in found.trials:
        best = trial.number == found.best.number
        if len(trial.curve) > 1:
            colour, thick = (SERIES[1], 2.6) if best else (SERIES[0], 1.2)
            steps, losses = zip(*trial.curve, strict=True)
            axes.plot(
                steps,
                np.minimum(losses, found.ceiling),
                color=colour,
                linewidth=thick,
                alpha=1 if best else 0.5,
                zorder=2 + best,
            )
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    whole_numbers(axes, "x")
    return Drawing(figure)


def cost(found: Found) -> Picture | None:
    trials = [each for each in found.done if each.trainable_parameters]
    if len(trials) < 2:
        return None
    return Picture(
        "cost",
        partial(_draw_cost, trials),
        f"Loss of {len(trials)} trials against how many parameters they train.",
        "Loss against trained parameters. The line joins those that nothing cheaper beats.",
    )


def _draw_cost(trials: Sequence[Trial], width: float) -> Drawing:
    figure, axes = canvas(width, 300)
    costs = [float(each.trainable_parameters or 1) for each in trials]
    front: list[tuple[float, float]] = []
    for cost, trial in sorted(zip(costs, trials, strict=True), key=lambda each: (each[0], each[1].loss)):
        if not front or trial.loss < front[-1][1]:
            front.append((cost, trial.loss))
    axes.plot(*zip(*front, strict=True), color=SERIES[1], linewidth=1.6)
    marks = axes.scatter(costs, [each.loss for each in trials], s=46, color=SERIES[0], edgecolors=PAPER, zorder=3)
    marks.set_gid("costs")
    log_axis(axes, "x", words.count)
    axes.set_xlabel("trained parameters")
    axes.set_ylabel("loss, nats per token")
    return Drawing(figure, {"costs": [_tip(each) for each in trials]})


# ---- rate and rank


def rates_and_ranks(found: Found) -> Picture | None:
    trials = [each for each in found.done if {"learning_rate", "r"} <= each.settings.keys()]
    if len(trials) < FEWEST:
        return None
    return Picture(
        "surface",
        partial(_draw_surface, trials, found.best.number),
        f"Loss of {len(trials)} trials by learning rate and rank.",
        "Loss by learning rate and rank; strong colours are low losses. Between the trials: smoothed, where there "
        "are enough of them. Ringed: the best.",
        wide=True,
    )


def _draw_surface(trials: Sequence[Trial], best: int, width: float) -> Drawing:
    figure, axes = canvas(width, 380)
    rates = [float(each.settings["learning_rate"]) for each in trials]
    ranks = [float(each.settings["r"]) for each in trials]
    losses = [each.loss for each in trials]
    low, high = min(losses), float(np.quantile(losses, SPREAD))
    high = high if high > low else low + 1e-3
    surface(axes, rates, ranks, losses, low, high)
    for each, rate, rank in zip(trials, rates, ranks, strict=True):
        if each.number == best:
            for thick, colour in ((5, PAPER), (2.2, INK)):
                axes.scatter([rate], [rank], s=230, facecolors="none", edgecolors=colour, linewidths=thick, zorder=4)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("rank")
    axes.use_sticky_edges = False
    axes.margins(0.06)
    log_axis(axes, "x")
    powers_axis(axes, "y", ranks)
    scale(figure, axes, (-high, -low), lambda number: f"{-number:.3f}", "loss, capped")
    return Drawing(figure, {"points": [_tip(each) for each in trials]})
