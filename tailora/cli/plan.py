"""`tailora plan`: what would be trained, what it takes and how long, before any training."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tailora.cli.flags import FIELDS, ConfigFile, Json, flags_of, merge_settings
from tailora.cli.main import log, note, print_json, stdout
from tailora.errors import ConfigError
from tailora.report import report_if_possible
from tailora.train.config import TrainConfig

if TYPE_CHECKING:
    from tailora.study.plan import Plan

LEFT_OUT = {"output_dir", "resume_from_checkpoint", "samples", "report_to"}
Flags: Any = flags_of(TrainConfig, only=FIELDS.keys() - LEFT_OUT)
UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
SIZE = re.compile(rf"([\d.]+(?:e\d+)?) ?({'|'.join(filter(None, UNITS))})?B?", re.IGNORECASE)
TABLE: dict[str, Any] = {"title_justify": "left", "title_style": "bold", "box": SIMPLE_HEAD, "padding": (0, 1, 0, 0)}

Measure = Annotated[bool, Parameter(negative=(), help="take a few real steps, too, and go by them", show_default=False)]
Room = Annotated[str | None, Parameter(name="--memory", help="memory to fit into, 8GB say; without it, what is free")]
OutputDir = Annotated[Path | None, Parameter(name="--output-dir", help="folder for a report with all numbers")]


def plan(
    *,
    config: ConfigFile = None,
    measure: Measure = False,
    memory: Room = None,
    output_dir: OutputDir = None,
    json: Json = False,
    flags: Flags = None,
) -> int:
    """Show what a run would train, whether it fits, and how long it takes; no weights are read unless --measure.

    The flags are those of `tailora train`. Without --data every example is taken to have --max-length tokens.
    """
    room = None if memory is None else bytes_of(memory)
    chosen = merge_settings(flags, config)
    for text in chosen.notes:
        note(text)
    from tailora.study.plan import plan as run  # torch from here on

    found = run(chosen.config, measure, memory=room, output_dir=output_dir, say=log)
    if output_dir is not None:
        report_if_possible(output_dir)
    if json:
        print_json(found.to_dict())
    else:
        show(stdout(), found)
    return 0


def bytes_of(text: str) -> int:
    """'8GB', '512 MiB', '8e9'. Raises ConfigError."""
    if (found := SIZE.fullmatch(text.strip())) is not None:
        number, unit = found.groups()
        scale = next(size for name, size in UNITS.items() if name.lower() == (unit or "").lower())
        try:
            return int(float(number) * scale)
        except ValueError:
            pass
    raise ConfigError(f"--memory {text}: expected a number and a unit, such as 8GB or 512MiB")


# ---- on the screen


def show(console: Console, found: "Plan") -> None:
    parts = [adapted(found), left(found), memory_table(found), *said(found)]
    for part in parts:
        if part is not None:
            console.print(part, "", sep="\n", soft_wrap=isinstance(part, Text))


def adapted(found: "Plan") -> Table | None:
    if not found.groups:
        return None
    share = found.trainable_parameters / found.total_parameters
    title = f"Trained: {found.trainable_parameters:,} of {found.total_parameters:,} parameters ({share:.2%})"
    table = Table(title=title, **TABLE)
    table.add_column("path", overflow="fold")
    table.add_column("kind", overflow="fold")
    for name in ("shape", "r", "alpha", "parameters"):
        table.add_column(name, justify="right")
    for each in found.groups:
        shape = " x ".join(map(str, each.shape))
        r, alpha = ("-" if value is None else f"{value:g}" for value in (each.r, each.alpha))
        table.add_row(Text(each.path), each.kind, shape, r, alpha, f"{each.parameters:,}")
    return table


def left(found: "Plan") -> Table | None:
    if not found.left:
        return None
    table = Table(title="Left as they are", **TABLE)
    table.add_column("path", overflow="fold")
    table.add_column("parameters", justify="right")
    table.add_column("why", overflow="fold")
    for each in found.left:
        table.add_row(Text(each.path), f"{each.parameters:,}", each.reason)
    return table


def memory_table(found: "Plan") -> Table:
    """Both ways, by part."""
    from tailora.train.memory import format_bytes

    ways = {"LoRA" if found.full else "full fine-tuning": found.memory.to_dict()}
    if found.full:
        ways["full fine-tuning"] = found.full.memory.to_dict()
    table = Table(title=f"Memory at the largest moment, {found.dtype} on {found.device}", **TABLE)
    table.add_column("")
    for name in ways:
        table.add_column(name, justify="right")
    for part in found.memory.to_dict():
        last = part == "total"
        cells = [format_bytes(way[part]) if way[part] else "-" for way in ways.values()]
        table.add_row(part, *cells, style="bold" if last else None)
    fits = [found.batch_size_that_fits, *([found.full.batch_size_that_fits] if found.full else [])]
    table.add_section()
    table.add_row("batch size that fits", *(f"{count:,}" if count else "none" for count in fits))
    return table


def said(found: "Plan") -> list[Text]:
    """In words: whether it fits, steps and time, how that was found."""
    from tailora.train.memory import format_bytes

    verdict = "It fits" if found.fits else "It does not fit"
    forward = found.largest_forward
    lines = [
        f"{verdict}: {format_bytes(found.memory.total)} of {format_bytes(found.available_bytes)}. The largest forward "
        f"has {forward['examples']:,} examples of {forward['tokens']:,} tokens together.",
        f"Memory: {found.basis['memory']}.",
        _steps(found),
        found.kernels,
    ]
    return [Text("\n".join(lines)), *(Text(f"Note: {text}") for text in found.notes)]


def _steps(found: "Plan") -> str:
    each = "" if found.seconds_per_step is None else f"{duration(found.seconds_per_step)} each"
    if found.steps is None:
        return f"Steps: {each} ({found.basis['time']}); how many is known with --data or --max-steps."
    whole = "" if found.seconds is None else f", {duration(found.seconds)} together"
    return f"Steps: {found.steps:,}, {each}{whole} ({found.basis['time']})."


def duration(seconds: float) -> str:
    for name, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {name}"
    return f"{seconds:.2g} s"
