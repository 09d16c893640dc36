"""The page of an evaluation."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from pydantic import BaseModel

from tailora.evaluation.metrics import METRICS
from tailora.report import words
from tailora.report.charts import Estimate, estimates
from tailora.report.parts import Answers, Drawing, Page, Picture, Section, Table, Tile

TUNED, BASE = "tuned", "base"


class Score(BaseModel):
    value: float | None
    interval: tuple[float, float] | None = None
    n: int

    @property
    def spread(self) -> str:
        return "" if self.interval is None else f"{_worded(self.interval[0])} to {_worded(self.interval[1])}"


class Match(BaseModel):
    prompt: str
    expected: str
    answer: str
    hit: bool


class Met(BaseModel):
    gate: str
    value: float | None
    met: bool


class Judged(BaseModel):
    model: str
    adapter: str | None
    metrics: dict[str, Score]
    base: dict[str, Score] | None = None
    change: dict[str, Score] | None = None
    data: dict[str, Any] | None  # None where only tasks of lm-evaluation-harness were run
    tasks: dict[str, Any] | None = None
    samples: dict[str, list[Match]] = {}
    gates: list[Met] = []
    seconds: float


def eval_page(content: Mapping[str, Any]) -> Page:
    found = Judged.model_validate(content)
    judged = found.adapter or found.model
    missed = [each.gate for each in found.gates if not each.met]
    lead = "Tasks of lm-evaluation-harness."
    if found.data is not None:
        lead = f"{words.plural(found.data['rows'], 'row')} of {found.data['source']}."
    if found.gates:
        lead += f" Gates not met: {', '.join(missed)}." if missed else f" All {len(found.gates)} gates are met."
    sections = [
        Section("What was measured", "With 95% intervals over the rows.", _figures(found)),
        Section("Gates", "What was asked for.", [_gates(found)]),
        Section("Answers", "Greedy, to prompts of the data.", [_answers(found)]),
        Section("All numbers", "", [_table(found), _data(found)]),
    ]
    return Page("eval", judged.rstrip("/").rpartition("/")[2], lead, _tiles(found), sections)


def _tiles(found: Judged) -> list[Tile]:
    tiles = [
        Tile(name.replace("_", " "), _worded(score.value), score.spread)
        for name, score in found.metrics.items()
        if score.value is not None
    ]
    return [*tiles, Tile("time", words.duration(found.seconds))]


def _figures(found: Judged) -> list[Picture]:
    if found.base is None:
        return []
    pictures = []
    for place, (name, score) in enumerate(found.metrics.items()):
        rows = [
            Estimate(side, each.value, *(each.interval or (None, None)))
            for side, each in ((BASE, found.base.get(name)), (TUNED, score))
            if each is not None and each.value is not None
        ]
        if rows:
            said = "; ".join(f"{row.name} {_worded(row.value)}" for row in rows)
            meaning = METRICS.get(name, name)
            apart = (found.change or {}).get(name)
            change = ""
            if apart is not None and apart.value is not None:
                spread = f" ({apart.spread})" if apart.spread else ""
                change = f" Change on the same rows: {_worded(apart.value)}{spread}."
            pictures.append(
                Picture(
                    f"metric-{place}",
                    partial(_draw, rows, name.replace("_", " ")),
                    f"{name}: {said}.",
                    f"{meaning[:1].upper()}{meaning[1:]}.{change}",
                )
            )
    return pictures


def _draw(rows: list[Estimate], unit: str, width: float) -> Drawing:
    form = ".3f" if all(abs(row.value) < 10 for row in rows) else ",.1f"
    return Drawing(estimates(width, rows, unit, form=form)[0])


def _gates(found: Judged) -> Table | None:
    rows = [
        [each.gate, "met" if each.met else "NOT met", "–" if each.value is None else f"{each.value:.4f}"]
        for each in found.gates
    ]
    return Table(("gate", "", "value"), rows, words=2) if rows else None


def _answers(found: Judged) -> Answers | Table | None:
    tuned = found.samples.get(TUNED, [])
    base = found.samples.get(BASE, [])
    if tuned and len(base) == len(tuned):
        rows = [
            (f"{after.prompt}\n→ {after.expected}", _marked(before), _marked(after))
            for before, after in zip(base, tuned, strict=True)
        ]
        return Answers((BASE, TUNED), rows)
    rows_alone = [[each.prompt, each.expected, _marked(each)] for each in tuned]
    return Table(("prompt", "expected", "answer"), rows_alone, words=3) if tuned else None


def _marked(match: Match) -> str:
    return f"{'✓' if match.hit else '✗'} {match.answer}"


def _table(found: Judged) -> Table:
    heads = ["metric", "value", "95% interval", "rows"]
    sides = {"base": found.base, "change": found.change}
    given = {side: scores for side, scores in sides.items() if scores is not None}
    for side in given:
        heads += [side, "95% interval"]
    rows = []
    for name, score in found.metrics.items():
        row = [name, _number(score), score.spread, f"{score.n:,}"]
        for scores in given.values():
            row += [_number(scores[name]), scores[name].spread] if name in scores else ["", ""]
        rows.append(row)
    return Table(heads, rows)


def _number(score: Score) -> str:
    return "–" if score.value is None else _worded(score.value)


def _worded(value: float) -> str:
    return words.short(value).replace("-", "−")


def _data(found: Judged) -> Table:
    known = {"model": found.model, **(found.data or {}), **(found.tasks or {})}
    return Table(("", ""), [(name, words.value(each)) for name, each in known.items()], words=2, folded="Data")
