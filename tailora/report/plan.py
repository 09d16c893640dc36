"""The page of a plan."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from pydantic import BaseModel

from tailora.report import words
from tailora.report.charts import canvas, legend
from tailora.report.parts import Drawing, Page, Picture, Points, Section, Table, Tile
from tailora.report.plan_modules import Module, by_matrix, map_of_ranks, parameters
from tailora.report.svg import INK, SERIES

PARTS = ("weights", "adapters", "gradients", "optimizer", "activations", "logits", "copies", "process")
NEAR = 2.0  # times the longest bar


class Full(BaseModel):
    """Full fine-tuning of the same model."""

    memory: dict[str, float]
    batch_size_that_fits: int | None = None
    trainable_parameters: int | None = None


class Plan(BaseModel):
    """memory: bytes by part, and their `total` at the peak."""

    model: str | None = None
    trainable_parameters: int
    total_parameters: int
    modules: list[Module]
    left_alone: dict[str, str] = {}  # path, or a pattern of paths -> why
    memory: dict[str, float]
    full: Full | None = None
    available_bytes: float | None = None  # of the device
    batch_size: int | None = None
    batch_size_that_fits: int | None = None
    steps: int | None = None
    seconds: float | None = None  # of all steps, estimated
    notes: list[str] = []
    settings: dict[str, Any] = {}
    basis: dict[str, str] = {}  # how memory and time were found

    @property
    def ways(self) -> dict[str, dict[str, float]]:
        return {"LoRA": self.memory} | ({} if self.full is None else {"full": self.full.memory})

    @property
    def limit_shown(self) -> bool:
        """Whether what there is lies near the bars."""
        most = max(memory["total"] for memory in self.ways.values())
        return self.available_bytes is not None and self.available_bytes < NEAR * most


def plan_page(content: Mapping[str, Any]) -> Page:
    plan = Plan.model_validate(content)
    whole = f"{words.count(plan.trainable_parameters)} of {words.count(plan.total_parameters)} parameters are trained"
    lead = f"{whole}, {words.size(plan.memory['total'])} of memory are needed."
    if plan.full is not None:
        lead += f" Full fine-tuning needs {words.size(plan.full.memory['total'])}."
    numbers = [_modules(plan.modules), _left_alone(plan.left_alone), _settings(plan), _notes(plan)]
    sections = [
        Section(
            "Memory", f"At the moment when most is held. {_found(plan.basis)}", [_memory(plan), _memory_table(plan)]
        ),
        Section(
            "What is adapted",
            f"{words.plural(len(plan.modules), 'matrix', 'matrices')}.",
            [parameters(plan.modules), map_of_ranks(plan.modules), by_matrix(plan.modules)],
        ),
        Section("All numbers", "", numbers),
    ]
    title = str(plan.model or plan.settings.get("model", "model")).rstrip("/").rpartition("/")[2]
    return Page("plan", f"{title}, before any training", lead, _tiles(plan), sections)


def _found(basis: Mapping[str, str]) -> str:
    """How memory and time were found."""
    return " ".join(f"{what[:1].upper()}{what[1:]}: {how}." for what, how in basis.items())


def _tiles(plan: Plan) -> list[Tile]:
    trained = words.share(plan.trainable_parameters, plan.total_parameters)
    free = "" if plan.available_bytes is None else f"of {words.size(plan.available_bytes)} there are"
    tiles = [
        Tile("trained parameters", words.count(plan.trainable_parameters), f"{trained} of all"),
        Tile("memory, LoRA", words.size(plan.memory["total"]), free),
    ]
    if plan.full is not None:
        fits = plan.full.batch_size_that_fits
        note = "" if fits is None else f"batches of {fits} fit" if fits else "does not fit"
        tiles.append(Tile("memory, full fine-tuning", words.size(plan.full.memory["total"]), note))
    if plan.batch_size_that_fits is not None:
        note = "" if plan.batch_size is None else f"asked for: {plan.batch_size}"
        tiles.append(Tile("batch size that fits", f"{plan.batch_size_that_fits:,}", note))
    if plan.steps is not None:
        tiles.append(Tile("steps", f"{plan.steps:,}"))
    if plan.seconds is not None:
        tiles.append(Tile("time", words.duration(plan.seconds), "estimated"))
    return tiles


# ---- memory


def _memory(plan: Plan) -> Picture:
    said = "; ".join(
        f"{way} {words.size(memory['total'])}: "
        + ", ".join(f"{part} {words.size(memory[part])}" for part in PARTS if memory.get(part))
        for way, memory in plan.ways.items()
    )
    caption = "Memory by part."
    if plan.limit_shown:
        caption += f" Dashed: the {words.size(plan.available_bytes or 0)} that there are."
    return Picture("memory", partial(_draw_memory, plan), f"Stacked bars of memory. {said}.", caption, wide=True)


def _draw_memory(plan: Plan, width: float) -> Drawing:
    ways = plan.ways
    figure, axes = canvas(width, 128 + 46 * len(ways))
    for place, part in enumerate(PARTS):
        sizes = [memory.get(part, 0.0) / 1e9 for memory in ways.values()]
        if not any(sizes):
            continue
        starts = [sum(memory.get(before, 0.0) for before in PARTS[:place]) / 1e9 for memory in ways.values()]
        axes.barh(range(len(ways)), sizes, left=starts, height=0.6, color=SERIES[place], label=part)
    for place, memory in enumerate(ways.values()):
        end = sum(memory.get(part, 0.0) for part in PARTS) / 1e9
        axes.annotate(words.size(memory["total"]), (end, place), (6, 0), textcoords="offset points", va="center")
    if plan.limit_shown:
        axes.axvline((plan.available_bytes or 0) / 1e9, color=INK, linewidth=1.3, linestyle=(0, (4, 3)))
    axes.set_yticks(range(len(ways)), list(ways))
    axes.set_ylim(len(ways) - 0.45, -0.55)
    axes.margins(x=0.18)
    axes.set_xlim(left=0)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("GB")
    legend(figure, axes, 8 if width > 600 else 3)
    return Drawing(figure)


def _memory_table(plan: Plan) -> Table:
    ways = plan.ways
    rows = [
        [part, *(words.size(memory[part]) if part in memory else "–" for memory in ways.values())]
        for part in (*PARTS, "total")
        if any(part in memory for memory in ways.values())
    ]
    return Table(("part", *ways), rows)


# ---- all numbers


def _modules(modules: Sequence[Module]) -> Table:
    rows = [[each.path, each.kind, each.shape, str(each.r), f"{each.parameters:,}"] for each in modules]
    return Table(("module", "kind", "in × out", "r", "parameters"), rows, words=2, folded="All that is adapted")


def _left_alone(reasons: Mapping[str, str]) -> Table | None:
    rows = list(reasons.items())
    return Table(("left alone", "why"), rows, words=2, folded="What is left alone, and why") if rows else None


def _settings(plan: Plan) -> Table | None:
    rows = [(name, words.value(each)) for name, each in plan.settings.items()]
    return Table(("", ""), rows, words=2, folded="Settings") if rows else None


def _notes(plan: Plan) -> Points | None:
    return Points(plan.notes) if plan.notes else None
