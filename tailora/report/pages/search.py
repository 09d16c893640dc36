"""The page of a search."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tailora.report.blocks import Code, Column, Figure, Number, Page, Paragraph, Section, Table, settings_table
from tailora.report.colours import INK, PAPER, SERIES, SOFT
from tailora.report.format import count, duration, interval, one_line, p_value, plural, setting, signed
from tailora.report.pages.losses import JudgedLoss, differences_figure, losses_figure
from tailora.study.results import Candidate, Finalist, SearchResult
from tailora.train.memory import format_bytes

if TYPE_CHECKING:  # matplotlib is an optional package
    from tailora.report.charts import Canvas

SHOWN_TRIALS = 12  # in the terminal
FEWEST_FOR_SURFACE = 4  # trials
FEWEST_FOR_SLICES = 5  # trials
WORST_COLOUR = 0.8  # the quantile of the losses at which colours end: how badly the others failed does not matter
FEW_VALUES = 7  # of a number, which then gets an axis of names
WIDE_RANGE = 8  # a range that is so many times its start gets a logarithmic axis


def search_page(search: SearchResult) -> Page:
    done = _done(search)
    ended = len(search.trials) - len(done)
    sections = [
        Section(
            "The finalists",
            f"Run again with {plural(len(search.seeds), 'other seed')}, and judged on {search.judged_examples:,} "
            "held-out examples that chose no trial.",
            [*_loss_figures(search), _finalists(search), _finalist_settings(search)],
        ),
        Section(
            "The trials",
            f"{plural(len(done), 'trial')} of {plural(search.steps, 'step')} ran to the end, {ended:,} ended early. "
            "Losses are those of the held-out examples that choose.",
            [_history(search, done), _curves(search), _cost(done), _best_trials(done)],
        ),
        Section(
            "Learning rate and rank",
            "Other settings differ from point to point, too, so the surface shows a trend and no law.",
            [_rate_and_rank(search, done)],
        ),
        Section(
            "Which settings matter",
            "Importance: how much a setting says about being among the best quarter of the trials (PED-ANOVA).",
            [_importances_text(search), _importances(search), *_slices(done)],
        ),
        Section("All trials and settings", "", [_all_trials(search), settings_table("Settings", *_settings(search))]),
    ]
    conclusion = Section("To train with the result", "", [_commands(search)])
    title = f"{plural(len(search.trials), 'trial')} searched"
    return Page("search", title, search.verdict, _numbers(search), sections, search.notes, conclusion)


def _done(search: SearchResult) -> list[Candidate]:
    """The trials that ran to the end."""
    return [trial for trial in search.trials if trial.state == "done" and trial.eval_loss is not None]


def _loss(trial: Candidate) -> float:
    assert trial.eval_loss is not None
    return trial.eval_loss


def _name(finalist: Finalist) -> str:
    return f"trial {finalist.number}"


def _numbers(search: SearchResult) -> list[Number]:
    best, cheapest = search.best, search.cheapest
    losses = [Number(f"held-out loss, {_name(best)} (best)", f"{best.eval_loss:.3f}", interval(*best.interval))]
    if cheapest.number != best.number:
        label = f"held-out loss, {_name(cheapest)} (cheapest)"
        losses.append(Number(label, f"{cheapest.eval_loss:.3f}", interval(*cheapest.interval)))
    return [
        *losses,
        Number("held-out loss, base", f"{search.base_loss:.3f}", "before any training"),
        Number("trained by the cheapest", count(cheapest.trainable_parameters), "parameters"),
        Number("trials", str(len(search.trials)), f"{plural(search.steps, 'step')} each", detail="page"),
        Number("time of all runs", duration(search.seconds)),
    ]


# ---- Trials


def _table_of_trials(trials: Sequence[Candidate], title: str = "", **options: Any) -> Table:
    names = list(dict.fromkeys(name for trial in trials for name in trial.settings))
    numbers = [Column(name, numeric=True) for name in ("trial", "loss", "trained", "time")]
    columns = [*numbers, Column("ended", priority=1), *(Column(name, priority=1) for name in names)]
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


def _best_trials(done: Sequence[Candidate]) -> Table | None:
    best = sorted(done, key=_loss)[:SHOWN_TRIALS]
    more = f" {len(best)} of {len(done)}" if len(best) < len(done) else ""
    return _table_of_trials(best, f"The best trials{more}") if best else None


def _all_trials(search: SearchResult) -> Table:
    return _table_of_trials(search.trials, "All trials", folded=True, detail="page")


def _highest_shown(search: SearchResult, done: Sequence[Candidate]) -> float:
    """The loss at which runs that came apart are drawn: as it is, it would leave the others no room."""
    start = max([search.base_loss, *(trial.curve[0][1] for trial in search.trials if trial.curve)])
    best = min(map(_loss, done), default=start)
    return start + max(0.3 * (start - best), 0.05)


def _tip(trial: Candidate) -> str:
    settings = ", ".join(f"{name} {setting(value)}" for name, value in trial.settings.items())
    return f"trial {trial.number}: {_loss(trial):.4f}, {trial.state}; {settings}"


def _history(search: SearchResult, done: Sequence[Candidate]) -> Figure | None:
    if not done:
        return None
    best = min(done, key=_loss)
    return Figure(
        "history",
        partial(_draw_history, search, done),
        f"Loss of {len(search.trials)} trials in the order in which they began; the best, {_loss(best):.3f}, is trial "
        f"{best.number}.",
        "Loss of each trial. Filled: ran to the end. Hollow: ended early, at its last evaluation. Line: the best so "
        "far. Trials that diverged are drawn at the top.",
        wide=True,
    )


def _draw_history(search: SearchResult, done: Sequence[Candidate], canvas: "Canvas") -> None:
    axes = canvas.new_axes(300, "trial", "loss, nats per token")
    early = [trial for trial in search.trials if trial not in done and trial.eval_loss is not None]
    best_so_far = np.minimum.accumulate([_loss(trial) for trial in done])
    numbers = [trial.number for trial in done]
    axes.step(numbers, best_so_far, where="post", color=SOFT, linewidth=1.3, label="best so far")
    highest = _highest_shown(search, done)
    marks: dict[str, Any] = {"s": 46, "edgecolors": SERIES[0], "linewidths": 1.4, "zorder": 3}
    for name, trials, face in (("ended early", early, PAPER), ("ran to the end", done, SERIES[0])):
        if trials:
            losses = [min(_loss(trial), highest) for trial in trials]
            dots = axes.scatter([trial.number for trial in trials], losses, c=face, label=name, **marks)
            canvas.add_tips(dots, name.replace(" ", "-"), [_tip(trial) for trial in trials])
    rings: dict[str, Any] = {"facecolors": "none", "linewidths": 2, "zorder": 4}
    for place, (finalist, name) in enumerate(((search.best, "best"), (search.cheapest, "cheapest"))):
        losses = [_loss(trial) for trial in done if trial.number == finalist.number]
        x, colour = [finalist.number] * len(losses), SERIES[1 + place]
        axes.scatter(x, losses, s=170 + 90 * place, edgecolors=colour, label=name, **rings)
    canvas.whole_numbers("x")
    canvas.legend(5 if canvas.wide else 3)


def _curves(search: SearchResult) -> Figure | None:
    if not any(len(trial.curve) > 1 for trial in search.trials):
        return None
    return Figure(
        "trial-curves",
        partial(_draw_curves, search),
        f"Held-out loss of {len(search.trials)} trials over their steps; trial {search.best.number} is marked.",
        "Held-out loss over the steps; trials in the worse half are ended early. Marked: the best.",
    )


def _draw_curves(search: SearchResult, canvas: "Canvas") -> None:
    axes = canvas.new_axes(300, "step", "loss, nats per token")
    highest = _highest_shown(search, _done(search))
    for trial in search.trials:
        if len(trial.curve) > 1:
            best = trial.number == search.best.number
            steps, losses = zip(*trial.curve, strict=True)
            style: dict[str, Any] = {
                "color": SERIES[best],
                "linewidth": 2.6 if best else 1.2,
                "alpha": 1 if best else 0.5,
            }
            axes.plot(steps, np.minimum(losses, highest), zorder=2 + best, **style)
    canvas.whole_numbers("x")


def _cost(done: Sequence[Candidate]) -> Figure | None:
    trials = [trial for trial in done if trial.trainable_parameters]
    if len(trials) < 2:
        return None
    alt = f"Loss of {len(trials)} trials against the number of parameters that they train."
    caption = "Loss against trained parameters. The line joins the trials that no cheaper trial beats."
    return Figure("cost", partial(_draw_cost, trials), alt, caption)


def _draw_cost(trials: Sequence[Candidate], canvas: "Canvas") -> None:
    axes = canvas.new_axes(300, "trained parameters", "loss, nats per token")
    points = [(float(trial.trainable_parameters or 1), _loss(trial)) for trial in trials]
    front: list[tuple[float, float]] = []
    for cost, loss in sorted(points):
        if not front or loss < front[-1][1]:
            front.append((cost, loss))
    axes.plot(*zip(*front, strict=True), color=SERIES[1], linewidth=1.6)
    x, y = zip(*points, strict=True)
    marks = axes.scatter(x, y, s=46, color=SERIES[0], edgecolors=PAPER, zorder=3)
    canvas.add_tips(marks, "costs", [_tip(trial) for trial in trials])
    canvas.log_axis("x", count)


# ---- Settings that matter


def _rate_and_rank(search: SearchResult, done: Sequence[Candidate]) -> Figure | None:
    trials = [trial for trial in done if {"learning_rate", "r"} <= trial.settings.keys()]
    if len(trials) < FEWEST_FOR_SURFACE:
        return None
    return Figure(
        "surface",
        partial(_draw_surface, trials, search.best.number),
        f"Loss of {len(trials)} trials by learning rate and rank.",
        "Loss by learning rate and rank; strong colours are low losses. Between the trials it is smoothed, where "
        "there are enough of them. Ring: the best.",
        wide=True,
    )


def _draw_surface(trials: Sequence[Candidate], best: int, canvas: "Canvas") -> None:
    axes = canvas.new_axes(380, "learning rate", "rank")
    rates = [float(trial.settings["learning_rate"]) for trial in trials]
    ranks = [float(trial.settings["r"]) for trial in trials]
    losses = [_loss(trial) for trial in trials]
    low, high = min(losses), float(np.quantile(losses, WORST_COLOUR))
    high = high if high > low else low + 1e-3
    marks = canvas.surface(rates, ranks, losses, low, high)
    canvas.add_tips(marks, "points", [_tip(trial) for trial in trials])
    for trial, rate, rank in zip(trials, rates, ranks, strict=True):
        if trial.number == best:
            for thickness, colour in ((5, PAPER), (2.2, INK)):
                ring: dict[str, Any] = {"facecolors": "none", "edgecolors": colour, "linewidths": thickness}
                axes.scatter([rate], [rank], s=230, zorder=4, **ring)
    axes.use_sticky_edges = False
    axes.margins(0.06)
    canvas.log_axis("x")
    canvas.powers_axis("y", ranks)
    canvas.colour_scale(axes, (-high, -low), lambda number: f"{-number:.3f}", "loss, capped")


def _ranked(search: SearchResult) -> dict[str, float]:
    return dict(sorted(search.importances.items(), key=lambda item: -item[1]))


def _importances_text(search: SearchResult) -> Paragraph | None:
    shares = ", ".join(f"{name} {value:.0%}" for name, value in _ranked(search).items())
    return Paragraph(f"{shares}.") if shares else None


def _importances(search: SearchResult) -> Figure | None:
    if not search.importances:
        return None

    alt = f"Importance of each setting, from high to low: {', '.join(_ranked(search))}."
    return Figure(
        "importances",
        lambda canvas: canvas.bars(_ranked(search), "{:.0%}".format, one_colour=True),
        alt,
        "Importance of each setting.",
        wide=True,
    )


def _slices(done: Sequence[Candidate]) -> list[Figure]:
    """The loss against one setting at a time, for each setting that differs among the trials."""
    if len(done) < FEWEST_FOR_SLICES:
        return []
    names = dict.fromkeys(name for trial in done for name in trial.settings)
    points = {name: [(t.settings[name], _loss(t)) for t in done if name in t.settings] for name in names}
    return [
        Figure(
            f"slice-{number}",
            partial(_draw_slice, own),
            f"Loss of {len(own)} trials against {name}.",
            f"Loss of each trial by {name}.",
        )
        for number, (name, own) in enumerate(points.items())
        if len({setting(value) for value, _ in own}) > 1
    ]


def _draw_slice(points: Sequence[tuple[Any, float]], canvas: "Canvas") -> None:
    axes = canvas.new_axes(220, "", "loss")
    values, losses = [value for value, _ in points], [loss for _, loss in points]
    are_numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    names = list(dict.fromkeys(map(setting, sorted(values) if are_numbers else values)))
    named = not are_numbers or len(names) <= FEW_VALUES
    x = [names.index(setting(value)) for value in values] if named else values
    marks = axes.scatter(x, losses, s=40, color=SERIES[0], alpha=0.75, edgecolors=PAPER, linewidths=1)
    canvas.add_tips(marks, "trials", [f"{setting(value)}: {loss:.4f}" for value, loss in points])
    if named:
        axes.set_xticks(range(len(names)), [one_line(name, 64 // len(names)) for name in names])
        axes.set_xlim(-0.5, len(names) - 0.5)
    elif min(values) > 0 and max(values) >= WIDE_RANGE * min(values):
        canvas.log_axis("x")


# ---- Finalists


def _loss_figures(search: SearchResult) -> list[Figure | None]:
    rows = [JudgedLoss(_name(own), own.eval_loss, own.interval, own.difference) for own in search.finalists]
    margin = search.settings.get("search", {}).get("margin")
    return [losses_figure(rows, search.base_loss), differences_figure(rows, _name(search.best), margin)]


def _finalists(search: SearchResult) -> Table:
    columns = [
        Column("trial", numeric=True),
        Column("held-out loss", numeric=True),
        Column("95% interval", numeric=True, interval=True),
        Column("- best", numeric=True),
        Column("95% interval", numeric=True, interval=True),
        Column("p", numeric=True),
        Column("trained", numeric=True),
        Column("time", numeric=True),
        Column("peak memory", numeric=True),
    ]
    rows = []
    for finalist in search.finalists:
        difference = finalist.difference
        rows.append(
            [
                str(finalist.number),
                f"{finalist.eval_loss:.3f}",
                interval(*finalist.interval),
                signed(difference.value) if difference else "best",
                f"{signed(difference.low)} to {signed(difference.high)}" if difference else "",
                "" if finalist.p_value is None else p_value(finalist.p_value),
                count(finalist.trainable_parameters),
                duration(finalist.seconds),
                format_bytes(finalist.peak_memory_bytes),
            ]
        )
    return Table(columns, rows)


def _finalist_settings(search: SearchResult) -> Table:
    """Side by side."""
    names = list(dict.fromkeys(name for finalist in search.finalists for name in finalist.settings))
    marks = {search.best.number: " (best)", search.cheapest.number: " (cheapest)"}
    if len(marks) == 1:
        marks = {search.best.number: " (best and cheapest)"}
    heads = [f"{_name(finalist)}{marks.get(finalist.number, '')}" for finalist in search.finalists]
    rows = [[name, *(setting(own.settings.get(name)) for own in search.finalists)] for name in names]
    return Table([Column("setting"), *map(Column, heads)], rows)


def _commands(search: SearchResult) -> Code:
    files = {"the best": search.config}
    if search.cheapest.number != search.best.number:
        files["the cheapest"] = str(Path(search.config).with_name("cheapest.yaml"))
    return Code("\n".join(f"tailora train --config {path}  # {name}" for name, path in files.items()))


def _settings(search: SearchResult) -> list[tuple[str, Mapping[str, Any]]]:
    return [(part, settings) for part, settings in search.settings.items() if isinstance(settings, dict)]
