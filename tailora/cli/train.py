"""`tailora train` and `tailora demo`: fine-tune a model, and show whether it worked."""

import json
import math
import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from tailora.cli.compare import page_of
from tailora.cli.flags import ConfigFile, Json, Settings, flags_of, merge_settings
from tailora.cli.main import note, print_json, stderr, stdout
from tailora.errors import CheckpointError, ConfigError
from tailora.formats.run_folder import ADAPTER, PAGE, REPORT
from tailora.report import report_if_possible
from tailora.train.config import TrainConfig

if TYPE_CHECKING:
    from tailora.evaluation.generate import Answer
    from tailora.evaluation.statistics import Interval
    from tailora.train.events import Interrupted, TrainResult

Flags: Any = flags_of(TrainConfig)


def train(*, config: ConfigFile = None, json: Json = False, flags: Flags = None) -> int:
    """Fine-tune a model on your data. `tailora data FILE` shows beforehand what it would learn from."""
    return fit(merge_settings(flags, config), as_json=json)


# ---- `tailora demo`: `tailora train` on a small model and real conversations, both fetched once.


DEFAULTS: dict[str, Any] = {
    "model": "demo",
    "data": "demo",
    "learning_rate": 1e-3,
}
FOLDER = Path("outputs/demo")
QUESTIONS = [
    "What would you do with a million dollars?",
    "Hi! What did you do this weekend?",
    "What kind of music do you like?",
]
DemoFlags: Any = flags_of(TrainConfig, defaults={**DEFAULTS, "output_dir": str(FOLDER)})


def demo(*, config: ConfigFile = None, json: Json = False, flags: DemoFlags = None) -> int:
    """Fine-tune a small model on real chats, and see what it changed. The flags are those of `train`."""
    chosen = merge_settings(flags, config, defaults=DEFAULTS)
    if "output_dir" not in chosen.config.model_fields_set:
        folder = demo_folder(chosen.config.resume_from_checkpoint)
        chosen = replace(chosen, config=chosen.config.model_copy(update={"output_dir": str(folder)}))
    return fit(chosen, as_json=json, questions=QUESTIONS)


def demo_folder(checkpoint: str | None) -> Path:
    """Returns the folder of a demo without --output-dir: that of its checkpoint, or a new one, which is created.

    Raises ConfigError if there are several processes, of which each would create a folder.
    """
    if checkpoint is not None:
        return latest_demo_folder(FOLDER) if checkpoint == "latest" else Path(checkpoint).parent
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("several processes must write to one folder: give --output-dir")
    number, folder = 1, FOLDER
    while True:
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:  # the folder of an earlier demo, or of one that starts at the same time
            number += 1
            folder = FOLDER.with_name(f"{FOLDER.name}-{number}")


def latest_demo_folder(folder: Path) -> Path:
    """Returns the one of `folder`, folder-2, ... with the newest checkpoint. Raises CheckpointError if none has one."""
    from tailora.train.checkpoint import checkpoints_in  # loads torch

    folders = [path for path in (folder, *folder.parent.glob(f"{folder.name}-*")) if path.is_dir()]
    with_checkpoint = [(checkpoints_in(path)[-1].stat().st_mtime, path) for path in folders if checkpoints_in(path)]
    if not with_checkpoint:
        raise CheckpointError(
            f"--resume-from-checkpoint latest: no {folder}, {folder}-2, ... holds a checkpoint; "
            "give the folder of a checkpoint, or start without it and with --save-steps"
        )
    return max(with_checkpoint)[1]


# ---- What a finished run says: whether it worked, how answers changed, where everything is, and what to do next.


FILES = {
    PAGE: "what came of it, to look at in a browser",
    ADAPTER: "the adapter, a PEFT folder",
    "model": "the model, a Hugging Face folder",
    "samples.json": "the answers above",
    "metrics.jsonl": "loss, learning rate, speed of every step",
    "examples.jsonl": "loss of every held-out example, before and after",
    "run.json": "settings, versions, seeds and data hash: what it takes to run it again",
    "config.yaml": "the settings, for --config",
    REPORT: "the numbers of report.html, for programs",
}
TITLED: dict[str, Any] = {"title_justify": "left", "title_style": "bold"}


def losses(result: "TrainResult") -> "dict[str, Interval] | None":
    """Held-out loss in nats per token before, after, and the change, each with a 95% interval over examples."""
    from tailora.evaluation.statistics import before_and_after

    before, after = result.before, result.after
    if before is None or after is None:
        return None
    return before_and_after(before.sums, after.sums, after.counts)


