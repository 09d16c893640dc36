"""What `train` and `demo` share: run with progress, then say whether it worked and where everything is."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from accelerate import PartialState

from tailora.cli.closing import show, summary
from tailora.cli.console import logs, note, print_json, results
from tailora.cli.flags import Settings
from tailora.cli.progress import shown
from tailora.evaluation.answers import Answer, answers
from tailora.formats.io import write_file
from tailora.report import report_if_possible
from tailora.report.run_folder import gather
from tailora.train.config import TrainConfig
from tailora.train.events import Interrupted
from tailora.train.memory import explained
from tailora.train.result import TrainResult
from tailora.train.run import run

FEWER = "what helps: --samples 0, which compares none"


def fit(settings: Settings, *, as_json: bool, questions: Sequence[str] | None = None) -> int:
    """Trains, compares answers to `questions` (by default held-out prompts), and prints.

    Raises what `run` raises; KeyboardInterrupt carries the command that goes on.
    """
    for text in settings.notes:
        note(text)
    try:
        with shown(logs()) as listener:
            result = run(settings.config, on_event=listener)
    except Interrupted as stop:
        raise KeyboardInterrupt(to_go_on(settings.config, stop)) from stop
    if not PartialState().is_main_process:
        return 0
    found = answered(result, settings.config.samples, questions)
    gather(Path(result.output_dir))
    report_if_possible(Path(result.output_dir))
    if as_json:
        print_json(summary(result))
    else:
        show(results(), settings.config, result, found)
    return 0


def to_go_on(config: TrainConfig, stop: Interrupted) -> str:
    """The command on a line of its own, to be copied."""
    command = ["tailora", "train", "--config", str(Path(config.output_dir) / "config.yaml")]
    command += ["--resume-from-checkpoint", str(stop.folder)]
    return f"everything so far is in {stop.folder}; to go on:\n{shlex.join(command)}"


def answered(result: TrainResult, count: int, questions: Sequence[str] | None) -> list[Answer]:
    """Base and tuned answers side by side, kept in samples.json."""
    held_out = result.data.eval_samples if result.data else []
    with explained("comparing answers", lambda: f"the adapter is whole, in {result.output_dir}; {FEWER}"):
        found = answers(result.model, result.tokenizer, (questions or held_out)[:count])
    content = json.dumps([asdict(answer) for answer in found], ensure_ascii=False, indent=2)
    write_file(Path(result.output_dir) / "samples.json", content.encode())
    return found
