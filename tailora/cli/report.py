"""What a finished run says: whether it worked, how answers changed, where everything is, and what to do next."""

import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from tailora.measure.answers import Answer
from tailora.measure.intervals import mean_interval, paired_difference
from tailora.train.config import TrainConfig
from tailora.train.run import TrainResult

Interval = tuple[float, float, float]  # estimate, low, high
FILES = {
    "adapter": "the adapter, a PEFT folder",
    "samples.json": "prompts answered before and after",
    "metrics.jsonl": "loss, learning rate, speed of every step",
    "run.json": "settings, versions, seeds and data hash: what it takes to run it again",
    "config.yaml": "the settings, for --config",
}


def losses(result: TrainResult) -> dict[str, Interval] | None:
    """Held-out loss in nats per token before, after, and their difference, each with a 95% interval over examples."""
    if result.before is None or result.after is None:
        return None
    before, after = result.before, result.after
    return {
        "before": mean_interval(before.sums, before.counts),
        "after": mean_interval(after.sums, after.counts),
        "change": paired_difference(before.sums, after.sums, after.counts),
    }


def show(console: Console, config: TrainConfig, result: TrainResult, answers: Sequence[Answer]) -> None:
    found = losses(result)
    parts = [
        _losses(found, len(result.after.counts))
        if found and result.after
        else Text("no held-out data: nothing was evaluated"),
        *([_answers(answers)] if answers else []),
        _files(Path(result.output_dir)),
        _next(config, Path(result.output_dir)),
    ]
    for part in parts:
        console.print()
        console.print(part, soft_wrap=isinstance(part, Text))


def _losses(found: dict[str, Interval], examples: int) -> Group:
    table = Table("held-out reply", "before", "after", title="Did it work?", title_justify="left", title_style="bold")
    table.add_row("loss, nats/token", *(_interval(found[when], "{:.3f}") for when in ("before", "after")))
    table.add_row("perplexity", *(_interval(_exp(found[when]), "{:.1f}") for when in ("before", "after")))
    return Group(table, Text(verdict(found["change"], examples)))


def verdict(change: Interval, examples: int) -> str:
    """The change in words; an interval that holds 0 is no proof of any."""
    value, low, high = change
    where = f"95% interval {low:+.3f} to {high:+.3f}, over {examples} held-out examples"
    if low <= 0 <= high:
        return f"No change shown: {value:+.3f} nats per token ({where})."
    return f"Held-out loss went {'down' if value < 0 else 'UP'} by {abs(value):.3f} nats per token ({where})."


def _exp(interval: Interval) -> Interval:
    low, middle, high = map(math.exp, interval)
    return low, middle, high


def _interval(interval: Interval, form: str) -> str:
    value, low, high = (form.format(number) for number in interval)
    return f"{value}  ({low} to {high})"


def _answers(answers: Sequence[Answer]) -> Table:
    table = Table(
        "base",
        "tuned",
        title="Answers before and after",
        title_justify="left",
        title_style="bold",
        show_lines=True,
        expand=True,
    )
    for answer in answers:
        question = Text(answer.prompt, style="bold")
        table.add_row(Group(question, Text(answer.base)), Group(Text(), Text(answer.tuned)))
    return table


def _files(folder: Path) -> Table:
    table = Table(title="Written", title_justify="left", title_style="bold", show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column()
    for name, content in FILES.items():
        if (folder / name).exists():
            table.add_row(Text(str(folder / name)), content)
    return table


def _next(config: TrainConfig, folder: Path) -> Text:
    commands = [
        ["tailora", "chat", "--model", config.model, "--adapter", str(folder)],
        [
            "tailora",
            "generate",
            "--model",
            config.model,
            "--adapter",
            str(folder),
            "--prompt",
            "What would you do with a million dollars?",
        ],
        ["tailora", "data", "YOUR.jsonl", "--model", config.model],
    ]
    return Text("\n".join(["Next", *(f"  {shlex.join(command)}" for command in commands)]))
