"""The page of a comparison."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.ticker import MaxNLocator
from pydantic import BaseModel

from tailora.report import words
from tailora.report.charts import bars, canvas, label, legend, log_axis
from tailora.report.curves import training
from tailora.report.parts import Drawing, Page, Picture, Points, Section, Table, Tile
from tailora.report.standings import Apart, Standing, differences, losses
from tailora.report.svg import PAPER, SERIES


class Arm(BaseModel):
    """One that could not be trained has an outcome other than 'done', and no numbers."""

    name: str
    changes: dict[str, Any] = {}
    outcome: str = "done"
    learning_rate: float | None = None
    rates: dict[float, float | None] = {}  # None for one that failed
    bracketed: bool = True
    eval_loss: float | None = None
    interval: tuple[float, float] | None = None
    difference: Apart | None = None
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    trainable_parameters: int | None = None
    bytes: int | None = None
    forgetting: dict[str, float] | None = None
    seed_losses: list[float] = []
    train_losses: list[list[float]] = []  # of each seed


class Comparison(BaseModel):
    arms: list[Arm]
    reference: str
    base_loss: float
    steps: int
    seeds: list[int]
    judged_examples: int
    verdict: str
    p_values: dict[str, float] = {}
    notes: list[str] = []
    settings: dict[str, Any] = {}
    seconds: float

    @property
    def done(self) -> list[Arm]:
        return [arm for arm in self.arms if arm.eval_loss is not None]

    @property
    def margin(self) -> float | None:
        """Nats per token that make no difference."""
        found = self.settings.get("compare", {}).get("margin")
        return None if found is None else float(found)


def compare_page(content: Mapping[str, Any]) -> Page:
    found = Comparison.model_validate(content)
    seeds = words.plural(len(found.seeds), "seed")
    standings = _standings(found)
    places = {arm.name: place for place, arm in enumerate(found.done)}
    judged = f"judged on {found.judged_examples:,} held-out examples that chose no learning rate"
    sections = [
        Section(
            "Which is better",
            f"Each arm at its own best learning rate, {found.steps:,} steps, {seeds}, {judged}.",
            [losses(standings, found.base_loss), differences(standings, found.reference, found.margin)],
        ),
        Section(
            "Training",
            "All arms saw the same examples in the same order.",
            [training({arm.name: arm.train_losses for arm in found.done}, places)],
        ),
        Section("What it costs", "Means over the seeds; memory is the most of any.", _costs(found)),
        Section(
            "What was forgotten",
            "How far each arm is from the base on text that the task did not ask for, beside what it learned.",
            [_forgetting(found), _other_text(found)],
        ),
        Section(
            "Learning rates tried",
            "An arm whose rate was not searched is no control. Judged on the other half of the held-out examples.",
            [_rates(found)],
        ),
        Section(
            "All numbers", "", [_quality(found), _cost(found), _rate_table(found), _settings(found), _notes(found)]
        ),
    ]
    title = (
        " against ".join(arm.name for arm in found.arms) if len(found.arms) == 2 else f"{len(found.arms)} arms compared"
    )
    return Page("compare", title, found.verdict, _tiles(found), sections)


def _tiles(found: Comparison) -> list[Tile]:
    tiles = [
        Tile(
            f"held-out loss, {label(arm.name, 20)}",
            f"{arm.eval_loss:.3f}",
            words.between(*(arm.interval or (None, None))),
        )
        for arm in found.done[:3]
    ]
    return [
        *tiles,
        Tile("held-out loss, base", f"{found.base_loss:.3f}", "before any training"),
        Tile("seeds", str(len(found.seeds)), f"{found.steps:,} steps each"),
        Tile("time in all", words.duration(found.seconds)),
    ]


def _standings(found: Comparison) -> list[Standing]:
    return [
        Standing(
            name=arm.name,
            loss=arm.eval_loss or 0.0,
            interval=arm.interval,
            apart=arm.difference,
            runs=arm.seed_losses,
        )
        for arm in found.done
    ]


# ---- what it costs


def _costs(found: Comparison) -> list[Picture]:
    columns = [
        ("seconds", "Time of training", words.duration),
        ("peak_memory_bytes", "Peak memory", words.size),
        ("trainable_parameters", "Trained parameters", words.count),
        ("bytes", "Size on disk", words.size),
    ]
    pictures = []
    for name, title, say in columns:
        values = {arm.name: float(getattr(arm, name)) for arm in found.done if getattr(arm, name) is not None}
        if values:
            said = ", ".join(f"{arm} {say(value)}" for arm, value in values.items())
            pictures.append(_bars(f"cost-{name.replace('_', '-')}", values, say, f"{title}: {said}.", f"{title}."))
    return pictures


def _bars(name: str, values: Mapping[str, float], say: Callable[[float], str], alt: str, caption: str) -> Picture:
    return Picture(name, lambda width: Drawing(bars(width, list(values), list(values.values()), say)), alt, caption)


# ---- what was forgotten


def _forgetting(found: Comparison) -> Picture | None:
    arms = [(place, arm) for place, arm in enumerate(found.done) if arm.forgetting]
    if not arms:
        return None
    said = "; ".join(f"{arm.name}: KL {(arm.forgetting or {})['kl']:.3f}, loss {arm.eval_loss:.3f}" for _, arm in arms)
    return Picture(
        "forgetting",
        partial(_draw_forgetting, arms),
        f"Held-out loss against distance from the base. {said}.",
        "Left: learned more. Low: forgot less. KL(base || tuned) in nats per token of the other text.",
    )


def _draw_forgetting(arms: Sequence[tuple[int, Arm]], width: float) -> Drawing:
    figure, axes = canvas(width, 300)
    for place, arm in arms:
        axes.plot(
            [arm.eval_loss or 0.0],
            [(arm.forgetting or {})["kl"]],
            "o",
            color=SERIES[place % 8],
            markersize=11,
            markeredgecolor=PAPER,
            label=label(arm.name, 20),
        )
    axes.set_xlabel("held-out loss, nats per token")
    axes.set_ylabel("KL, nats per token")
    axes.margins(x=0.15, y=0.2)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    legend(figure, axes)
    return Drawing(figure)


def _other_text(found: Comparison) -> Picture | None:
    rises = {
        arm.name: arm.forgetting["loss_after"] - arm.forgetting["loss_before"]
        for arm in found.done
        if arm.forgetting and "loss_after" in arm.forgetting
    }
    if not rises:
        return None
    said = ", ".join(f"{name} {rise:+.3f}" for name, rise in rises.items())
    caption = "How much the loss on that text rose, nats per token."
    return _bars("other-text", rises, words.signed, f"Rise of the loss on other text: {said}.", caption)


# ---- learning rates


def _rates(found: Comparison) -> Picture | None:
    tried = [arm for arm in found.arms if any(loss is not None for loss in arm.rates.values())]
    if not tried:
        return None
    said = "; ".join(f"{arm.name} best at {words.rate(arm.learning_rate)}" for arm in tried if arm.learning_rate)
    edge = [arm.name for arm in tried if not arm.bracketed]
    caption = "Held-out loss at each rate tried; the filled ones were taken."
    if edge:
        caption += f" The best of {', '.join(edge)} lies at the edge of those tried."
    return Picture("rates", partial(_draw_rates, tried), f"Loss against learning rate. {said}.", caption, wide=True)


def _draw_rates(arms: Sequence[Arm], width: float) -> Drawing:
    figure, axes = canvas(width, 310)
    for place, arm in enumerate(arms):
        points = sorted((rate, loss) for rate, loss in arm.rates.items() if loss is not None)
        colour = SERIES[place % 8]
        axes.plot(
            *zip(*points, strict=True), "o-", color=colour, markerfacecolor=PAPER, markersize=7, label=label(arm.name)
        )
        best = [(rate, loss) for rate, loss in points if rate == arm.learning_rate]
        axes.plot(*zip(*best, strict=True), "o", color=colour, markersize=10)
    log_axis(axes, "x")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss, nats per token")
    legend(figure, axes)
    return Drawing(figure)


# ---- all numbers


def _quality(found: Comparison) -> Table:
    heads = ("arm", "rate", "loss", "95% interval", f"− {label(found.reference, 18)}", "95% interval", "p")
    return Table(heads, [_judged(arm, found.p_values.get(arm.name)) for arm in found.done])


def _judged(arm: Arm, p_value: float | None) -> list[str]:
    apart = arm.difference
    return [
        arm.name,
        "" if arm.learning_rate is None else words.rate(arm.learning_rate),
        f"{arm.eval_loss:.4f}",
        words.between(*(arm.interval or (None, None))),
        words.signed(apart.value, 4) if apart else "",
        f"{words.signed(apart.low)} to {words.signed(apart.high)}" if apart else "",
        "" if p_value is None else words.p_value(p_value),
    ]


def _cost(found: Comparison) -> Table:
    heads = ("arm", "training", "peak memory", "trained", "on disk", "KL")
    return Table(heads, [_spent(arm) for arm in found.done])


def _spent(arm: Arm) -> list[str]:
    return [
        arm.name,
        "" if arm.seconds is None else words.duration(arm.seconds),
        "" if arm.peak_memory_bytes is None else words.size(arm.peak_memory_bytes),
        "" if arm.trainable_parameters is None else words.count(arm.trainable_parameters),
        "" if arm.bytes is None else words.size(arm.bytes),
        f"{arm.forgetting['kl']:.3f}" if arm.forgetting else "",
    ]


def _rate_table(found: Comparison) -> Table | None:
    rows = [
        [arm.name, words.rate(rate), "failed" if loss is None else f"{loss:.4f}"]
        for arm in found.arms
        for rate, loss in sorted(arm.rates.items())
    ]
    return Table(("arm", "rate", "loss"), rows, folded="Learning rates tried") if rows else None


def _settings(found: Comparison) -> Table | None:
    rows = [[f"{arm.name}:", name, words.value(each)] for arm in found.arms for name, each in arm.changes.items()]
    rows += [
        [part, name, words.value(each)]
        for part, content in found.settings.items()
        for name, each in content.items()
        if name != "arms"
    ]
    return Table(("", "setting", "value"), rows, words=3, folded="Settings") if rows else None


def _notes(found: Comparison) -> Points | None:
    failed = [f"{arm.name}: {arm.outcome}" for arm in found.arms if arm.eval_loss is None]
    return Points([*failed, *found.notes]) if failed or found.notes else None
