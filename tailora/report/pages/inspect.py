"""The page of an inspected adapter."""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from tailora.core.patterns import layer_index
from tailora.evaluation.spectral import ModuleReport
from tailora.formats.run_folder import ADAPTER
from tailora.report.blocks import (
    Block,
    Column,
    Estimate,
    Figure,
    Finding,
    HeatMap,
    Number,
    Page,
    Paragraph,
    Section,
    Table,
    settings_table,
)
from tailora.report.colours import SERIES, heat_colour
from tailora.report.format import NONE, interval, one_line, plural, signed, value_range
from tailora.report.pages.adapter_pair import pair_section
from tailora.report.paths import by_depth, shared_prefix, short_names
from tailora.study.advice import cost_limit, first_few
from tailora.study.inspection import Advice, HeldOutLosses, Inspection, TruncationCost

if TYPE_CHECKING:  # matplotlib is an optional package
    from tailora.report.charts import Canvas

FEWEST_LAYERS = 3  # for heat maps
MOST_PANELS = 12  # of spectra


def inspect_page(inspection: Inspection) -> Page:
    modules, losses = inspection.modules, inspection.held_out
    rules = [advice.rule for advice in inspection.advice]
    asked = f"Rules that ask for something: {', '.join(rules)}." if rules else "No rule asks for a change."
    conclusion = Section(
        "Advice", "From rules with stated thresholds, each with its numbers (docs/inspect.md).", _advice(inspection)
    )
    sections = [
        Section(
            "Where the update is",
            "Energy is the share of the adapter's squared norm.",
            [_by_depth(inspection), *_heat_maps(modules), *_remarks(inspection), _every_module(inspection)],
        ),
        Section(
            "Spectra",
            "How fast the singular values of each update fall: a flat line uses all of its rank, a steep one little.",
            [_spectra(modules)],
        ),
        Section(
            "What the ranks are worth",
            f"On {losses.data}, {losses.examples:,} held-out examples: loss {losses.base_loss:.4f} with the base, "
            f"{losses.loss:.4f} with the adapter."
            if losses
            else "",
            [_truncation_figure(losses), _truncation_table(losses)] if losses else [],
        ),
        Section("What was forgotten", "", _forgetting(inspection)),
        *([] if inspection.pair is None else [pair_section(inspection.pair, inspection.layers)]),
        Section("Left out, and settings", "", _left_out_and_settings(inspection)),
    ]
    return Page(
        "inspect",
        _title(inspection.adapter),
        f"{_described(inspection)}. {asked}",
        _numbers(inspection),
        sections,
        _missing(inspection),
        conclusion,
    )


def _title(adapter: str) -> str:
    """The folder's name; of an adapter within a run's folder, the run's."""
    *_, outer, last = ("", *adapter.replace("\\", "/").rstrip("/").split("/"))
    return outer if last == ADAPTER and outer else last or adapter


def _described(inspection: Inspection) -> str:
    modules = inspection.modules
    text = f"{inspection.adapter}: {plural(len(modules), 'update')}"
    if modules:
        scales = [round(module.scaling, 4) for module in modules]
        text += f" of rank {value_range([module.r for module in modules])}, scale {value_range(scales)}"
    learned = sum(module.learned_scaling for module in modules)
    dora = sum(module.use_dora for module in modules)
    text += f", {plural(learned, 'scale')} learned" if learned else ""
    text += f", {dora} with DoRA's magnitudes" if dora else ""
    if inspection.model:
        return f"{text}, beside {inspection.model}"
    return f"{text}, made for {inspection.named_base}" if inspection.named_base else text