def summary(result: "TrainResult") -> dict[str, Any]:
    """The line of --json: the result's numbers, and what the evaluations say together."""
    found = losses(result) or {}
    spread = {f"eval_loss_{name}_95": None if math.isnan(each.low) else each[1:] for name, each in found.items()}
    change = {"eval_loss_change": found["change"].value} if found else {}
    return {**result.to_dict(), **change, **spread}


def show(console: Console, config: TrainConfig, result: "TrainResult", answers: "Sequence[Answer]") -> None:
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


def evaluation(result: "TrainResult") -> RenderableType:
    from tailora.evaluation.statistics import describe_change

    found = losses(result)
    if found is None or result.after is None:
        return Text("There was no held-out data, so nothing can be said about whether it worked: --eval-data FILE")
    table = Table("held-out data", "before", "after", title="Did it work?", **TITLED)
    for name, form, scale in (("loss, nats/token", ".3f", float), ("perplexity", ".1f", math.exp)):
        table.add_row(name, *(_spread(found[when], form, scale) for when in ("before", "after")))
    return Group(table, Text(describe_change(found["change"], len(result.after.counts))))


def effort(config: TrainConfig, result: "TrainResult") -> Text:
    kept = "adapter" if config.method == "lora" else "model"
    tokens = f"{result.train_tokens:,} tokens, {result.tokens_per_second:,.0f} per second of training"
    whole = f"{result.seconds:,.0f} s and at most {result.peak_memory_bytes / 1e9:.2f} GB in all"
    return Text(f"{result.steps:,} steps, {tokens}; {whole}. Kept: the {kept} of step {result.best_step}.")


def _spread(interval: "Interval", form: str, scale: Any) -> str:
    value, low, high = (format(scale(number), form) for number in interval)
    return value if math.isnan(interval.low) else f"{value}  ({low} to {high})"


def side_by_side(answers: "Sequence[Answer]") -> RenderableType:
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
    tuned = [*base, "--adapter", str(folder)] if config.method == "lora" else ["--model", str(folder / "model")]
    commands = [
        ["tailora", "chat", *tuned],
        ["tailora", "generate", *tuned, "--prompt", "What would you do with a free day?"],
        ["tailora", "data", "YOUR_DATA.jsonl" if config.data == "demo" else config.data, *base],
    ]
    return Text("\n").join([Text("Next", style="bold"), *(Text(shlex.join(command)) for command in commands)])


# ---- What `train` and `demo` share: train, compare answers, print


def fit(settings: Settings, *, as_json: bool, questions: Sequence[str] | None = None) -> int:
    """Trains, answers `questions` (by default held-out prompts) with the base and the tuned model, and prints.

    Raises what `run` raises. KeyboardInterrupt carries the command that resumes the run.
    """
    from accelerate import PartialState

    from tailora.cli.progress import shown
    from tailora.report.run_folder import gather
    from tailora.train.events import Interrupted
    from tailora.train.trainer import run

    for text in settings.notes:
        note(text)
    try:
        with shown(stderr()) as listener:
            result = run(settings.config, on_event=listener)
    except Interrupted as interrupted:
        raise KeyboardInterrupt(resume_command(settings.config, interrupted)) from interrupted
    if not PartialState().is_main_process:
        return 0
    samples = answer_samples(result, settings.config.samples, questions)
    gather(Path(result.output_dir))
    report_if_possible(Path(result.output_dir))
    if as_json:
        print_json(summary(result))
    else:
        show(stdout(), settings.config, result, samples)
    return 0


def resume_command(config: TrainConfig, interrupted: "Interrupted") -> str:
    """Returns the message after Ctrl-C; the command is on a line of its own, to be copied."""
    command = ["tailora", "train", "--config", str(Path(config.output_dir) / "config.yaml")]
    command += ["--resume-from-checkpoint", str(interrupted.folder)]
    return f"the run so far is saved in {interrupted.folder}; to resume it:\n{shlex.join(command)}"


def answer_samples(result: "TrainResult", count: int, questions: Sequence[str] | None) -> "list[Answer]":
    """Returns answers of the base and the tuned model to the first `count` questions, and writes samples.json."""
    from tailora.evaluation.generate import compare_answers
    from tailora.formats.io import write_file
    from tailora.train.memory import explain_out_of_memory

    held_out = result.data.eval_samples if result.data else []
    advice = f"the adapter is complete, in {result.output_dir}; --samples 0 compares no answers"
    with explain_out_of_memory("comparing answers", lambda: advice):
        samples = compare_answers(result.model, result.tokenizer, (questions or held_out)[:count])
    content = json.dumps([asdict(answer) for answer in samples], ensure_ascii=False, indent=2)
    write_file(Path(result.output_dir) / "samples.json", content.encode())
    return samples
