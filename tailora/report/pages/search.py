"""The page of a search."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tailora.report.blocks import Block, Code, Column, Figure, Number, Page, Section, Table
from tailora.report.charts import PAPER, SERIES, Canvas
from tailora.report.format import count, duration, interval, plural, setting
from tailora.report.pages.shared import (
    INTERVAL,
    difference_cells,
    further_tables,
    numeric,
    settings_table,
    train_command,
)
from tailora.study.comparison_verdict import loss_of
from tailora.study.results import Candidate, SearchResult
from tailora.study.trial import DONE
from tailora.train.memory import format_bytes


def search_page(search: SearchResult) -> Page:
    best, cheapest, measure = search.best, search.cheapest, search.measure
    done = [trial for trial in search.trials if trial.state == DONE and trial.eval_loss is not None]
    ended = len(search.trials) - len(done)
    settings = [(part, values) for part, values in search.settings.items() if isinstance(values, dict)]
    trials = (
        f"{plural(len(done), 'trial')} of {plural(search.steps, 'step')} finished, {ended:,} stopped early. "
        f"{measure.names.capitalize()} are measured on the held-out examples used to choose trials."
    )
    if ranked := sorted(search.importances.items(), key=lambda item: -item[1]):
        trials += " How well each setting predicts whether a trial is among the best quarter (PED-ANOVA): "
        trials += ", ".join(f"{name} {value:.0%}" for name, value in ranked) + "."
    sections = [
        Section(
            "The finalists",
            f"Trained again with {plural(len(search.seeds), 'new seed')} and evaluated on {search.judged_examples:,} "
            "held-out examples that were not used to choose trials.",
            _finalists(search),
        ),
        Section("The trials", trials, [_cost(search, done), _all_trials(search)]),
        Section("Settings", "", [settings_table("Settings", *settings)]),
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
    columns = [*numeric("trial", f"held-out {search.measure.name}"), INTERVAL, *numeric("- best"), INTERVAL]
    columns += numeric("p", "trained", "time", "peak memory")
    rows = []
    for trial in search.finalists:
        difference = difference_cells(trial.difference, trial.p_value, "best")
        costs = count(trial.trainable_parameters), duration(trial.seconds), format_bytes(trial.peak_memory_bytes)
        rows.append([str(trial.number), f"{trial.eval_loss:.3f}", interval(trial.interval), *difference, *costs])
    names = {finalist.number: f"trial {finalist.number}" for finalist in search.finalists}
    if search.cheapest.number == search.best.number:
        names[search.best.number] += " (best and cheapest)"
    else:
        names[search.best.number] += " (best)"
        names[search.cheapest.number] += " (cheapest)"
    settings = dict.fromkeys(name for finalist in search.finalists for name in finalist.settings)
    side_by_side = [[name, *(setting(trial.settings.get(name)) for trial in search.finalists)] for name in settings]
    further = further_tables({names[finalist.number]: finalist.further for finalist in search.finalists}, "best")
    return [Table(columns, rows), *further, Table([Column("setting"), *map(Column, names.values())], side_by_side)]


def _all_trials(search: SearchResult) -> Table:
    names = list(dict.fromkeys(name for trial in search.trials for name in trial.settings))
    columns = numeric("trial", search.measure.label, "trained", "time")
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
        for trial in search.trials
    ]
    return Table(columns, rows, "All trials", rest="settings", folded=True, detail="page")


def _cost(search: SearchResult, done: Sequence[Candidate]) -> Figure | None:
    trials, sign = [trial for trial in done if trial.trainable_parameters], search.measure.sign

    def draw(canvas: Canvas) -> None:
        axes = canvas.new_axes(300, "trained parameters", search.measure.label)
        points = {trial.number: (float(trial.trainable_parameters or 1), loss_of(trial)) for trial in trials}
        front: list[tuple[float, float]] = []
        for cost, loss in sorted(points.values(), key=lambda point: (point[0], sign * point[1])):
            if not front or sign * loss < sign * front[-1][1]:
                front.append((cost, loss))
        axes.plot(*zip(*front, strict=True), color=SERIES[1], linewidth=1.6)
        axes.plot(*zip(*points.values(), strict=True), "o", color=SERIES[0], markersize=7, markeredgecolor=PAPER)
        rings: dict[str, Any] = {"facecolors": "none", "linewidths": 2, "zorder": 4}
        for number, (finalist, name) in enumerate(((search.best, "best"), (search.cheapest, "cheapest"))):
            if finalist.number in points:
                size, colour = 170 + 90 * number, SERIES[1 + number]
                axes.scatter(*points[finalist.number], s=size, edgecolors=colour, label=name, **rings)
        canvas.log_axis("x", count)

    name = search.measure.name.capitalize()
    alt = f"{name} of {len(trials)} trials against the number of parameters that they train."
    caption = f"{name} against trained parameters. The line joins the trials that no cheaper trial beats."
    return Figure("cost", draw, alt, caption, wide=True) if len(trials) > 1 else None
