"""The page of a comparison."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from tailora.report.blocks import Column, Figure, Number, Page, Section, Table, settings_table
from tailora.report.colours import PAPER, SERIES
from tailora.report.format import count, duration, interval, learning_rate, one_line, p_value, plural, signed
from tailora.report.pages.losses import JudgedLoss, differences_figure, losses_figure
from tailora.study.results import ArmResult, Comparison
from tailora.train.memory import format_bytes

if TYPE_CHECKING:  # matplotlib is an optional package
    from tailora.report.charts import Canvas

COSTS: list[tuple[str, str, Callable[[float], str]]] = [  # attribute of an arm, title, how it is written
    ("seconds", "Time of training", duration),
    ("peak_memory_bytes", "Peak memory", format_bytes),
    ("trainable_parameters", "Trained parameters", count),
    ("bytes", "Size on disk", format_bytes),
]


def compare_page(comparison: Comparison) -> Page:
    arms = [arm for arm in comparison.arms if arm.eval_loss is not None]
    judged = f"judged on {comparison.judged_examples:,} held-out examples that chose no learning rate"
    rows = [JudgedLoss(arm.name, arm.eval_loss or 0.0, arm.interval, arm.difference, arm.seed_losses) for arm in arms]
    margin = comparison.settings.get("compare", {}).get("margin")
    sections = [
        Section(
            "Which is better",
            f"Each arm at its own best learning rate, {plural(comparison.steps, 'step')}, "
            f"{plural(len(comparison.seeds), 'seed')}, {judged}.",
            [
                losses_figure(rows, comparison.base_loss),
                differences_figure(rows, comparison.reference, margin),
                _loss_table(comparison, arms),
            ],
        ),
        Section("Training", "All arms saw the same examples in the same order.", [_training(arms)]),
        Section(
            "What it costs",
            "Means over the seeds; memory is the highest of all.",
            [*_cost_figures(arms), _cost_table(arms)],
        ),
        Section(
            "What was forgotten",
            "How far each arm is from the base on text of other tasks, beside what it learned.",
            [_forgetting(arms), _other_text(arms)],
        ),
        Section(
            "Learning rates tried",
            "An arm whose learning rate was not searched is no control. Losses are those of the other half of the "
            "held-out examples.",
            [_rates_figure(comparison.arms), _rates_table(comparison.arms)],
        ),
        Section("Settings", "", [_settings(comparison)]),
    ]
    names = [arm.name for arm in comparison.arms]
    title = " against ".join(names) if len(names) == 2 else f"{len(names)} arms compared"
    failed = [f"{arm.name}: {arm.outcome}" for arm in comparison.arms if arm.eval_loss is None]
    notes = [*failed, *comparison.notes]
    return Page("compare", title, comparison.verdict, _numbers(comparison, arms), sections, notes)


def _numbers(comparison: Comparison, arms: Sequence[ArmResult]) -> list[Number]:
    losses = []
    for arm in arms[:3]:
        name = f"held-out loss, {one_line(arm.name, 20)}"
        losses.append(Number(name, f"{arm.eval_loss:.3f}", _ends(arm), detail="page"))
    return [
        *losses,
        Number("held-out loss, base", f"{comparison.base_loss:.3f}", "before any training"),
        Number("seeds", str(len(comparison.seeds)), f"{plural(comparison.steps, 'step')} each", detail="page"),
        Number("time of all runs", duration(comparison.seconds)),
    ]


def _ends(arm: ArmResult) -> str:
    return interval(*(arm.interval or (None, None)))


# ---- Losses


def _loss_table(comparison: Comparison, arms: Sequence[ArmResult]) -> Table:
    columns = [
        Column("arm"),
        Column("learning rate", numeric=True),
        Column("held-out loss", numeric=True),
        Column("95% interval", numeric=True, interval=True),
        Column(f"- {comparison.reference}", numeric=True),
        Column("95% interval", numeric=True, interval=True),
        Column("p", numeric=True, priority=1),
    ]
    rows = []
    for arm in arms:
        difference, p = arm.difference, comparison.p_values.get(arm.name)
        rate = "" if arm.learning_rate is None else learning_rate(arm.learning_rate)
        rows.append(
            [
                arm.name,
                rate if arm.bracketed else f"{rate} (edge)",
                f"{arm.eval_loss:.3f}",
                _ends(arm),
                signed(difference.value) if difference else "",
                f"{signed(difference.low)} to {signed(difference.high)}" if difference else "",
                "" if p is None else p_value(p),
            ]
        )
    return Table(columns, rows)


def _training(arms: Sequence[ArmResult]) -> Figure | None:
    runs = {arm.name: [losses for losses in arm.train_losses if losses] for arm in arms}
    values = "; ".join(f"{name} from {own[0][0]:.3f} to {own[0][-1]:.3f}" for name, own in runs.items() if own)
    if not values:
        return None
    return Figure(
        "training",
        partial(_draw_training, runs),
        f"Line chart of training losses. {values}.",
        "Loss of each step's examples before the step, in nats per token. Thin lines: each seed. Thick lines: running "
        "mean of all seeds.",
        wide=True,
    )


def _draw_training(runs: Mapping[str, Sequence[Sequence[float]]], canvas: "Canvas") -> None:
    axes = canvas.new_axes(310, "step", "loss, nats per token")
    for number, (name, own) in enumerate(runs.items()):
        if own:
            canvas.losses(own, SERIES[number % len(SERIES)], one_line(name, 28))
    canvas.whole_numbers("x")
    axes.margins(x=0.02)
    canvas.legend()


# ---- Costs


def _cost_figures(arms: Sequence[ArmResult]) -> list[Figure]:
    figures = []
    for name, title, show in COSTS:
        values = {arm.name: float(getattr(arm, name)) for arm in arms if getattr(arm, name) is not None}
        if values:
            figures.append(_bars(f"cost-{name.replace('_', '-')}", values, show, title, f"{title}."))
    return figures


def _bars(name: str, values: Mapping[str, float], show: Callable[[float], str], title: str, caption: str) -> Figure:
    listed = ", ".join(f"{arm} {show(value)}" for arm, value in values.items())
    return Figure(name, lambda canvas: canvas.bars(values, show), f"{title}: {listed}.", caption)


def _cost_table(arms: Sequence[ArmResult]) -> Table:
    names = ("training", "peak memory", "trained", "on disk", "KL from base")
    rows = []
    for arm in arms:
        values = [getattr(arm, name) for name, _, _ in COSTS]
        cells = ["" if value is None else show(value) for value, (_, _, show) in zip(values, COSTS, strict=True)]
        rows.append([arm.name, *cells, f"{arm.forgetting['kl']:.3f}" if arm.forgetting else ""])
    note = "KL: nats per token, on text of other tasks; how much was forgotten." if any(row[-1] for row in rows) else ""
    return Table([Column("arm"), *(Column(name, numeric=True) for name in names)], rows, note=note)


# ---- What was forgotten


def _forgetting(arms: Sequence[ArmResult]) -> Figure | None:
    points = [(number, arm.name, arm.eval_loss or 0.0, arm.forgetting) for number, arm in enumerate(arms)]
    known = [(number, name, loss, lost["kl"]) for number, name, loss, lost in points if lost]
    if not known:
        return None
    values = "; ".join(f"{name}: KL {kl:.3f}, loss {loss:.3f}" for _, name, loss, kl in known)
    return Figure(
        "forgetting",
        partial(_draw_forgetting, known),
        f"Held-out loss against distance from the base. {values}.",
        "Further left: learned more. Lower: forgot less. KL(base || tuned) in nats per token of the other text.",
    )


def _draw_forgetting(points: Sequence[tuple[int, str, float, float]], canvas: "Canvas") -> None:
    axes = canvas.new_axes(300, "held-out loss, nats per token", "KL, nats per token")
    for number, name, loss, kl in points:
        colour, text = SERIES[number % len(SERIES)], one_line(name, 20)
        axes.plot([loss], [kl], "o", color=colour, markersize=11, markeredgecolor=PAPER, label=text)
    axes.margins(x=0.15, y=0.2)
    axes.set_ylim(bottom=0)
    axes.locator_params("x", nbins=5)
    canvas.legend()


def _other_text(arms: Sequence[ArmResult]) -> Figure | None:
    rises = {
        arm.name: arm.forgetting["loss_after"] - arm.forgetting["loss_before"]
        for arm in arms
        if arm.forgetting and "loss_after" in arm.forgetting
    }
    if not rises:
        return None
    caption = "By how much the loss on that text rose, nats per token."
    return _bars("other-text", rises, signed, "Rise of the loss on other text", caption)


# ---- Learning rates


def _losses_of_rates(arm: ArmResult) -> dict[float, float]:
    """Of the runs that did not fail."""
    return {rate: loss for rate, loss in sorted(arm.rates.items()) if loss is not None and math.isfinite(loss)}


def _rates_figure(arms: Sequence[ArmResult]) -> Figure | None:
    tried = [arm for arm in arms if _losses_of_rates(arm)]
    if not tried:
        return None
    best = "; ".join(f"{arm.name} best at {learning_rate(arm.learning_rate)}" for arm in tried if arm.learning_rate)
    at_edge = [arm.name for arm in tried if not arm.bracketed]
    caption = "Held-out loss at each learning rate tried; filled: the one taken."
    if at_edge:
        caption += f" The best of {', '.join(at_edge)} lies at the edge of those tried."
    return Figure("rates", partial(_draw_rates, tried), f"Loss against learning rate. {best}.", caption, wide=True)


def _draw_rates(arms: Sequence[ArmResult], canvas: "Canvas") -> None:
    axes = canvas.new_axes(310, "learning rate", "loss, nats per token")
    for number, arm in enumerate(arms):
        losses, colour = _losses_of_rates(arm), SERIES[number % len(SERIES)]
        style: dict[str, Any] = {"color": colour, "markerfacecolor": PAPER, "markersize": 7}
        axes.plot(list(losses), list(losses.values()), "o-", label=one_line(arm.name, 28), **style)
        best = {rate: loss for rate, loss in losses.items() if rate == arm.learning_rate}
        axes.plot(list(best), list(best.values()), "o", color=colour, markersize=10)
    canvas.log_axis("x")
    canvas.legend()


def _rates_table(arms: Sequence[ArmResult]) -> Table | None:
    losses = {arm.name: _losses_of_rates(arm) for arm in arms}
    rows = [
        [arm.name, learning_rate(rate), f"{losses[arm.name][rate]:.4f}" if rate in losses[arm.name] else "failed"]
        for arm in arms
        for rate in sorted(arm.rates)
    ]
    columns = [Column("arm"), Column("learning rate", numeric=True), Column("loss", numeric=True)]
    return Table(columns, rows, "Learning rates tried", folded=True, detail="page") if rows else None


def _settings(comparison: Comparison) -> Table | None:
    own = [(f"{arm.name}:", arm.changes) for arm in comparison.arms]
    shared = [
        (part, {name: value for name, value in settings.items() if name != "arms"})
        for part, settings in comparison.settings.items()
    ]
    return settings_table("Settings", *own, *shared)
