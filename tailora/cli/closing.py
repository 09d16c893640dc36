"""What a finished run says: whether it worked, how answers changed, where everything is, and what to do next."""

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from tailora.cli.studying import page_of
from tailora.evaluation.answers import Answer
from tailora.evaluation.change import changes, verdict
from tailora.evaluation.intervals import Interval
from tailora.report import CONTENT, PAGE
from tailora.train.config import TrainConfig
from tailora.train.result import TrainResult
from tailora.train.subject import ADAPTER, MODEL

FILES = {
    PAGE: "what came of it, to look at in a browser",
    ADAPTER: "the adapter, a PEFT folder",
    MODEL: "the model, a Hugging Face folder",
    "samples.json": "the answers above",
    "metrics.jsonl": "loss, learning rate, speed of every step",
    "examples.jsonl": "loss of every held-out example, before and after",
    "run.json": "settings, versions, seeds and data hash: what it takes to run it again",
    "config.yaml": "the settings, for --config",
    CONTENT: "the numbers of report.html, for programs",
}
TITLED: dict[str, Any] = {"title_justify": "left", "title_style": "bold"}


def losses(result: TrainResult) -> dict[str, Interval] | None:
    """Held-out loss in nats per token before, after, and the change, each with a 95% interval over examples."""
    before, after = result.before, result.after
    if before is None or after is None:
        return None
    return changes(before.sums, after.sums, after.counts)


def summary(result: TrainResult) -> dict[str, Any]:
    """The line of --json: the result's numbers, and what the evaluations say together."""
    found = losses(result) or {}
    spread = {f"eval_loss_{name}_95": None if math.isnan(each.low) else each[1:] for name, each in found.items()}
    change = {"eval_loss_change": found["change"].value} if found else {}
    return {**result.to_dict(), **change, **spread}


def show(console: Console, config: TrainConfig, result: TrainResult, answers: Sequence[Answer]) -> None:
    folder = Path(result.output_dir)
    parts = (
        evaluation(result),
        effort(config, result),
        side_by_side(answers),
        written(folder, bool(answers)),
        following(config, folder),
    )
    for part in parts:
        console.print("", part, sep="\n", soft_wrap=isinstance(part, Text))


def evaluation(result: TrainResult) -> RenderableType:
    found = losses(result)
    if found is None or result.after is None:
        return Text("There was no held-out data, so nothing can be said about whether it worked: --eval-data FILE")
    table = Table("held-out data", "before", "after", title="Did it work?", **TITLED)
    for name, form, scale in (("loss, nats/token", ".3f", float), ("perplexity", ".1f", math.exp)):
        table.add_row(name, *(_spread(found[when], form, scale) for when in ("before", "after")))
    return Group(table, Text(verdict(found["change"], len(result.after.counts))))


def effort(config: TrainConfig, result: TrainResult) -> Text:
    kept = "adapter" if config.method == "lora" else "model"
    tokens = f"{result.train_tokens:,} tokens, {result.tokens_per_second:,.0f} per second of training"
    whole = f"{result.seconds:,.0f} s and at most {result.peak_memory_bytes / 1e9:.2f} GB in all"
    return Text(f"{result.steps:,} steps, {tokens}; {whole}. Kept: the {kept} of step {result.best_step}.")


def _spread(interval: Interval, form: str, scale: Any) -> str:
    value, low, high = (format(scale(number), form) for number in interval)
    return value if math.isnan(interval.low) else f"{value}  ({low} to {high})"


def side_by_side(answers: Sequence[Answer]) -> RenderableType:
    if not answers:
        return Text("No answers were compared: there was no held-out prompt, or --samples is 0.")
    table = Table(title="Answers before and after", expand=True, show_lines=True, **TITLED)
    for name, ratio in (("asked", 2), ("base", 3), ("tuned", 3)):
        table.add_column(name, ratio=ratio)
    for answer in answers:
        table.add_row(Text(answer.prompt), Text(answer.base), Text(answer.tuned))
    return table


def written(folder: Path, answered: bool) -> Table:
    table = Table("", "", title="Written", show_header=False, box=None, **TITLED)
    for name, content in FILES.items():
        if (folder / name).exists() and (answered or name != "samples.json"):
            table.add_row(Text(str(folder / name), overflow="fold"), content)
    if not (folder / PAGE).exists():
        table.caption, table.caption_justify = page_of(folder), "left"
    return table


def following(config: TrainConfig, folder: Path) -> Text:
    """Three commands to try, each on a line of its own, to be copied."""
    base = ["--model", config.model]
    tuned = [*base, "--adapter", str(folder)] if config.method == "lora" else ["--model", str(folder / MODEL)]
    commands = [
        ["tailora", "chat", *tuned],
        ["tailora", "generate", *tuned, "--prompt", "What would you do with a free day?"],
        ["tailora", "data", "YOUR_DATA.jsonl" if config.data == "demo" else config.data, *base],
    ]
    return Text("\n").join([Text("Next", style="bold"), *(Text(shlex.join(command)) for command in commands)])
