"""The page of a search."""

from collections.abc import Mapping
from typing import Any

from tailora.report import words
from tailora.report.charts import bars
from tailora.report.parts import Drawing, Page, Picture, Points, Section, Table, Tile
from tailora.report.slices import slices
from tailora.report.standings import Standing, differences, losses
from tailora.report.trials import Found, cost, curves, history, rates_and_ranks


def search_page(content: Mapping[str, Any]) -> Page:
    found = Found.model_validate(content)
    again = f"with {words.plural(len(found.seeds), 'other seed')}, on {found.judged_examples:,} held-out examples"
    standings = [
        Standing(name=each.name, loss=each.eval_loss, interval=each.interval, apart=each.difference)
        for each in found.finalists
    ]
    ended = len(found.trials) - len(found.done)
    sections = [
        Section(
            "The finalists",
            f"Run again {again} that chose no trial.",
            [losses(standings, found.base_loss), differences(standings, found.best.name, found.margin), _chosen(found)],
        ),
        Section(
            "The trials",
            f"{words.plural(len(found.done), 'trial')} of {found.steps:,} steps ran to the end, {ended:,} ended early.",
            [history(found), curves(found), cost(found)],
        ),
        Section(
            "Learning rate and rank",
            "Other settings differ, too, from point to point: a surface through them shows the slope, not the law.",
            [rates_and_ranks(found)],
        ),
        Section(
            "What matters",
            "Importance: how much a setting says about being among the best quarter of the trials.",
            [_importances(found), *slices([(each.settings, each.loss) for each in found.done])],
        ),
        Section("All numbers", "", [_points(found), _table(found), _settings(found)]),
    ]
    return Page(
        "search", f"{words.plural(len(found.trials), 'trial')} searched", found.verdict, _tiles(found), sections
    )


def _tiles(found: Found) -> list[Tile]:
    best, cheapest = found.best, found.cheapest
    spread = words.between(*(best.interval or (None, None)))
    tiles = [Tile(f"held-out loss, {best.name} (best)", f"{best.eval_loss:.3f}", spread)]
    if cheapest.number != best.number:
        spread = words.between(*(cheapest.interval or (None, None)))
        tiles.append(Tile(f"held-out loss, {cheapest.name} (cheapest)", f"{cheapest.eval_loss:.3f}", spread))
    return [
        *tiles,
        Tile("held-out loss, base", f"{found.base_loss:.3f}", "before any training"),
        Tile("trained by the cheapest", words.count(cheapest.trainable_parameters), "parameters"),
        Tile("trials", str(len(found.trials)), f"{found.steps:,} steps each"),
        Tile("time of all runs", words.duration(found.seconds)),
    ]


def _chosen(found: Found) -> Table:
    """Settings of the finalists, side by side."""
    names = list(dict.fromkeys(name for each in found.finalists for name in each.settings))
    marks = {found.best.number: " (best)", found.cheapest.number: " (cheapest)"}
    if found.best.number == found.cheapest.number:
        marks = {found.best.number: " (best and cheapest)"}
    heads = ["", *(f"{each.name}{marks.get(each.number, '')}" for each in found.finalists)]
    rows = [[name, *(words.setting(each.settings.get(name)) for each in found.finalists)] for name in names]
    rows.append(["trained parameters", *(words.count(each.trainable_parameters) for each in found.finalists)])
    return Table(heads, rows)


# ---- what matters, and all numbers


def _importances(found: Found) -> Picture | None:
    rows = sorted(found.importances.items(), key=lambda each: -each[1])
    if not rows:
        return None
    said = ", ".join(f"{name} {value:.0%}" for name, value in rows)
    names, values = [name for name, _ in rows], [value for _, value in rows]
    return Picture(
        "importances",
        lambda width: Drawing(bars(width, names, values, lambda value: f"{value:.0%}", one_colour=True)),
        f"Importance of each setting: {said}.",
        "Importance of each setting (PED-ANOVA).",
        wide=True,
    )


def _points(found: Found) -> Points | None:
    return Points(found.notes) if found.notes else None


def _table(found: Found) -> Table:
    names = list(dict.fromkeys(name for each in found.trials for name in each.settings))
    heads = ("trial", "ended", "loss", *names, "trained", "time")
    rows = [
        [
            str(each.number),
            each.state,
            "" if each.eval_loss is None else f"{each.eval_loss:.4f}",
            *(words.setting(each.settings.get(name)) for name in names),
            "" if each.trainable_parameters is None else words.count(each.trainable_parameters),
            "" if each.seconds is None else words.duration(each.seconds),
        ]
        for each in found.trials
    ]
    return Table(heads, rows, words=2, folded="All trials")


def _settings(found: Found) -> Table | None:
    rows = [
        [part, name, words.value(each)]
        for part, content in found.settings.items()
        if isinstance(content, dict)
        for name, each in content.items()
    ]
    return Table(("", "setting", "value"), rows, words=3, folded="Settings") if rows else None
