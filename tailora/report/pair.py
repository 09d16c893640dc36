"""Two adapters of one base, side by side."""

from collections.abc import Callable

from pydantic import BaseModel

from tailora.core.patterns import layer_index
from tailora.report import words
from tailora.report.charts import Estimate, estimates
from tailora.report.maps import heat_map
from tailora.report.parts import Drawing, Part, Picture, Points, Section, Table
from tailora.report.paths import short


class Overlap(BaseModel):
    """`study.inspection.ModuleOverlap`, of one matrix that both adapt."""

    path: str
    cosine: float
    writes: float
    writes_by_chance: float
    reads: float
    reads_by_chance: float


class Together(BaseModel):
    base: float
    one: float
    other: float
    both: float
    worse: float
    worse_low: float | None = None
    worse_high: float | None = None


class Pair(BaseModel):
    other: str
    modules: list[Overlap]
    only_here: list[str] = []
    only_there: list[str] = []
    cosine: float
    losses: Together | None = None


def pair_section(pair: Pair) -> Section:
    reading = (
        f"Beside {pair.other}: cosine of the updates of all that both adapt {words.signed(pair.cosine)}; 1 where they "
        "say the same, 0 where they do not meet, −1 where they cancel."
    )
    parts: list[Part | None] = [
        _map(pair, "writes", "overlap of what they write", lambda each: each.writes),
        _map(pair, "reads", "overlap of what they read", lambda each: each.reads),
        _losses(pair),
        _table(pair),
        _alone(pair),
    ]
    return Section("Beside the other adapter", reading, parts)


def _map(pair: Pair, name: str, title: str, value: Callable[[Overlap], float]) -> Picture | None:
    names = short(each.path for each in pair.modules)
    cells = {
        (names[each.path], layer): value(each) for each in pair.modules if (layer := layer_index(each.path)) is not None
    }
    if not cells:
        return None
    told = {place: f"layer {place[1]}, {place[0]}" for place in cells}
    (row, layer), most = max(cells.items(), key=lambda each: each[1])
    return Picture(
        f"map-{name}",
        lambda width: heat_map(width, cells, 1.0, "{:.2f}".format, title, told),
        f"Heat map of the {title}, by layer and matrix. Most: {most:.2f} in layer {layer}, {row}.",
        "1 where the spaces of the two updates are the same, 0 where they do not meet; chance is in the table.",
        wide=True,
    )


def _losses(pair: Pair) -> Picture | None:
    found = pair.losses
    if found is None:
        return None
    rows = [Estimate(name, getattr(found, name)) for name in ("base", "one", "other", "both")]
    said = ", ".join(f"{row.name} {row.value:.4f}" for row in rows)
    spread = words.between(found.worse_low, found.worse_high, "+.4f")
    return Picture(
        "together",
        lambda width: Drawing(estimates(width, rows, "held-out loss, nats per token")[0]),
        f"Held-out losses: {said}.",
        f"Held-out loss with either adapter, and with both added up: {words.signed(found.worse, 4)} "
        f"from the better one{f' ({spread})' if spread else ''}.",
        wide=True,
    )


def _table(pair: Pair) -> Table | None:
    rows = [
        [
            each.path,
            words.signed(each.cosine),
            f"{each.writes:.3f}",
            f"{each.writes_by_chance:.3f}",
            f"{each.reads:.3f}",
            f"{each.reads_by_chance:.3f}",
        ]
        for each in pair.modules
    ]
    heads = ("module", "cosine", "writes", "by chance", "reads", "by chance")
    return Table(heads, rows, folded="Overlap of every matrix") if rows else None


def _alone(pair: Pair) -> Points | None:
    items = [
        f"only in {where}: {', '.join(paths)}"
        for where, paths in (("this one", pair.only_here), ("the other", pair.only_there))
        if paths
    ]
    return Points(items) if items else None
