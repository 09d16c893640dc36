"""The page of an inspected adapter."""

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from tailora.evaluation.spectral import LEADING, ModuleReport
from tailora.formats.run_folder import ADAPTER
from tailora.report.blocks import Block, Column, Finding, Number, Page, Paragraph, Section, Table
from tailora.report.format import NONE, interval, plural, signed, value_range
from tailora.report.pages.shared import INTERVAL, numeric, settings_table
from tailora.study.advice import SATURATED_COST, HeldOutLosses, Inspection, first_few
from tailora.study.model_layout import DEPTHS, depth_of, layer_range

FIRST_ROWS = 8  # of the table by depth, in a terminal


class Measure(NamedTuple):
    """A column of the tables of modules."""

    column: str
    attribute: str  # of the module
    form: str  # format of its mean over modules; of energy, its sum
    priority: int
    meaning: str


LEADING_INTRUDERS = f"how many of the {LEADING} strongest directions of W + ΔW are unlike any of W"
MEASURES = [
    Measure("energy", "energy", ".1%", 0, "share of the adapter's squared norm; high where changes are largest"),
    Measure("effective", "effective_rank", ".1f", 0, "directions in use: r if all are used equally, 1 if only one is"),
    Measure("stable", "stable_rank", ".1f", 0, "the same, but weak directions hardly count"),
    Measure("‖ΔW‖/‖W‖", "relative_norm", ".2%", 0, "size of the update relative to the weights"),
    Measure("intruders", "intruders", ".1f", 1, LEADING_INTRUDERS),
    Measure("random", "intruders_random", ".1f", 2, "intruder dimensions of a random update of the same size"),
    Measure("scale", "scaling", ".3g", 2, "learned factor of the update"),
]
MEANING_OF_R = "rank: how many directions the adapter can use in a layer"


def inspect_page(inspection: Inspection) -> Page:
    losses, training = inspection.held_out, inspection.training
    by_depth_table, legend, every_module = _module_tables(inspection)
    adapter = {"folder": inspection.adapter, **inspection.config}
    sections = [
        Section(
            "Where the update is",
            "Grouped by thirds of the layers, highest energy first. Energy is a sum; all other values are means.",
            [by_depth_table, legend, *_remarks(inspection), every_module],
        ),
        *([_truncation(losses)] if losses else []),
        Section("Forgetting", "", [_forgetting(inspection.forgetting) if inspection.forgetting else None]),
        Section("Settings", "", [settings_table("Settings", ("adapter", adapter), ("training", training))]),
    ]
    findings: list[Block] = []
    for advice in inspection.advice:
        settings = [f"{name}: {json.dumps(value)}" for name, value in advice.setting.items()]  # JSON is YAML, too
        findings.append(Finding(advice.rule, advice.says, "\n".join(filter(None, [*settings, advice.command]))))
    notes = []  # flags that would show more
    if inspection.model is None:
        notes.append(
            f"Add --model {inspection.named_base or 'BASE'} to see ‖ΔW‖/‖W‖ and intruders, and the advice based on "
            "them."
        )
    if losses is None and inspection.config.get("task_type") not in ("SEQ_CLS", "TOKEN_CLS"):
        notes.append("Add --data HELD_OUT to see what the ranks are worth, and the advice based on that.")
    no_advice = "None of the applicable rules advises a change." if notes else "No rule advises a change."
    thresholds = 'The rules and their thresholds: "Inspecting an adapter" in the docs.'
    conclusion = Section("Advice", thresholds, findings or [Paragraph(no_advice)])
    rules = [advice.rule for advice in inspection.advice]
    summary = f"Rules that advise a change: {', '.join(rules)}." if rules else no_advice
    lead = f"{_description(inspection)}. {summary}"
    *_, outer, title = ("", *inspection.adapter.replace("\\", "/").rstrip("/").split("/"))
    if title == ADAPTER and outer:  # inside the folder of a run
        title = outer
    return Page("inspect", title or inspection.adapter, lead, _numbers(inspection), sections, notes, conclusion)


def _description(inspection: Inspection) -> str:
    modules = inspection.modules
    text = f"{inspection.adapter}: {plural(len(modules), 'update')}"
    if modules:
        scales = [round(module.scaling, 4) for module in modules]
        text += f" of rank {value_range([module.r for module in modules])}, scale {value_range(scales)}"
    learned = sum(module.learned_scaling for module in modules)
    dora = sum(module.use_dora for module in modules)
    text += f", {plural(learned, 'learned scale')}" if learned else ""
    text += f", {dora} with DoRA magnitudes" if dora else ""
    if inspection.model:
        return f"{text}, compared with {inspection.model}"
    return f"{text}, made for {inspection.named_base}" if inspection.named_base else text


def _numbers(inspection: Inspection) -> list[Number]:
    modules, losses = inspection.modules, inspection.held_out
    if not modules:
        return []
    use, stable = (statistics.median(getattr(module, name) for module in modules) for name in ("use", "stable_rank"))
    numbers = [
        Number("effective rank / rank", f"{use:.2f}", "median; 1: all of the rank is used", "page"),
        Number("stable rank", f"{stable:.1f}", "median", "page"),
    ]
    norms = [module.relative_norm for module in modules if module.relative_norm is not None]
    if norms:
        numbers.append(Number("‖ΔW‖/‖W‖", f"{statistics.median(norms):.2%}", "median", "page"))
    intruders = [module.intruders for module in modules if module.intruders is not None]
    by_chance = [module.intruders_random for module in modules if module.intruders_random is not None]
    if intruders and by_chance:
        note = f"{statistics.fmean(by_chance):.1f} in a random update"
        numbers.append(Number(f"intruders of {LEADING}", f"{statistics.fmean(intruders):.1f}", note, "page"))
    if losses:
        ends = interval((losses.improvement_low, losses.improvement_high))
        numbers.append(Number("improvement, nats per token", f"{losses.improvement:.3f}", ends, "page"))
    if inspection.forgetting:
        numbers.append(Number("KL from the base", f"{inspection.forgetting['kl']:.3f}", "nats per token", "page"))
    return numbers


