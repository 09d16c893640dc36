"""The section of an inspection about two adapters of one base, side by side."""

import math
import statistics

from tailora.core.patterns import layer_index
from tailora.report.blocks import Block, Column, Estimate, Figure, HeatMap, List, Paragraph, Section, Table
from tailora.report.format import NONE, interval, signed
from tailora.report.paths import by_depth, short_names
from tailora.study.advice import first_few
from tailora.study.inspection import AdapterOverlap, CombinedLosses, ModuleOverlap

NAMES = ("writes", "by chance", "reads", "by chance", "sum")
MEANS = "cosine", "writes", "writes_by_chance", "reads", "reads_by_chance"


def pair_section(pair: AdapterOverlap, layers: int) -> Section:
    if not pair.modules:
        return Section("Beside the other adapter", f"Beside {pair.other}.", [Paragraph("No matrix is in both.")])
    text = (
        f"Beside {pair.other}: cosine of the updates of all matrices that both adapt {signed(pair.cosine)}; 1 for the "
        "same update, 0 for orthogonal ones, -1 for opposite ones."
    )
    caption = "1: the two updates have the same space, 0: orthogonal spaces; chance is in the table."
    blocks: list[Block | None] = [
        _heat_map(pair, "writes", "overlap of the output spaces", caption),
        _heat_map(pair, "reads", "overlap of the input spaces", caption),
        _losses_figure(pair.losses) if pair.losses else None,
        _losses_text(pair.losses) if pair.losses else None,
        _by_depth(pair, layers),
        _only_one(pair),
        _every_matrix(pair),
    ]
    return Section("Beside the other adapter", text, blocks)


def _heat_map(pair: AdapterOverlap, name: str, title: str, caption: str) -> HeatMap | None:
    names = short_names(module.path for module in pair.modules)
    cells = {
        (names[module.path], layer): float(getattr(module, name))
        for module in pair.modules
        if (layer := layer_index(module.path)) is not None
    }
    return HeatMap(f"map-{name}", title, cells, 1.0, "{:.2f}".format, caption) if cells else None


# ---- Losses


def _losses_text(losses: CombinedLosses) -> Paragraph:
    ends = interval(losses.worse_low, losses.worse_high, "+.4f")
    return Paragraph(
        f"Held-out loss: base {losses.base:.4f}, this adapter {losses.one:.4f}, the other {losses.other:.4f}, both "
        f"added up {losses.both:.4f}: {signed(losses.worse, 4)} from the better one{f' ({ends})' if ends else ''}."
    )


def _losses_figure(losses: CombinedLosses) -> Figure:
    values = {"base": losses.base, "this one": losses.one, "the other": losses.other, "both": losses.both}
    listed = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
    caption = "Held-out loss with either adapter, and with both added up."
    rows = [Estimate(name, value) for name, value in values.items()]
    return Figure(
        "together",
        lambda canvas: canvas.estimates(rows, "held-out loss, nats per token"),
        f"Held-out losses: {listed}.",
        caption,
        wide=True,
    )


# ---- Tables


def _columns(first: list[Column]) -> list[Column]:
    return [*first, Column("cosine", numeric=True), *(Column(name, numeric=True) for name in NAMES)]


def _cells(modules: list[ModuleOverlap]) -> list[str]:
    """Means of the modules."""
    cosine, *overlaps = (statistics.fmean(getattr(module, name) for module in modules) for name in MEANS)
    lengths = [(module.sum_norm, math.hypot(module.norm, module.other_norm)) for module in modules]
    sums = [sum_norm / length for sum_norm, length in lengths if length]
    relative_sum = f"{statistics.fmean(sums):.2f}" if sums else NONE
    return [signed(cosine, 2), *(f"{overlap:.2f}" for overlap in overlaps), relative_sum]


def _by_depth(pair: AdapterOverlap, layers: int) -> Table:
    """A row for each third of the layers and name of a matrix."""
    rows = [[where, name, *_cells(own)] for where, name, own in by_depth(pair.modules, layers)]
    note = (
        "writes, reads: overlap of the spaces of outputs and of inputs, and that of random spaces. sum: length of the "
        "sum of both updates; 1 for orthogonal ones, 1.41 for the same update twice, 0 for opposite ones."
    )
    return Table(_columns([Column("layers"), Column("module")]), rows, note=note)


def _every_matrix(pair: AdapterOverlap) -> Table:
    rows = [[module.path, *_cells([module])] for module in pair.modules]
    return Table(_columns([Column("module")]), rows, "Overlap of every matrix", folded=True, detail="all")


def _only_one(pair: AdapterOverlap) -> List | None:
    owners = {"only in this one": pair.only_here, "only in the other": pair.only_there}
    items = [f"{len(paths)} {owner}: {first_few(paths)}" for owner, paths in owners.items() if paths]
    return List(items) if items else None
