"""The page of an evaluation."""

from dataclasses import dataclass, field
from typing import Any

from tailora.data.dataset import distinct_of
from tailora.evaluation.metrics import LABEL_METRICS, METRICS
from tailora.report.blocks import Answers, Block, Column, Number, Page, Paragraph, Section, Table
from tailora.report.format import decimals, duration, interval, plural
from tailora.report.pages.shared import INTERVAL, labels_section, numeric, settings_table
from tailora.train.answers import AnswerFacts, ComparedAnswer

CUTS = {  # counts in EvalReport.data -> note
    "truncated": "truncated at --max-length: {}; the longest has {longest:,} tokens",
    "cut_away": "skipped, because nothing is left to evaluate after truncation: {}",
    "copies": "skipped as copies of other rows: {}",
    "too_long": "skipped, because choices or prompt are longer than --max-length or the model allows: {}",
}
TUNED, BASE, CHANGE = "tuned", "base", "tuned - base"


@dataclass(frozen=True)
class Value:
    """A value with its 95% interval over n rows. value: None if it is not a number."""

    value: float | None
    interval: tuple[float, float] | None
    n: int

    def shown(self, sign: str = "") -> str:
        return f"{sign if self.value is not None and self.value >= 0 else ''}{decimals(self.value)}"

    def ends(self) -> str:
        return interval(self.interval, decimals)


@dataclass(frozen=True)
class GateOutcome:
    gate: str
    value: float | None
    met: bool

    def __str__(self) -> str:
        return f"{self.gate} (measured: {'not a number' if self.value is None else f'{self.value:.4f}'})"


@dataclass(frozen=True)
class EvalReport:
    """The report.json of an evaluation. data: None if only tasks of lm-evaluation-harness were run."""

    model: str
    adapter: str | None
    metrics: dict[str, Value]
    seconds: float
    base: dict[str, Value] | None = None
    change: dict[str, Value] | None = None
    data: dict[str, Any] | None = None
    tasks: dict[str, Any] | None = None
    answers: list[ComparedAnswer] = field(default_factory=list)
    shown_answers: int = 3
    gates: list[GateOutcome] = field(default_factory=list)
    labels: dict[str, Any] | None = None
    findings: list[str] = field(default_factory=list)  # sentences on the metrics of answers

    @property
    def rows_of_training(self) -> str:
        """Returns a note on rows that were trained on; "" if there are none, or if it is unknown."""
        data = self.data or {}
        if not data.get("trained_on"):
            return ""
        rows = plural(data["rows"] - data["cut_away"] - data["copies"], "evaluated row")
        return f"{data['trained_on']:,} of {rows} were used for training; expect worse scores on new rows"


def eval_page(report: EvalReport) -> Page:
    data, tasks, evaluated = report.data or {}, report.tasks or {}, report.adapter or report.model
    if report.data is None:
        lead = f"{evaluated} on tasks of lm-evaluation-harness {tasks.get('lm_eval', '')}".rstrip() + "."
    else:
        tokens = f"; {data['supervised_tokens']:,} tokens are scored" if data.get("supervised_tokens") else ""
        rows = distinct_of(data["rows"], data["rows"] - data.get("copies", 0), "row")
        lead = f"{evaluated} on {data['source']}: {rows}, read as {data['shape']}{tokens}."
    numbers = [
        Number(name.replace("_", " "), value.shown(), value.ends(), detail="page")
        for name, value in report.metrics.items()
        if value.value is not None
    ]
    numbers.append(Number("time", duration(report.seconds), detail="page"))
    facts = {"model": report.model, **data, **tasks}
    loss = "Loss is in nats per token."
    if report.labels is not None:
        loss = "Loss is in nats per row or word." if report.labels else "Loss is the mean squared error."
    shown: list[Block | None] = [_table(report), *map(Paragraph, report.findings)]
    sections = [
        Section("What was measured", f"{loss} Intervals are 95% intervals over the distinct rows.", shown),
        *([section] if (section := labels_section(report.labels or {})) else []),
        Section(
            "Answers",
            "The first greedy answers, scored by the first metric: ✓ for 1, ✗ for 0.",
            _answers(report),
        ),
        Section("Data", "", [settings_table("Data", ("", facts))]),
    ]
    notes = [text.format(plural(data[name], "row"), **data) for name, text in CUTS.items() if data.get(name)]
    notes += [report.rows_of_training] if report.rows_of_training else []
    where = " on training rows" if report.rows_of_training else ""
    outcomes = [f"- gate {'met' if gate.met else 'NOT MET'}{where}: {gate}" for gate in report.gates]
    gates = Section("Gates", "", [*map(Paragraph, outcomes)])
    return Page("eval", evaluated.rstrip("/").rpartition("/")[2], lead, numbers, sections, notes, gates)


def _table(report: EvalReport) -> Table:
    sides = {BASE: report.base, TUNED: report.metrics, CHANGE: report.change}
    if report.base is None:
        sides = {"value": report.metrics}
    columns = [Column("metric")]
    for side in sides:
        columns += [*numeric(side), INTERVAL]
    rows = []
    for name, value in report.metrics.items():
        row = [name]
        for side, values in sides.items():
            cell = (values or {}).get(name)
            row += ["", ""] if cell is None else [cell.shown("+" if side == CHANGE else ""), cell.ends()]
        rows.append([*row, f"{value.n:,}"])
    meanings = METRICS if report.labels is None else LABEL_METRICS
    note = "; ".join(f"{name}: {meanings[name]}" for name in report.metrics if name in meanings)
    return Table([*columns, *numeric("rows")], rows, note=f"{note}." if note else "")


def _answers(report: EvalReport) -> list[Block | None]:
    def marked(text: str, facts: AnswerFacts | None) -> str:
        score = None if facts is None else next(iter(facts.scores.values()), None)
        mark = "" if score is None else {0.0: "✗ ", 1.0: "✓ "}.get(score, f"[{decimals(score)}] ")
        return mark + text + "…" * (facts is not None and facts.is_cut)

    shown = report.answers[: report.shown_answers]
    if not shown:
        return []
    prompts = [answer.prompt + f"\n→ {answer.reference}" * bool(answer.reference) for answer in shown]
    tuned = [marked(answer.tuned, answer.after) for answer in shown]
    if report.base is None:
        return [Table([Column("prompt"), Column("answer")], [*map(list, zip(prompts, tuned, strict=True))])]
    base = [marked(answer.base, answer.before) for answer in shown]
    return [Answers((BASE, TUNED), [*zip(prompts, base, tuned, strict=True)])]