def _numbers(inspection: Inspection) -> list[Number]:
    modules, losses = inspection.modules, inspection.held_out
    if not modules:
        return []
    use, stable = (statistics.median(getattr(module, name) for module in modules) for name in ("use", "stable_rank"))
    numbers = [
        Number("effective rank / rank", f"{use:.2f}", "median; 1: all of the rank is used", detail="page"),
        Number("stable rank", f"{stable:.1f}", "median", detail="page"),
    ]
    norms = [module.relative_norm for module in modules if module.relative_norm is not None]
    if norms:
        numbers.append(Number("‖ΔW‖/‖W‖", f"{statistics.median(norms):.2%}", "median", detail="page"))
    intruders = [module.intruders for module in modules if module.intruders is not None]
    by_chance = [module.intruders_random for module in modules if module.intruders_random is not None]
    if intruders and by_chance:
        note = f"{statistics.fmean(by_chance):.1f} in a random update"
        numbers.append(Number("intruders of 10", f"{statistics.fmean(intruders):.1f}", note, detail="page"))
    if losses:
        ends = interval(losses.improvement_low, losses.improvement_high)
        numbers.append(Number("better by, nats per token", f"{losses.improvement:.3f}", ends, detail="page"))
    if inspection.forgetting:
        kl = f"{inspection.forgetting['kl']:.3f}"
        numbers.append(Number("KL from the base", kl, "nats per token", detail="page"))
    return numbers


# ---- Advice


def _advice(inspection: Inspection) -> list[Block | None]:
    if not inspection.advice:
        return [Paragraph("No rule of docs/inspect.md asks for a change.")]
    return [Finding(advice.rule, advice.says, _to_copy(advice)) for advice in inspection.advice]


def _to_copy(advice: Advice) -> str:
    """The settings as YAML, of which JSON is a part, and the command."""
    settings = [f"{name}: {json.dumps(value)}" for name, value in advice.setting.items()]
    return "\n".join([*settings, *([advice.command] if advice.command else [])])


def _missing(inspection: Inspection) -> list[str]:
    """What more there would be to see."""
    if inspection.model is None:
        base = inspection.named_base or "BASE"
        return [f"--model {base} adds ‖ΔW‖/‖W‖ and intruder dimensions; with --data, too, what the ranks are worth."]
    if inspection.held_out is None:
        return ["--data HELD_OUT adds what the smaller singular values are worth, and what was forgotten."]
    return []


# ---- Modules


def _by_depth(inspection: Inspection) -> Table | None:
    """A row for each third of the layers and name of a matrix."""
    modules = inspection.modules
    rows = [[layers, name, *_cells(own, modules)] for layers, name, own in by_depth(modules, inspection.layers)]
    columns = [Column("layers"), Column("module"), *_columns(modules)]
    return Table(columns, rows, note="Means of the modules; of energy, sums.") if rows else None


def _every_module(inspection: Inspection) -> Table | None:
    prefix = shared_prefix(module.path for module in inspection.modules)
    name = f"module (after {prefix})" if prefix else "module"
    columns = [Column(name), *_columns(inspection.modules)]
    rows = [[module.path.removeprefix(prefix), *_cells([module], inspection.modules)] for module in inspection.modules]
    title = f"Every module ({len(rows):,})"
    return Table(columns, rows, title, folded=True, detail="all") if rows else None


def _columns(modules: Sequence[ModuleReport]) -> list[Column]:
    names = ["r", "effective", "stable", "energy"]
    names += ["‖ΔW‖/‖W‖"] if _known(modules, "relative_norm") else []
    columns = [Column(name, numeric=True) for name in names]
    if _known(modules, "intruders"):
        columns += [Column("intruders", numeric=True, priority=1), Column("random", numeric=True, priority=2)]
    return columns + ([Column("scale", numeric=True, priority=2)] if _scales_learned(modules) else [])


def _cells(own: Sequence[ModuleReport], modules: Sequence[ModuleReport]) -> list[str]:
    """Of the columns above. modules: all, which decide on the columns."""

    def mean(name: str, form: str) -> str:
        values = [value for module in own if (value := getattr(module, name)) is not None]
        return format(statistics.fmean(values), form) if values else NONE

    counts = ".1f" if len(own) > 1 else ".0f"
    return [
        value_range([module.r for module in own]),
        mean("effective_rank", ".1f"),
        mean("stable_rank", ".1f"),
        f"{sum(module.energy for module in own):.1%}",
        *([mean("relative_norm", ".2%")] if _known(modules, "relative_norm") else []),
        *([mean("intruders", counts), mean("intruders_random", counts)] if _known(modules, "intruders") else []),
        *([mean("scaling", ".3g")] if _scales_learned(modules) else []),
    ]


def _known(modules: Sequence[ModuleReport], name: str) -> bool:
    return any(getattr(module, name) is not None for module in modules)


