"""What `train` and `demo` share: run with progress, then say whether it worked and where everything is."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from tailora.cli.console import logs, note, print_json, results
from tailora.cli.options import Settings
from tailora.cli.progress import shown
from tailora.cli.report import losses, show
from tailora.formats.atomic import write_file
from tailora.measure.answers import Answer, answers
from tailora.train.config import TrainConfig
from tailora.train.events import Interrupted
from tailora.train.run import TrainResult, run

INTERRUPTED = 130


def fit(settings: Settings, *, as_json: bool, questions: Sequence[str] | None = None) -> int:
    """Trains, compares answers to `questions` (by default held-out prompts), prints, and returns the exit code."""
    for text in settings.notes:
        note(text)
    try:
        with shown(logs()) as listener:
            result = run(settings.config, on_event=listener)
    except Interrupted as stop:
        return stopped(settings.config, stop)
    found = answered(result, settings.config.samples, questions)
    if as_json:
        print_json({**result.to_dict(), "intervals": losses(result)})
    else:
        show(results(), settings.config, result, found)
    return 0


def stopped(config: TrainConfig, stop: Interrupted) -> int:
    command = ["tailora", "train", "--config", str(Path(config.output_dir) / "config.yaml")]
    command += ["--resume-from-checkpoint", str(stop.folder)]
    logs().print(
        f"Stopped; everything so far is in {stop.folder}. This goes on:\n{shlex.join(command)}",
        markup=False,
        soft_wrap=True,
    )
    return INTERRUPTED


def answered(result: TrainResult, count: int, questions: Sequence[str] | None) -> list[Answer]:
    """Base and tuned answers side by side, kept in samples.json."""
    prompts = list(questions) if questions is not None else result.data.eval_samples
    found = answers(result.model, result.tokenizer, prompts[:count])
    rows = [{"prompt": answer.prompt, "base": answer.base, "tuned": answer.tuned} for answer in found]
    write_file(Path(result.output_dir) / "samples.json", json.dumps(rows, ensure_ascii=False, indent=2).encode())
    return found
