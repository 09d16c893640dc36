"""`tailora runs`: lists runs and studies, or compares two runs on what both were evaluated on."""

import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from tailora.cli.flags import Json
from tailora.cli.main import print_json, stdout
from tailora.errors import ConfigError, FormatError
from tailora.report.blocks import Answers, Block, Column, Section, Table
from tailora.report.format import NONE, decimals, duration, interval, one_line, p_value, plural, setting, signed
from tailora.report.run_records import RunRecord, different_settings, local_time, record_of, records_in, settings_text
from tailora.report.terminal import print_section

if TYPE_CHECKING:  # it loads torch
    from tailora.report.run_difference import RunDifference

DETAILS = ("verdict", "settings", "model", "data", "time")  # columns of the list
MOST_SHOWN = 12  # points of the curves, and answers
LONGEST, LONGEST_VERDICT = 300, 60  # characters of a prompt or an answer, and of a verdict in the list


def runs(
    folder: Annotated[Path, Parameter(help="folder that contains runs and studies, or one run")] = Path("outputs"),
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
            changed = different_settings(records)
            listed = [{**r.to_dict(), "settings": values} for r, values in zip(records, changed, strict=True)]
            print_json({"runs": listed})
        else:
            print_section(stdout(), list_section(folder, records))
        return 0
    folders, names = (folder, other), [str(folder), str(other)]
    pair = [record for path in folders if (record := record_of(path, str(path))) is not None]
    if wrong := {*names} - {record.name for record in pair}:
        listed_by = shlex.join(["tailora", "runs", "FOLDER"])
        raise ConfigError(f"{' and '.join(sorted(wrong))}: expected the folder of a run that `{listed_by}` lists")
    if damaged := [record.summary.verdict for record in pair if record.state == "damaged"]:
        raise FormatError("\n".join(damaged))
    from tailora.report.run_difference import compare_runs

    difference = compare_runs(folders, pair)
    if json:
        listed = [{**r.to_dict(), "settings": s} for r, s in zip(pair, different_settings(pair), strict=True)]
        print_json({"runs": listed, **difference.to_dict()})
    else:
        for section in pair_sections(pair, difference):
            print_section(stdout(), section)
    return 0


def list_section(folder: Path, records: Sequence[RunRecord]) -> Section:
    if not records:
        return Section(f"No runs in {folder}", "`tailora train --output-dir FOLDER` writes one.", [])
    rows, details = [], []
    for record, changed in zip(records, different_settings(records), strict=True):
        summary = record.summary
        state = record.state if summary.kind == "train" else f"{summary.kind}, {record.state}"
        verdict = summary.finding or textwrap.shorten(summary.verdict, LONGEST_VERDICT, placeholder=" …")
        took = "" if summary.seconds is None else duration(summary.seconds)
        rows.append([record.name, local_time(summary.date), state, record.result])
        details.append([verdict, settings_text(changed), record.model, record.data, took])
    columns, equal = [*map(Column, ("run", "date", "state", "result"))], []
    for place, (name, cells) in enumerate(zip(DETAILS, zip(*details, strict=True), strict=True)):
        if len(records) > 1 and len({*cells}) == 1:
            equal += [f"{name} {cells[0]}"] if cells[0] else []
            continue
        columns.append(Column(name, priority=place + 1))
        rows = [[*row, cell] for row, cell in zip(rows, cells, strict=True)]
    return Section(plural(len(records), "run"), f"All: {', '.join(equal)}" if equal else "", [Table(columns, rows)])


def pair_sections(pair: Sequence[RunRecord], difference: "RunDifference") -> list[Section]:
    """Returns what differs between two runs: settings, results, curves and answers."""
    names = [record.name for record in pair]
    of_runs = [Column(""), *map(Column, names)]
    changed = different_settings(pair)
    facts = {
        "state": [record.state for record in pair],
        "result": [record.result for record in pair],
        "verdict": [record.summary.finding or "" for record in pair],
        **{name: [setting(settings.get(name)) for settings in changed] for name in changed[0] | changed[1]},
    }
    rows = [[name, *(value or NONE for value in values)] for name, values in facts.items()]
    sections = [Section("Settings that differ", "", [Table(of_runs, rows)])]
    changes = {**difference.metrics, **({difference.measure: difference.loss} if difference.loss else {})}
    table: Block | None = None
    text = "They were not evaluated on the same examples or prompts, or their losses are not comparable."
    if changes:
        text = f"{names[1]} compared with {names[0]}, on the same held-out examples or prompts."
        heads = [Column(""), *(Column(name, numeric=True) for name in ("first", "second", "difference"))]
        heads += [Column("95% interval", interval=True), Column("p", numeric=True), Column("examples", numeric=True)]
        numbers = []
        for name, metric in changes.items():
            value, *ends = metric.change.interval
            shown = [decimals(metric.before.value), decimals(metric.after.value), signed(value)]
            shown += [interval((ends[0], ends[1]), signed), p_value(metric.p_value), f"{metric.answers:,}"]
            numbers.append([name, *shown, metric.finding])
        table = Table([*heads, Column("second is")], numbers)
    sections.append(Section("Results", text, [table]))
    steps = sorted({step for curve in difference.curves for step in curve})
    kept = steps[:: -(-len(steps) // MOST_SHOWN) or 1] + steps[-1:]
    if steps:
        points = [
            [f"{step:,}", *(decimals(curve.get(step)) for curve in difference.curves)] for step in sorted({*kept})
        ]
        text = "Over all held-out examples of each run, even those that the other run does not have."
        sections.append(Section(f"Held-out {difference.measure} after each step", text, [Table(of_runs, points)]))
    if difference.flipped:
        answers = [
            (one_line(a.prompt, LONGEST), one_line(a.base, LONGEST), one_line(a.tuned, LONGEST))
            for a, _, _ in difference.flipped[:MOST_SHOWN]
        ]
        title = f"Another score by {next(iter(difference.metrics))}: {plural(len(difference.flipped), 'answer')}"
        sections.append(Section(title, "", [Answers((names[0], names[1]), answers)]))
    return sections