def _scales_learned(modules: Sequence[ModuleReport]) -> bool:
    return any(module.learned_scaling for module in modules)


def _remarks(inspection: Inspection) -> list[Paragraph]:
    """What was left out, and what modules note, each with the first few paths."""
    by_text: dict[str, list[str]] = {}
    for path, reason in inspection.left_out.items():
        by_text.setdefault(f"Left out, {reason}", []).append(path)
    for module in inspection.modules:
        if module.note:
            by_text.setdefault(module.note, []).append(module.path)
    return [Paragraph(f"{text}: {first_few(paths)}") for text, paths in by_text.items()]


# ---- Heat maps and spectra


def _heat_maps(modules: Sequence[ModuleReport]) -> list[HeatMap]:
    names = short_names(module.path for module in modules)
    if len({layer_index(module.path) for module in modules} - {None}) < FEWEST_LAYERS:
        return []
    energy, use, norm, intruders = (
        {
            (names[module.path], layer): float(value)
            for module in modules
            if (layer := layer_index(module.path)) is not None and (value := getattr(module, name)) is not None
        }
        for name in ("energy", "use", "relative_norm", "intruders")
    )
    percent: Callable[[float], str] = "{:.1%}".format
    maps = [
        HeatMap(
            "map-energy",
            "energy",
            energy,
            max(energy.values(), default=0),
            percent,
            "Share of the adapter's squared norm.",
            detail="always",
        ),
        HeatMap(
            "map-use",
            "effective rank / rank",
            use,
            1.0,
            "{:.2f}".format,
            "Effective rank / rank: 1 uses all directions alike; near 0 all but one are idle.",
            detail="always",
        ),
        HeatMap(
            "map-norm",
            "relative norm",
            norm,
            max(norm.values(), default=0),
            percent,
            "‖ΔW‖/‖W‖: how large the update is beside the weight that it changes.",
        ),
        HeatMap(
            "map-intruders",
            "intruder dimensions",
            intruders,
            10.0,
            "{:.0f}".format,
            "Of the 10 leading directions of the changed weight, those that are unlike any of the base's.",
        ),
    ]
    return [heat for heat in maps if any(heat.cells.values())]


def _spectra(modules: Sequence[ModuleReport]) -> Figure | None:
    names = short_names(module.path for module in modules)
    groups: dict[str, list[ModuleReport]] = {}
    for module in modules:
        if module.singular_values and module.singular_values[0] > 0:
            groups.setdefault(names[module.path], []).append(module)
    if not groups:
        return None
    energies = {name: sum(module.energy for module in own) for name, own in groups.items()}
    most = sorted(energies, key=lambda name: -energies[name])[:MOST_PANELS]
    shown = {name: own for name, own in groups.items() if name in most}
    caption = "Singular values of each update, relative to the largest, in falling order; a line for each layer."
    if len(shown) < len(groups):
        caption += f" The {MOST_PANELS} of {len(groups)} matrices with the most energy."
    alt = f"Line charts of the singular values of {sum(map(len, shown.values()))} updates: {', '.join(shown)}."
    return Figure("spectra", partial(_draw_spectra, shown), alt, caption, wide=True)


def _draw_spectra(groups: Mapping[str, Sequence[ModuleReport]], canvas: "Canvas") -> None:
    columns = min(len(groups), 4 if canvas.wide else 2)
    lines = math.ceil(len(groups) / columns)
    canvas.set_height(56 + 150 * lines)
    panels = list(canvas.figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat)
    last = max((layer_index(module.path) or 0 for own in groups.values() for module in own), default=0)
    for axes, (name, own) in zip(panels, groups.items(), strict=False):
        for module in own:
            values = module.singular_values
            colour = heat_colour(2 + (layer_index(module.path) or 0), 0, last + 3)  # the palest is no line
            axes.plot(range(1, len(values) + 1), [value / values[0] for value in values], color=colour, linewidth=1.2)
        axes.set_title(one_line(name, 22), fontsize=11.5)
        axes.set_ylim(0, 1.05)
        axes.locator_params("x", nbins=4, integer=True, min_n_ticks=1)
        axes.set_yticks([0, 0.5, 1])
    for index in range(len(groups), len(panels)):
        panels[index].set_visible(False)
        panels[index - columns].tick_params(labelbottom=True)
    if last:
        canvas.colour_scale(panels, (0, last), "{:.0f}".format, "layer")


