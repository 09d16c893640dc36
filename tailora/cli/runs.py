"""`tailora runs`: lists runs and studies, or compares two runs on what both were evaluated on."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from tailora.cli.flags import Json
from tailora.cli.main import print_json, stdout
from tailora.errors import ConfigError
from tailora.formats.run_folder import RUN
from tailora.report.blocks import Column, Section, Table
from tailora.report.format import NONE, duration, one_line, p_value, plural
from tailora.report.run_records import RunDifference, RunRecord, compare_runs, different_settings, record_of, records_in
from tailora.report.terminal import print_section
from tailora.train.significance import Change

MOST_FLIPS = 10  # answers to show
LONGEST = 300  # characters of a prompt or an answer


def runs(
    folder: Annotated[Path, Parameter(help="folder with runs and studies, or one run")] = Path("outputs"),
    other: Annotated[Path | None, Parameter(help="a second run, to compare with the first")] = None,
    /,
    *,
    json: Json = False,
) -> int:
    """List runs and studies with their results, or compare two runs.

    A comparison uses the held-out examples and prompts that both runs were evaluated on.
    """
    if other is None:
        records = records_in(folder)
        if json:
            print_json({"runs": [asdict(record) for record in records]})
        else:
            print_section(stdout(), list_section(folder, records))
        return 0
    paths = (folder, other)
    if missing := [str(path) for path in paths if not (path / RUN).is_file()]:
        raise ConfigError(f"no run in {' and '.join(missing)}; pass two runs that `tailora runs` lists")
    names = [path.resolve().name for path in paths]
    if len({*names}) == 1:
        names = [str(path) for path in paths]
    records = [record_of(path, name) for path, name in zip(paths, names, strict=True)]
    difference = compare_runs(*paths)
    if json:
        print_json({"runs": [asdict(record) for record in records], **as_json(difference)})
        return 0
    for section in comparison_sections(records, difference):
        if section.blocks or section.text:
            print_section(stdout(), section)
    return 0


def list_section(folder: Path, records: Sequence[RunRecord]) -> Section:
    if not records:
        return Section(f"No runs in {folder}", "`tailora train --output-dir FOLDER` writes one.", [])
    columns = [*map(Column, ("run", "date", "state", "result"))]
    columns += [Column(name, priority=1) for name in ("settings", "verdict", "model", "data", "time")]
    rows = []
    for record, settings in zip(records, different_settings(records), strict=True):
        changed = ", ".join(f"{name} {value}" for name, value in settings.items())
        state = record.state if record.kind in ("train", "") else f"{record.kind}, {record.state}"
        took = "" if record.seconds is None else duration(record.seconds)
        first = [record.name, record.date, state, record.result]
        rows.append([*first, changed, record.verdict.partition(". ")[0], record.model, record.data, took])
    return Section(plural(len(records), "run"), "", [Table(columns, rows, rest="more")])


def comparison_sections(records: Sequence[RunRecord], difference: RunDifference) -> list[Section]:
    """Returns what differs between two runs: settings, results, curves and answers."""
    first, second = (record.name for record in records)
    columns, settings = [*map(Column, ("", first, second))], different_settings(records)
    rows = [[name, *(str(getattr(r, name)) or NONE for r in records)] for name in ("model", "data", "state", "result")]
    rows += [[name, *(of_run.get(name, NONE) for of_run in settings)] for name in settings[0] | settings[1]]
    numbers = []
    changes = difference.metrics | ({"loss": difference.loss} if difference.loss else {})
    for name, change in changes.items():
        value, low, high = change.interval
        ends = NONE if math.isnan(low) else f"{low:+.3f} to {high:+.3f}"
        numbers.append([name, f"{value:+.3f}", ends, p_value(change.p_value), change.finding, f"{len(change.sums):,}"])
    heads = [*map(Column, ("", "difference", "95% interval", "p", "finding", "examples"))]
    text = f"{second}, compared with {first} on what both were evaluated on."
    alone = "They share no held-out examples, so their results cannot be compared."
    steps = sorted({step for curve in difference.curves for step in curve})
    points = [[f"{n:,}", *(f"{c[n]:.3f}" if n in c else NONE for c in difference.curves)] for n in steps]
    flips = [[one_line(part, LONGEST) for part in (f.prompt, f.first, f.second)] for f in difference.flipped]
    return [
        Section("Runs and settings that differ", "", [Table(columns, rows)]),
        Section("Differences", text if numbers else alone, [Table(heads, numbers)] if numbers else []),
        Section("Held-out loss by step", "", [Table([Column("step"), *columns[1:]], points)] if points else []),
        Section(
            plural(len(flips), "answer with another score", "answers with another score"),
            "",
            [Table([Column("prompt"), *columns[1:]], flips[:MOST_FLIPS])] if flips else [],
        ),
    ]


def as_json(difference: RunDifference) -> dict[str, Any]:
    def change(of: Change | None) -> dict[str, Any] | None:
        if of is None:
            return None
        value, low, high = (None if math.isnan(number) else number for number in of.interval)
        return {"value": value, "low": low, "high": high, "p": of.p_value, "finding": of.finding}

    return {
        "loss": change(difference.loss),
        "metrics": {name: change(of) for name, of in difference.metrics.items()},
        "flipped": [asdict(answer) for answer in difference.flipped],
        "curves": difference.curves,
    }
