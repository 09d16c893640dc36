"""The matrices that a plan adapts: how many parameters each kind gets, and where ranks differ."""

from collections.abc import Sequence

from pydantic import BaseModel

from tailora.core.patterns import layer_index
from tailora.report import words
from tailora.report.charts import bars
from tailora.report.maps import heat_map
from tailora.report.parts import Drawing, Picture, Table
from tailora.report.paths import short


class Module(BaseModel):
    path: str
    kind: str
    in_features: int
    out_features: int
    r: int
    parameters: int

    @property
    def shape(self) -> str:
        return f"{self.in_features:,} × {self.out_features:,}"


def _rows(modules: Sequence[Module]) -> dict[tuple[str, str, str, int], list[Module]]:
    """By path within a layer, kind, shape and rank."""
    names = short(each.path for each in modules)
    rows: dict[tuple[str, str, str, int], list[Module]] = {}
    for each in modules:
        rows.setdefault((names[each.path], each.kind, each.shape, each.r), []).append(each)
    return rows


def by_matrix(modules: Sequence[Module]) -> Table:
    rows = [
        [name, kind, shape, str(r), f"{len(own):,}", f"{sum(each.parameters for each in own):,}"]
        for (name, kind, shape, r), own in _rows(modules).items()
    ]
    return Table(("matrix", "kind", "in × out", "r", "times", "parameters"), rows, words=2)


def parameters(modules: Sequence[Module]) -> Picture | None:
    sums: dict[str, float] = {}
    for (name, *_), own in _rows(modules).items():
        sums[name] = sums.get(name, 0.0) + sum(each.parameters for each in own)
    if not sums:
        return None
    said = ", ".join(f"{name} {words.count(value)}" for name, value in sums.items())
    names, values = list(sums), list(sums.values())
    return Picture(
        "parameters",
        lambda width: Drawing(bars(width, names, values, words.count, one_colour=True)),
        f"Trained parameters by matrix: {said}.",
        "Trained parameters of each matrix, over all layers.",
        wide=True,
    )


def map_of_ranks(modules: Sequence[Module]) -> Picture | None:
    """Where ranks differ from layer to layer."""
    names = short(each.path for each in modules)
    places = {(names[each.path], layer): each.r for each in modules if (layer := layer_index(each.path)) is not None}
    if len(set(places.values())) < 2:
        return None
    cells = {place: float(r) for place, r in places.items()}
    told = {place: f"layer {place[1]}, {place[0]}" for place in places}
    most, least = max(places.values()), min(places.values())
    return Picture(
        "ranks",
        lambda width: heat_map(width, cells, most, "{:.0f}".format, "rank", told),
        f"Heat map of ranks by layer and matrix, from {least} to {most}.",
        "Rank of each matrix, by layer.",
        wide=True,
    )