# ---- On held-out data


def _costs(losses: HeldOutLosses) -> dict[str, TruncationCost]:
    return {"all modules": losses.half, **losses.groups}


def _truncation_figure(losses: HeldOutLosses) -> Figure:
    values = "; ".join(
        f"{name} {cost.rise:+.4f} ({interval(cost.low, cost.high, '+.4f')})" for name, cost in _costs(losses).items()
    )
    text = "Rise of the held-out loss without the lower half of the singular values"
    caption = f"{text} of these modules, with 95% intervals."
    return Figure("half", partial(_draw_truncation, losses), f"{text}: {values}.", caption, wide=True)


def _draw_truncation(losses: HeldOutLosses, canvas: "Canvas") -> None:
    rows = [Estimate(name, cost.rise, cost.low, cost.high) for name, cost in _costs(losses).items()]
    unit = "rise of held-out loss, nats per token"
    canvas.estimates(rows, unit, reference=0.0, form="+.4f", colours=[0] * len(rows))


def _truncation_table(losses: HeldOutLosses) -> Table:
    columns = [
        Column("without the lower half of"),
        Column("loss", numeric=True),
        Column("rise", numeric=True),
        Column("95% interval", numeric=True, interval=True),
        Column("of the gain", numeric=True),
        Column("limit", numeric=True),
        Column("of the values", numeric=True, priority=1),
    ]
    rows = [
        [
            name,
            f"{cost.loss:.4f}",
            signed(cost.rise, 4),
            interval(cost.low, cost.high, "+.4f"),
            NONE if cost.cost is None else f"{cost.cost:.1%}",
            f"{cost_limit(cost):.1%}",
            f"{cost.values:.0%}",
        ]
        for name, cost in _costs(losses).items()
    ]
    return Table(columns, rows)


def _forgetting(inspection: Inspection) -> list[Block | None]:
    lost, losses = inspection.forgetting, inspection.held_out
    if lost is None:
        return []
    rise = lost["loss_after"] - lost["loss_before"]
    text = (
        f"On {lost.get('text', 'other text')}: KL {lost['kl']:.4f} nats per token from the base; the loss went from "
        f"{lost['loss_before']:.4f} to {lost['loss_after']:.4f} ({signed(rise, 4)})."
    )
    if not inspection.dial or losses is None:
        return [Paragraph(text)]
    points = [(0.0, losses.base_loss, 0.0), (1.0, losses.loss, lost["kl"])]
    points += [(step.strength, step.loss, step.kl) for step in inspection.dial if step.loss is not None]
    alt = f"Held-out loss and KL from the base at {len(points)} strengths of the adapter."
    caption = "What a lower strength keeps: held-out loss, and KL from the base on other text; nats per token."
    return [Paragraph(text), Figure("dial", partial(_draw_dial, sorted(points)), alt, caption, wide=True)]


def _draw_dial(points: Sequence[tuple[float, float, float]], canvas: "Canvas") -> None:
    axes = canvas.new_axes(280, "strength", "held-out loss")
    strengths, losses, kls = zip(*points, strict=True)
    axes.plot(strengths, losses, "o-", color=SERIES[0], label="held-out loss")
    right = axes.twinx()
    right.plot(strengths, kls, "s--", color=SERIES[1])
    axes.plot([], [], "s--", color=SERIES[1], label="KL from the base (right)")
    right.set_ylabel("KL")
    right.set_ylim(bottom=0)
    right.grid(visible=False)
    canvas.legend(2)


def _left_out_and_settings(inspection: Inspection) -> list[Block | None]:
    left_out = Table(
        [Column("left out"), Column("why")], list(inspection.left_out.items()), "Left out", folded=True, detail="page"
    )
    groups: list[tuple[str, Mapping[str, Any]]] = [
        ("adapter", {"folder": inspection.adapter, **inspection.config}),
        ("its run", inspection.training),
    ]
    return [left_out if inspection.left_out else None, settings_table("Settings of the adapter", *groups)]
