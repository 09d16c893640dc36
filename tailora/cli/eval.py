"""`tailora eval`: how good an adapter is on held-out data, beside its base, and gates on what must hold."""

import json as jsonlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter
from cyclopts.types import NonNegativeInt, PositiveInt
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from tailora.cli.adapters import Base, base_name
from tailora.cli.compare import page_of
from tailora.cli.flags import Json, flags_of, merge_settings
from tailora.cli.main import log, note, on_terminal, print_json, stderr, stdout
from tailora.cli.models import Quantize, load, named, recorded
from tailora.errors import ConfigError
from tailora.evaluation.metrics import METRICS, SHELL, Gate, check_gates, of_task, parse_gates, parse_metrics
from tailora.formats.run_folder import REPORT, write_report
from tailora.report import report_if_possible
from tailora.train.config import TrainConfig

if TYPE_CHECKING:
    from tailora.evaluation.lm_eval import Tasks
    from tailora.evaluation.scores import Asked, Score, Scores


# ---- What `eval` shows: progress, the table of metrics, answers, gates.


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


# ----


Flags: Any = flags_of(TrainConfig, only=["field", "max_length", "dtype"])
KIND = "eval"
NOT_MET = 4
LIGHTER = "what helps: a smaller --max-length, --quantize nf4, --dtype bfloat16, closing other programs"

Adapter = Annotated[str | None, Parameter(help="folder of an adapter, or of the run that made it")]
Data = Annotated[str | None, Parameter(help="held-out data: JSONL, JSON, CSV, Parquet, folder or Hub id, or 'demo'")]
Gates = Annotated[
    list[str] | None,
    Parameter(name="--gate", negative=(), metavar="METRIC<N", help=f"else exit code 4; repeatable; {SHELL}"),
]
Metrics = Annotated[
    list[str] | None,
    Parameter(name="--metrics", negative=(), metavar="A,B", help=f"{', '.join(METRICS)}; default: what the data has"),
]
Normalize = Annotated[
    str, Parameter(metavar="A,B", help="before answers are compared: case, punctuation, space, strip; or none")
]
Limit = Annotated[PositiveInt | None, Parameter(help="only the first so many rows")]


@Parameter(name="*", group=Group.create_ordered("lm-evaluation-harness"))
@dataclass(frozen=True, kw_only=True)
class Harness:
    """Flags named as lm_eval's."""

    tasks: Annotated[
        list[str] | None, Parameter(negative=(), metavar="A,B", help="its tasks, such as hellaswag,arc_easy")
    ] = None
    include_path: Annotated[Path | None, Parameter(help="folder with tasks of your own")] = None
    num_fewshot: Annotated[NonNegativeInt | None, Parameter(help="examples before a question")] = None
    apply_chat_template: Annotated[bool, Parameter(negative=(), help="ask as in a chat")] = False
    batch_size: Annotated[PositiveInt, Parameter(help="of its forwards")] = 8

    @property
    def names(self) -> list[str]:
        return [name for each in self.tasks or () for name in each.split(",") if name]


NO_HARNESS = Harness()


@dataclass(frozen=True)
class Trainable:
    """What is judged."""

    model: str
    adapter: str | None  # as given
    folder: Path | None  # of the adapter itself


@dataclass(frozen=True)
class Wish:
    """What it is judged by."""

    data: str | None
    gates: list[Gate]
    base: bool
    limit: int | None
    quantize: str | None
    run: TrainConfig


def eval(
    adapter: Adapter = None,
    /,
    *,
    data: Data = None,
    model: Base = None,
    metrics: Metrics = None,
    gate: Gates = None,
    base: Annotated[bool, Parameter(help="judge the base beside the adapter")] = True,
    normalize: Normalize = "strip",
    max_new_tokens: Annotated[PositiveInt, Parameter(help="longest answer, for exact_match")] = 128,
    samples: Annotated[NonNegativeInt, Parameter(help="answers to show, for exact_match")] = 3,
    limit: Limit = None,
    quantize: Quantize = None,
    harness: Harness = NO_HARNESS,
    output_dir: Annotated[Path | None, Parameter(help="folder for a report: page and numbers")] = None,
    json: Json = False,
    flags: Flags = None,
) -> int:
    """Judge an adapter on held-out data, beside its base. Without an adapter, judge --model alone."""
    started = time.monotonic()
    gates, names = parse_gates(gate or []), parse_metrics(metrics or [])
    asked = subject(adapter, model)
    beside = base and asked.folder is not None
    check_gates(
        [each for each in gates if not (harness.names and of_task(each))], list(METRICS) if data else [], base=beside
    )
    if data is None and not harness.names:
        raise ConfigError("nothing to judge by: give --data FILE, or --tasks of lm-evaluation-harness")
    _check_folder(output_dir)
    longest = None if asked.folder is None else recorded(asked.folder, "max_length")
    chosen = merge_settings(
        flags, None, defaults={"max_length": longest} if longest else {}, arguments={"model": asked.model}
    ).config
    wish = Wish(data, gates, beside, limit, quantize, chosen)
    from tailora.evaluation.scores import (
        Asked,
        normaliser,  # torch from here on
    )

    how = Asked(
        metrics=tuple(names),
        also=tuple(each.metric for each in gates if not of_task(each)),
        max_length=chosen.max_length,
        max_new_tokens=max_new_tokens,
        normalize=() if normalize == "none" else tuple(normalize.split(",")),
        limit=limit,
        shown=samples,
    )
    normaliser(how.normalize)
    found = _measured(asked, wish, how, harness)
    return _told(asked, found, gates, time.monotonic() - started, output_dir, json)