# ---- Where the update is


def _module_tables(inspection: Inspection) -> tuple[Table | None, Table | None, Table | None]:
    """Returns a table by thirds of the layers and names of matrices, what its columns mean, and all modules."""
    modules = inspection.modules
    if not modules:
        return None, None, None
    has_learned_scaling = any(module.learned_scaling for module in modules)
    shown = [measure for measure in MEASURES if has_learned_scaling or measure.attribute != "scaling"]
    measures = [column for column in shown if any(getattr(m, column.attribute) is not None for m in modules)]

    def cells(own: Sequence[ModuleReport]) -> list[str]:
        texts = [value_range([module.r for module in own])]
        for _, name, form, _, _ in measures:
            values = [value for module in own if (value := getattr(module, name)) is not None]
            if len(own) == 1 and name in ("intruders", "intruders_random"):
                form = ".0f"
            value = (sum if name == "energy" else statistics.fmean)(values) if values else None
            texts.append(NONE if value is None else format(value, form))
        return texts

    columns = numeric("r")
    columns += [Column(measure.column, numeric=True, priority=measure.priority) for measure in measures]
    groups = _by_depth(modules, inspection.layers)
    groups.sort(key=lambda group: -sum(module.energy for module in group[2]))
    rows = [[layers, name, *cells(own)] for layers, name, own in groups]
    by_depth_table = Table([Column("layers"), Column("module"), *columns], rows, first=FIRST_ROWS)
    meanings = [("r", MEANING_OF_R), *((measure.column, measure.meaning) for measure in measures)]
    legend = Table([Column(""), Column("")], meanings)
    prefix = _shared_prefix(module.path for module in modules)
    first = Column(f"module (after {prefix})" if prefix else "module")
    rows = [[module.path.removeprefix(prefix), *cells([module])] for module in modules]
    title = f"Every module ({len(rows):,})"
    return by_depth_table, legend, Table([first, *columns], rows, title, folded=True, detail="all")


def _shared_prefix(paths: Iterable[str]) -> str:
    """Returns the common prefix of all paths, up to a dot; '' if there is none."""
    names = zip(*(path.split(".")[:-1] for path in paths), strict=False)
    shared = [same[0] for same in takewhile(lambda same: len(set(same)) == 1, names)]
    return ".".join(shared) + "." if shared else ""


def _remarks(inspection: Inspection) -> list[Paragraph]:
    """Returns what was skipped, and the notes of modules, each with the first few paths."""
    by_text: dict[str, list[str]] = {}
    for path, reason in inspection.left_out.items():
        by_text.setdefault(f"Skipped, {reason}", []).append(path)
    for module in inspection.modules:
        if module.note:
            by_text.setdefault(module.note, []).append(module.path)
    return [Paragraph(f"{text}: {first_few(paths)}") for text, paths in by_text.items()]


# ---- On held-out data


def _truncation(losses: HeldOutLosses) -> Section:
    half = losses.half
    rise, ends = signed(half.rise, 4), interval((half.low, half.high), "{:+.4f}".format)
    of_gain = NONE if half.cost is None else f"{half.cost:.1%}"
    columns = [*numeric("loss", "rise"), INTERVAL, *numeric("of the gain", "limit")]
    rows = [[f"{half.loss:.4f}", rise, ends, of_gain, f"{SATURATED_COST:.0%}"]]
    return Section(
        "What the ranks are worth",
        f"On {losses.data}, {losses.examples:,} distinct held-out examples: loss {losses.base_loss:.4f} with the "
        f"base, {losses.loss:.4f} with the adapter. Below: the loss without the lower half of all singular values, "
        "and by how much it rises.",
        [Table(columns, rows)],
    )


def _forgetting(lost: Mapping[str, Any]) -> Paragraph:
    rise = lost["loss_after"] - lost["loss_before"]
    return Paragraph(
        f"On {lost.get('text', 'other text')}: KL {lost['kl']:.4f} nats per token from the base; the loss went from "
        f"{lost['loss_before']:.4f} to {lost['loss_after']:.4f} ({signed(rise, 4)})."
    )


# ---- Short names of matrices, and matrices by depth and layer


def _inner_path(path: str) -> str:
    """Returns the path after the number of its layer; the full path if it has none."""
    parts = path.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdecimal()), -1)
    return ".".join(parts[number + 1 :])


def _short_names(modules: Sequence[ModuleReport]) -> dict[str, str]:
    """Returns path -> its last name, or the path within the layer if the last name is ambiguous."""
    inner = {module.path: _inner_path(module.path) for module in modules}
    owners = Counter(name.rpartition(".")[2] for name in set(inner.values()))
    return {path: last if owners[last := name.rpartition(".")[2]] == 1 else name for path, name in inner.items()}


def _by_depth(modules: Sequence[ModuleReport], layers: int) -> list[tuple[str, str, list[ModuleReport]]]:
    """Groups modules: a range of layers in one third of the model, a matrix's short name, and its modules there."""
    names = _short_names(modules)
    groups: dict[tuple[str, str], list[ModuleReport]] = {}
    for module in modules:
        groups.setdefault((depth_of(module.path, layers), _inner_path(module.path)), []).append(module)
    ordered = sorted(groups.items(), key=lambda item: ["", *DEPTHS].index(item[0][0]))
    return [
        (layer_range([module.path for module in members]) or depth or NONE, names[members[0].path], members)
        for (depth, _), members in ordered
    ]
