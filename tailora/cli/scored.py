"""What `eval` shows: progress, the table of metrics, answers, gates."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from tailora.cli.console import on_terminal
from tailora.evaluation.metrics import Gate

if TYPE_CHECKING:
    from tailora.evaluation.scores import Score, Scores

SECONDS_BETWEEN_LINES = 5.0
MEANING = "Loss is in nats per token. Below each value its 95% interval, over rows."
TITLED: dict[str, Any] = {"title_justify": "left", "title_style": "bold"}


@contextmanager
def progress(console: Console) -> Iterator[Callable[[int, int], None]]:
    """Hears how many rows of how many are done: a bar on a terminal, a line every few seconds anywhere else."""
    if not on_terminal(console):
        console.print("reading model and data")
        yield _lines(console)
        return
    columns = TextColumn("rows"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _lines(console: Console) -> Callable[[int, int], None]:
    last = monotonic()

    def show_line(done: int, total: int) -> None:
        nonlocal last
        if monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = monotonic()
            console.print(f"{done:,} of {total:,} rows", soft_wrap=True)

    return show_line


def judged(gates: Sequence[Gate], values: Mapping[str, float]) -> list[dict[str, Any]]:
    """For JSON: each gate with its value, null where that is no number, and whether it is met."""
    return [
        {
            "gate": str(gate),
            "value": values[gate.metric] if math.isfinite(values[gate.metric]) else None,
            "met": gate.met(values[gate.metric]),
        }
        for gate in gates
    ]


def refused(console: Console, outcomes: Sequence[Mapping[str, Any]]) -> None:
    """The gates that are not met, the last thing that is said."""
    for each in outcomes:
        if not each["met"]:
            console.print(f"gate not met: {_worded(each)}", style="red", markup=False, soft_wrap=True)


def _worded(outcome: Mapping[str, Any]) -> str:
    value = "not a number" if outcome["value"] is None else f"{outcome['value']:.4f}"
    return f"{outcome['gate']} (it is {value})"


def show(console: Console, name: str, found: "Scores", outcomes: Sequence[Mapping[str, Any]]) -> None:
    console.print(f"{name}{_where(found)}", markup=False, soft_wrap=True)
    console.print(table(found), MEANING, sep="\n")
    for text in _left_out(found):
        console.print(f"Note: {text}", markup=False, soft_wrap=True)
    if found.samples:
        console.print(answers(found))
    for each in outcomes:
        console.print(f"gate {'met' if each['met'] else 'NOT MET'}: {_worded(each)}", markup=False, soft_wrap=True)


def _where(found: "Scores") -> str:
    data = found.data
    if data is None:
        return f" in lm-evaluation-harness {found.tasks['lm_eval']}"
    return f" on {data.source}: {data.rows:,} rows, read as {data.shape}; {data.supervised_tokens:,} tokens are judged"


def table(found: "Scores") -> Table:
    columns = {"base": found.base, "tuned": found.metrics, "tuned - base": found.change}
    if found.base is None:
        columns = {"value": found.metrics}
    made = Table(Column("metric", no_wrap=True), *columns, "rows", show_lines=True)
    for name, score in found.metrics.items():
        cells = [_spread(scores, name, "+" if head == "tuned - base" else "") for head, scores in columns.items()]
        made.add_row(name, *cells, f"{score.n:,}")
    return made


def _spread(scores: Mapping[str, "Score"] | None, name: str, sign: str) -> str:
    """The value, and below it the ends of its interval; nothing where there is none."""
    if scores is None or name not in scores:
        return ""
    score, form = scores[name], f"{sign}.{1 if name == 'perplexity' else 3}f"
    value, low, high = (format(number, form) for number in (score.value, score.low, score.high))
    return value if math.isnan(score.low) else f"{value}\n{low} to {high}"


def _left_out(found: "Scores") -> Iterator[str]:
    data = found.data
    if data is None:
        return
    if data.truncated:
        yield f"{data.truncated:,} rows were longer than --max-length and cut; the longest has {data.longest:,} tokens"
    if data.cut_away:
        yield f"{data.cut_away:,} of them were left out, with nothing to judge before the cut"
    if found.too_long:
        yield f"{found.too_long:,} rows were left out: choices or prompt longer than --max-length or the model allows"


def answers(found: "Scores") -> Table:
    """A wrong answer beyond the first few is not written to its end, so these are the first few."""
    sides = {"base": "base", "tuned": "tuned"} if found.base else {"tuned": "answer"}
    made = Table(title="The first answers", expand=True, show_lines=True, **TITLED)
    for head in ("asked", "expected", *sides.values()):
        made.add_column(head, ratio=1)
    for matches in zip(*(found.samples[side] for side in sides), strict=True):
        first = matches[0]
        marked = [Text(f"{'= ' if each.hit else ''}{each.answer}") for each in matches]
        made.add_row(Text(first.prompt), Text(first.expected), *marked)
    return made
