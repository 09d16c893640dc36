"""The page of a search, and of `search --lr-only`."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tailora.report.blocks import Block, Code, Column, Figure, Number, Page, Paragraph, Section, Table
from tailora.report.charts import DASHED, PAPER, SERIES, SOFT, Canvas, Estimate
from tailora.report.format import count, duration, interval, learning_rate, one_line, plural, setting
from tailora.report.pages.shared import INTERVAL, difference_cells, loss_figures, numeric, settings_table, train_command
from tailora.study.lr_range import RateRange
from tailora.study.results import Candidate, Measure, SearchResult
from tailora.study.trial import DONE
from tailora.study.verdict import loss_of
from tailora.train.memory import format_bytes

SHOWN_TRIALS = 12  # in the terminal
FEWEST_FOR_SLICES = 5  # trials
FEW_VALUES = 7  # a numeric setting with at most this many values gets a tick for each
WIDE_RANGE = 8  # the axis is logarithmic from this ratio of the largest to the smallest value


def search_page(search: SearchResult) -> Page:
    best, cheapest, measure = search.best, search.cheapest, search.measure
    done = [trial for trial in search.trials if trial.state == DONE and trial.eval_loss is not None]
    ended = len(search.trials) - len(done)
    settings = [(part, values) for part, values in search.settings.items() if isinstance(values, dict)]
    all_trials = _table_of_trials(search.trials, measure.name, "All trials", folded=True, detail="page")
    ranked = sorted(search.importances.items(), key=lambda item: -item[1])
    importances = Paragraph(", ".join(f"{name} {value:.0%}" for name, value in ranked) + ".")
    sections = [
        Section(
            "The finalists",
            f"Trained again with {plural(len(search.seeds), 'new seed')} and evaluated on {search.judged_examples:,} "
            "held-out examples that were not used to choose trials.",
            _finalists(search),
        ),
        Section(
            "The trials",
            f"{plural(len(done), 'trial')} of {plural(search.steps, 'step')} finished, {ended:,} stopped early. "
            f"{measure.names.capitalize()} are measured on the held-out examples used to choose trials.",
            _trials(search, done),
        ),
        Section(
            "Which settings matter",
            "Importance: how well a setting predicts whether a trial is among the best quarter (PED-ANOVA).",
            [importances if ranked else None, *_slices(done, measure)],
        ),
        Section("All trials and settings", "", [all_trials, settings_table("Settings", *settings)]),
    ]
    numbers = [
        Number(
            f"held-out {measure.name}, trial {best.number} (best)", f"{best.eval_loss:.3f}", interval(best.interval)
        ),
        Number(f"held-out {measure.name}, base", f"{search.base_loss:.3f}", "before training"),
        Number("trained, cheapest trial", count(cheapest.trainable_parameters), "parameters"),
        Number("trials", str(len(search.trials)), f"{plural(search.steps, 'step')} each", "page"),
        Number("total time", duration(search.seconds)),
    ]
    train = train_command(search.settings)
    commands = [f"{train} --config {search.config}  # the best"]
    if cheapest.number != best.number:
        label = f"held-out {measure.name}, trial {cheapest.number} (cheapest)"
        numbers.insert(1, Number(label, f"{cheapest.eval_loss:.3f}", interval(cheapest.interval)))
        path = Path(search.config).with_name("cheapest.yaml")
        commands.append(f"{train} --config {path}  # the cheapest")
    conclusion = Section("Train with the result", "", [Code("\n".join(commands))])
    title = f"Search over {plural(len(search.trials), 'trial')}"
    return Page("search", title, search.verdict, numbers, sections, search.notes, conclusion)


def _finalists(search: SearchResult) -> list[Block | None]:
    names = {finalist.number: f"trial {finalist.number}" for finalist in search.finalists}
    losses = [Estimate(names[trial.number], trial.eval_loss, trial.interval) for trial in search.finalists]
    differences = {names[trial.number]: trial.difference for trial in search.finalists}
    margin = search.settings.get("search", {}).get("margin")
    best = names[search.best.number]
    figures = loss_figures(losses, search.base_loss, differences, best, margin, search.loss_unit)
    columns = [*numeric("trial", f"held-out {search.measure.name}"), INTERVAL, *numeric("- best"), INTERVAL]
    columns += numeric("p", "trained", "time", "peak memory")
    rows = []
    for trial in search.finalists:
        difference = difference_cells(trial.difference, trial.p_value, "best")
        costs = count(trial.trainable_parameters), duration(trial.seconds), format_bytes(trial.peak_memory_bytes)
        rows.append([str(trial.number), f"{trial.eval_loss:.3f}", interval(trial.interval), *difference, *costs])
    if search.cheapest.number == search.best.number:
        names[search.best.number] += " (best and cheapest)"
    else:
        names[search.best.number] += " (best)"
        names[search.cheapest.number] += " (cheapest)"
    settings = dict.fromkeys(name for finalist in search.finalists for name in finalist.settings)
    side_by_side = [[name, *(setting(trial.settings.get(name)) for trial in search.finalists)] for name in settings]
    return [*figures, Table(columns, rows), Table([Column("setting"), *map(Column, names.values())], side_by_side)]


# ---- Trials


def _table_of_trials(trials: Sequence[Candidate], name: str, title: str, **options: Any) -> Table:
    names = list(dict.fromkeys(name for trial in trials for name in trial.settings))
    columns = numeric("trial", name, "trained", "time")
    columns += [Column(name, priority=1) for name in ("state", *names)]
    rows = [
        [
            str(trial.number),
            "" if trial.eval_loss is None else f"{trial.eval_loss:.4f}",
            "" if trial.trainable_parameters is None else count(trial.trainable_parameters),
            "" if trial.seconds is None else duration(trial.seconds),
            trial.state,
            *(setting(trial.settings.get(name)) for name in names),
        ]
        for trial in trials
    ]
    return Table(columns, rows, title, rest="settings", **options)


def _trials(search: SearchResult, done: Sequence[Candidate]) -> list[Block | None]:
    # Diverged runs are drawn at this loss; their own would squash all others
    sign = search.measure.sign
    start = max([sign * search.base_loss, *(sign * trial.curve[0][1] for trial in search.trials if trial.curve)])
    highest = start + max(0.3 * (start - min((sign * loss_of(trial) for trial in done), default=start)), 0.05)
    best = sorted(done, key=lambda trial: sign * loss_of(trial))[:SHOWN_TRIALS]
    more = f" {len(best)} of {len(done)}" if len(best) < len(done) else ""
    table = _table_of_trials(best, search.measure.name, f"The best trials{more}") if best else None
    return [_history(search, done, highest), _curves(search, highest), _cost(search, done), table]


def _history(search: SearchResult, done: Sequence[Candidate], highest: float) -> Figure | None:
    if not done:
        return None
    measure, sign = search.measure, search.measure.sign

    def draw(canvas: Canvas) -> None:
        axes = canvas.new_axes(300, "trial", measure.label(search.loss_unit), whole_numbers="x")
        canvas.legend_columns = 5 if canvas.wide else 3
        early = [trial for trial in search.trials if trial not in done and trial.eval_loss is not None]
        best_so_far = sign * np.minimum.accumulate([sign * loss_of(trial) for trial in done])
        numbers = [trial.number for trial in done]
        axes.step(numbers, best_so_far, where="post", color=SOFT, linewidth=1.3, label="best so far")
        marks: dict[str, Any] = {"s": 46, "edgecolors": SERIES[0], "linewidths": 1.4, "zorder": 3}
        for name, trials, face in (("stopped early", early, PAPER), ("finished", done, SERIES[0])):
            if trials:
                shown = [sign * min(sign * loss_of(trial), highest) for trial in trials]
                axes.scatter([trial.number for trial in trials], shown, c=face, label=name, **marks)
        rings: dict[str, Any] = {"facecolors": "none", "linewidths": 2, "zorder": 4}
        for number, (finalist, name) in enumerate(((search.best, "best"), (search.cheapest, "cheapest"))):
            losses = [loss_of(trial) for trial in done if trial.number == finalist.number]
            x, colour = [finalist.number] * len(losses), SERIES[1 + number]
            axes.scatter(x, losses, s=170 + 90 * number, edgecolors=colour, label=name, **rings)

    best = min(done, key=lambda trial: sign * loss_of(trial))
    alt = (
        f"{measure.name.capitalize()} of {len(search.trials)} trials in the order in which they started; the best, "
        f"{loss_of(best):.3f}, is trial {best.number}."
    )
    caption = (
        f"{measure.name.capitalize()} of each trial. Filled: finished. Hollow: stopped early, at its last evaluation. "
        f"Line: the best so far. Diverged trials are drawn at the {'top' if sign > 0 else 'bottom'}."
    )
    return Figure("history", draw, alt, caption, wide=True)


def _curves(search: SearchResult, highest: float) -> Figure | None:
    trials, sign = [trial for trial in search.trials if len(trial.curve) > 1], search.measure.sign

    def draw(canvas: Canvas) -> None:
        axes = canvas.new_axes(300, "step", search.measure.label(search.loss_unit), whole_numbers="x")
        for trial in trials:
            best = trial.number == search.best.number
            width, alpha = (2.6, 1.0) if best else (1.2, 0.5)
            steps, losses = zip(*trial.curve, strict=True)
            shown = sign * np.minimum(sign * np.array(losses), highest)
            axes.plot(steps, shown, color=SERIES[best], linewidth=width, alpha=alpha, zorder=2 + best)

    name = f"Held-out {search.measure.name}"
    alt = f"{name} of {len(search.trials)} trials over their steps; trial {search.best.number} is highlighted."
    caption = f"{name} over the steps; trials in the worse half are stopped early. Highlighted: the best."
    return Figure("trial-curves", draw, alt, caption) if trials else None


def _cost(search: SearchResult, done: Sequence[Candidate]) -> Figure | None:
    trials, sign = [trial for trial in done if trial.trainable_parameters], search.measure.sign

    def draw(canvas: Canvas) -> None:
        axes = canvas.new_axes(300, "trained parameters", search.measure.label(search.loss_unit))
        points = [(float(trial.trainable_parameters or 1), loss_of(trial)) for trial in trials]
        front: list[tuple[float, float]] = []
        for cost, loss in sorted(points, key=lambda point: (point[0], sign * point[1])):
            if not front or sign * loss < sign * front[-1][1]:
                front.append((cost, loss))
        axes.plot(*zip(*front, strict=True), color=SERIES[1], linewidth=1.6)
        axes.plot(*zip(*points, strict=True), "o", color=SERIES[0], markersize=7, markeredgecolor=PAPER)
        canvas.log_axis("x", count)

    name = search.measure.name.capitalize()
    alt = f"{name} of {len(trials)} trials against the number of parameters that they train."
    caption = f"{name} against trained parameters. The line joins the trials that no cheaper trial beats."
    return Figure("cost", draw, alt, caption) if len(trials) > 1 else None


# ---- Settings


def _slices(done: Sequence[Candidate], measure: Measure) -> list[Figure]:
    """Returns a figure of the loss or reward against each setting that differs among the trials."""
    if len(done) < FEWEST_FOR_SLICES:
        return []
    names = dict.fromkeys(name for trial in done for name in trial.settings)
    figures = []
    for number, name in enumerate(names):
        points = [(trial.settings[name], loss_of(trial)) for trial in done if name in trial.settings]
        if len({setting(value) for value, _ in points}) > 1:
            what, draw = measure.name.capitalize(), partial(_draw_slice, points, measure.name)
            alt = f"{what} of {len(points)} trials against {name}."
            figures.append(Figure(f"slice-{number}", draw, alt, f"{what} of each trial by {name}."))
    return figures


def _draw_slice(points: Sequence[tuple[Any, float]], label: str, canvas: Canvas) -> None:
    axes = canvas.new_axes(220, "", label)
    values, losses = [value for value, _ in points], [loss for _, loss in points]
    are_numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    names = list(dict.fromkeys(map(setting, sorted(values) if are_numbers else values)))
    named = not are_numbers or len(names) <= FEW_VALUES
    x = [names.index(setting(value)) for value in values] if named else values
    axes.scatter(x, losses, s=40, color=SERIES[0], alpha=0.75, edgecolors=PAPER, linewidths=1)
    if named:
        axes.set_xticks(range(len(names)), [one_line(name, 64 // len(names)) for name in names])
        axes.set_xlim(-0.5, len(names) - 0.5)
    elif min(values) > 0 and max(values) >= WIDE_RANGE * min(values):
        canvas.log_axis("x")


# ---- search --lr-only: the held-out loss while the learning rate rises


def lr_range_page(rates: RateRange) -> Page:
    suggestion = learning_rate(rates.suggestion)
    lowest = f"{rates.base_loss - rates.gain:.3f}"
    top = rates.base_loss + 0.6 * rates.gain

    def draw(canvas: Canvas) -> None:
        axes = canvas.new_axes(320, "learning rate", f"held-out loss, {rates.loss_unit}")
        axes.plot(*zip(*rates.curve, strict=True), "o-", color=SERIES[0], markersize=5, linewidth=2)
        axes.axhline(rates.base_loss, color=SOFT, linewidth=1.2, linestyle=DASHED)
        axes.axvline(rates.suggestion, color=SERIES[1], linewidth=2, label="suggested")
        axes.set_ylim(rates.base_loss - 1.15 * rates.gain, top)
        canvas.log_axis("x")

    alt = f"Held-out loss against the learning rate, from {rates.base_loss:.3f} down to {lowest} at {suggestion}."
    caption = "Dashed line: the base model. Losses above the top of the figure are not shown."
    figure = Figure("rates", draw, alt, caption, wide=True)
    rows = [[learning_rate(rate), f"{loss:.4f}"] for rate, loss in rates.curve]
    table = Table(numeric("learning rate", "held-out loss"), rows, "All losses", folded=True)
    sections = [
        Section(
            "Loss while the learning rate rises",
            "One run, each step at a higher learning rate. The loss is always measured on the same held-out examples.",
            [figure, table],
        ),
        Section("Settings", "", [settings_table("Settings", ("", rates.settings.get("train", {})))]),
    ]
    numbers = [
        Number("suggested learning rate", suggestion),
        Number("lowest loss", lowest, f"at {suggestion}"),
        Number("held-out loss, base", f"{rates.base_loss:.3f}", "before training"),
        Number("steps", f"{rates.steps:,}"),
    ]
    command = Code(f"--learning-rate {rates.suggestion:.1e}")
    conclusion = Section("Train with it", "Add this to the command of your run:", [command])
    return Page("learning rates", "Learning rates", rates.verdict, numbers, sections, conclusion=conclusion)