def _measured(asked: Trainable, wish: Wish, how: "Asked", harness: Harness) -> "Scores":
    from tailora.evaluation.scores import Scores, bare, score
    from tailora.train.memory import explained

    tasks = _tasks(harness, wish)
    found = Scores({}, {} if wish.base else None, {} if wish.base else None)
    with explained("evaluating", lambda: LIGHTER):
        adapters = [] if asked.folder is None or asked.adapter is None else [asked.adapter]
        loaded = load(asked.model, adapters, wish.quantize, wish.run.dtype)
        model = loaded.model if adapters else bare(loaded.model)
        if wish.data is not None:
            _warn_of_trained_data(asked, wish.data)
            with progress(stderr()) as heard:
                more: Any = {"field": wish.run.field, "base": wish.base, "note": note, "heard": heard}
                found = found.beside(score(model, loaded.tokenizer, wish.data, how, **more))
        if tasks is not None:
            from tailora.evaluation.lm_eval import How, judge_tasks

            asked_how = How(harness.num_fewshot, harness.apply_chat_template, wish.limit, harness.batch_size)
            found = found.beside(judge_tasks(model, loaded.tokenizer, tasks, asked_how, base=wish.base))
    return found


def _tasks(harness: Harness, wish: Wish) -> "Tasks | None":
    """Those asked for, with all that can be wrong found before a model is loaded."""
    if not harness.names:
        return None
    from tailora.evaluation.lm_eval import find_tasks

    tasks = find_tasks(harness.names, harness.include_path)
    check_gates(wish.gates, [*(METRICS if wish.data else ()), *tasks.metrics], base=wish.base)
    return tasks


def subject(adapter: str | None, model: str | None) -> Trainable:
    """What was asked for. Raises ConfigError, FormatError."""
    if adapter is None:
        if model is None:
            raise ConfigError("nothing to judge: give an ADAPTER, or --model M to judge a model without one")
        return Trainable(model, None, None)
    path = Path(adapter)
    whole = next((each for each in (path, path / "model") if (each / "config.json").is_file()), None)
    if whole is not None and not (path / "adapter_config.json").exists():
        if model is not None:
            raise ConfigError(f"{adapter} is a whole model, not an adapter for {model}: leave one of the two out")
        return Trainable(str(whole), None, None)
    (folder,) = named([adapter]).values()
    return Trainable(base_name(model, [folder]), adapter, folder)


def _check_folder(folder: Path | None) -> None:
    """Raises ConfigError where a report of something else would be lost."""
    if folder is None or not (folder / REPORT).exists():
        return
    try:
        kind = jsonlib.loads((folder / REPORT).read_text(encoding="utf-8")).get("kind")
    except (OSError, ValueError, AttributeError):
        kind = None
    if kind != KIND:
        raise ConfigError(f"--output-dir {folder} holds a {REPORT} of something else; give another folder")


def _warn_of_trained_data(asked: Trainable, data: str) -> None:
    """A loss on what was trained on says little."""
    from tailora.data.demo import resolve

    trained = None if asked.folder is None else recorded(asked.folder, "data")
    if not isinstance(trained, str):
        return
    mine, theirs = resolve(data, "eval_data"), resolve(trained, "data")
    if mine == theirs or (Path(mine).exists() and Path(theirs).exists() and Path(mine).samefile(theirs)):
        note(f"the adapter was trained on {data}, so what is measured on it will look too good")


def _told(
    asked: Trainable, found: "Scores", gates: Sequence[Gate], seconds: float, folder: Path | None, as_json: bool
) -> int:
    """Prints and writes what was found; the exit code."""
    from tailora.evaluation.scores import plain

    outcomes = judged(gates, found.values())
    payload = {
        "model": asked.model,
        "adapter": asked.adapter,
        **plain(found),
        "gates": outcomes,
        "seconds": seconds,
    }
    if folder is not None:
        write_report(folder, KIND, payload)
        report_if_possible(folder)
        log(page_of(folder))
    if as_json:
        print_json(payload)
    else:
        show(stdout(), asked.adapter or asked.model, found, outcomes)
    refused(stderr(), outcomes)
    return NOT_MET if any(not each["met"] for each in outcomes) else 0
