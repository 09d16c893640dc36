"""The page of a plan."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from tailora.core.patterns import layer_index
from tailora.report.blocks import (
    Column,
    Figure,
    HeatMap,
    Number,
    Page,
    Paragraph,
    Section,
    Table,
    settings_table,
)
from tailora.report.colours import DASHED, INK, SERIES
from tailora.report.format import NONE, count, duration, plural, share
from tailora.report.paths import short_names
from tailora.study.plan import AdaptedModule, Plan
from tailora.train.memory import format_bytes

if TYPE_CHECKING:  # matplotlib is an optional package
    from tailora.report.charts import Canvas

NEAR = 2.0  # times the longest bar: memory that is further away is not drawn


def plan_page(plan: Plan) -> Page:
    sections = [
        Section("What is trained", "", [_trained(plan), _left(plan)]),
        Section(
            "Memory",
            f"At the moment when the run holds most, {plan.dtype} on {plan.device}; {plan.basis['memory']}.",
            [_memory_figure(plan), _memory_table(plan)],
        ),
        Section("Steps and time", "", [Paragraph(_steps(plan)), Paragraph(plan.kernels)]),
        Section(
            "Parameters by matrix",
            f"{plural(len(plan.modules), 'matrix', 'matrices')} with a low-rank update.",
            [_parameters(plan.modules), _ranks(plan.modules), _modules(plan.modules)],
        ),
        Section("Settings", "", [settings_table("Settings", ("", plan.settings))]),
    ]
    name = plan.model.rstrip("/").rpartition("/")[2]
    return Page("plan", f"{name}, before any training", _lead(plan), _numbers(plan), sections, plan.notes)


def _lead(plan: Plan) -> str:
    forward = plan.largest_forward
    fits = "It fits" if plan.fits else "It does not fit"
    lead = (
        f"{fits}: {format_bytes(plan.memory.total)} of {format_bytes(plan.available_bytes)}. The largest forward has "
        f"{plural(forward['examples'], 'example')} of {forward['tokens']:,} tokens together."
    )
    return lead if plan.full is None else f"{lead} Full fine-tuning needs {format_bytes(plan.full.memory.total)}."


def _numbers(plan: Plan) -> list[Number]:
    trained = f"{share(plan.trainable_parameters, plan.total_parameters)} of {count(plan.total_parameters)}"
    numbers = [
        Number("trained parameters", count(plan.trainable_parameters), trained),
        Number("memory", format_bytes(plan.memory.total), f"of {format_bytes(plan.available_bytes)}", detail="page"),
    ]
    if plan.full is not None:
        batch_size = plan.full.batch_size_that_fits
        note = f"batches of {batch_size} fit" if batch_size else "does not fit"
        numbers.append(Number("memory, full fine-tuning", format_bytes(plan.full.memory.total), note, detail="page"))
    note = f"asked for: {plan.batch_size}"
    numbers.append(Number("batch size that fits", f"{plan.batch_size_that_fits:,}", note, detail="page"))
    if plan.steps is not None:
        numbers.append(Number("steps", f"{plan.steps:,}", detail="page"))
    if plan.seconds is not None:
        numbers.append(Number("time", duration(plan.seconds), "estimated", detail="page"))
    return numbers


# ---- Memory and time


def _memory_by_method(plan: Plan) -> dict[str, dict[str, int]]:
    """Method of training -> bytes by part, with their total."""
    if plan.full is None:
        return {"full fine-tuning": plan.memory.to_dict()}
    return {"LoRA": plan.memory.to_dict(), "full fine-tuning": plan.full.memory.to_dict()}


def _memory_table(plan: Plan) -> Table:
    memories = _memory_by_method(plan)
    rows = [
        [part, *(format_bytes(memory[part]) if memory[part] else NONE for memory in memories.values())]
        for part in plan.memory.to_dict()
    ]
    fitting = [plan.batch_size_that_fits, *([plan.full.batch_size_that_fits] if plan.full else [])]
    rows.append(["batch size that fits", *(f"{number:,}" if number else "none" for number in fitting)])
    return Table([Column("part"), *(Column(method, numeric=True) for method in memories)], rows)


def _limit_is_near(plan: Plan) -> bool:
    return plan.available_bytes < NEAR * max(memory["total"] for memory in _memory_by_method(plan).values())


def _memory_figure(plan: Plan) -> Figure:
    values = "; ".join(
        f"{name} {format_bytes(memory['total'])}: "
        + ", ".join(f"{part} {format_bytes(number)}" for part, number in memory.items() if number and part != "total")
        for name, memory in _memory_by_method(plan).items()
    )
    limit = f" Dashed line: the {format_bytes(plan.available_bytes)} that there are." if _limit_is_near(plan) else ""
    alt = f"Stacked bars of memory. {values}."
    return Figure("memory", partial(_draw_memory, plan), alt, f"Memory by part.{limit}", wide=True)


def _draw_memory(plan: Plan, canvas: "Canvas") -> None:
    memories = _memory_by_method(plan)
    axes = canvas.new_axes(128 + 46 * len(memories), "GB")
    starts = [0.0] * len(memories)
    for number, part in enumerate(part for part in plan.memory.to_dict() if part != "total"):
        sizes = [memory[part] / 1e9 for memory in memories.values()]
        if any(sizes):
            axes.barh(range(len(memories)), sizes, left=starts, height=0.6, color=SERIES[number], label=part)
            starts = [start + part_size for start, part_size in zip(starts, sizes, strict=True)]
    for y, (end, memory) in enumerate(zip(starts, memories.values(), strict=True)):
        axes.annotate(format_bytes(memory["total"]), (end, y), (6, 0), textcoords="offset points", va="center")
    if _limit_is_near(plan):
        axes.axvline(plan.available_bytes / 1e9, color=INK, linewidth=1.3, linestyle=DASHED)
    axes.set_yticks(range(len(memories)), list(memories))
    axes.set_ylim(len(memories) - 0.45, -0.55)
    axes.margins(x=0.18)
    axes.set_xlim(left=0)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    canvas.legend(8 if canvas.wide else 3)


def _steps(plan: Plan) -> str:
    per_step = f"{duration(plan.seconds_per_step)} per step"
    if plan.steps is None:
        return f"{per_step} ({plan.basis['time']}); --data or --max-steps tells how many steps there are."
    together = "" if plan.seconds is None else f", {duration(plan.seconds)} together"
    return f"{plural(plan.steps, 'step')}, {per_step}{together} ({plan.basis['time']})."


# ---- What is trained


def _trained(plan: Plan) -> Table | None:
    columns = [
        Column("path"),
        Column("type", priority=2),
        Column("shape", numeric=True, priority=1),
        Column("r", numeric=True),
        Column("alpha", numeric=True, priority=2),
        Column("parameters", numeric=True),
    ]
    rows = [
        [
            group.path,
            group.kind,
            " × ".join(f"{length:,}" for length in group.shape),
            *(NONE if value is None else f"{value:g}" for value in (group.r, group.alpha)),
            f"{group.parameters:,}",
        ]
        for group in plan.groups
    ]
    return Table(columns, rows) if rows else None


def _left(plan: Plan) -> Table | None:
    columns = [Column("path"), Column("parameters", numeric=True), Column("why")]
    rows = [[group.path, f"{group.parameters:,}", group.reason] for group in plan.left]
    return Table(columns, rows, "Left as they are") if rows else None


def _modules(modules: Sequence[AdaptedModule]) -> Table | None:
    columns = [
        Column("matrix"),
        Column("type"),
        *(Column(name, numeric=True) for name in ("in × out", "r", "alpha", "parameters")),
    ]
    rows = [
        [
            module.path,
            module.kind,
            f"{module.in_features:,} × {module.out_features:,}",
            str(module.r),
            f"{module.alpha:g}",
            f"{module.parameters:,}",
        ]
        for module in modules
    ]
    return Table(columns, rows, "Every matrix", folded=True, detail="page") if rows else None


def _parameters(modules: Sequence[AdaptedModule]) -> Figure | None:
    names = short_names(module.path for module in modules)
    sums: dict[str, float] = {}
    for module in modules:
        sums[names[module.path]] = sums.get(names[module.path], 0.0) + module.parameters
    if not sums:
        return None
    values = ", ".join(f"{name} {count(number)}" for name, number in sums.items())
    alt = f"Trained parameters by matrix: {values}."
    caption = "Trained parameters of each matrix, over all layers."
    return Figure("parameters", lambda canvas: canvas.bars(sums, count, one_colour=True), alt, caption, wide=True)


def _ranks(modules: Sequence[AdaptedModule]) -> HeatMap | None:
    """Where ranks differ."""
    names = short_names(module.path for module in modules)
    ranks = {
        (names[module.path], layer): float(module.r)
        for module in modules
        if (layer := layer_index(module.path)) is not None
    }
    if len(set(ranks.values())) < 2:
        return None
    caption = "Rank of each matrix, by layer."
    return HeatMap("ranks", "rank", ranks, max(ranks.values()), "{:.0f}".format, caption)
