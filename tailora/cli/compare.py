"""`tailora compare`: compares LoRA with full fine-tuning on the user's own model and data."""

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console

from tailora.cli.flags import FIELDS, ConfigFile, Json, Settings, flags_of, merge_settings, parse_settings
from tailora.cli.main import log, note, on_terminal, print_json, stderr, stdout
from tailora.errors import ConfigError, require_packages
from tailora.report.files import write_page_if_possible
from tailora.report.terminal import print_page
from tailora.study.config import AT_THE_END, FULL, LORA, CompareConfig
from tailora.train.config import TrainConfig
from tailora.train.config_file import read_config_file

# ---- What compare and search share


def bar(console: Console) -> Callable[[int, int, float], None] | None:
    """Returns a function that shows the step on one line of a terminal; None elsewhere."""
    if not on_terminal(console):
        return None

    def show_step(step: int, steps: int, loss: float) -> None:
        end = "\r" if step < steps else "\r\x1b[K"
        console.print(f"  step {step}/{steps}  loss {loss:.3f}   ", end=end, style="dim")

    return show_step


@contextmanager
def resumable(output_dir: str) -> Iterator[None]:
    """Makes Ctrl-C say where the finished runs are and which command resumes."""
    try:
        yield
    except KeyboardInterrupt:
        command = shlex.join(["tailora", *sys.argv[1:]])
        raise KeyboardInterrupt(f"finished runs are in {output_dir}; to resume:\n{command}") from None


# ---- The command


OWN = CompareConfig.model_fields
LEFT_OUT = {"resume_from_checkpoint", "samples", "report_to", "save_steps", "streaming", "method", "learning_rate"}
LEFT_OUT |= AT_THE_END
DEFAULTS = {"output_dir": "outputs/compare"}
Flags: Any = flags_of(TrainConfig, only=FIELDS.keys() - LEFT_OUT, defaults=DEFAULTS)
STUDY = "Comparison"
StudyFlags: Any = flags_of(CompareConfig, only=OWN.keys() - {"arms"}, sections={"seeds": STUDY})

Arms = Annotated[
    list[str] | None,
    Parameter(
        name="--arm",
        negative=(),
        group=STUDY,
        help="way of training, as NAME:setting=value,...; repeatable; default: lora with the settings below",
    ),
]


def compare(
    *,
    config: ConfigFile = None,
    arm: Arms = None,
    full: Annotated[bool, Parameter(group=STUDY, help="also compare full fine-tuning")] = True,
    study: StudyFlags = None,
    json: Json = False,
    flags: Flags = None,
) -> int:
    """Compare LoRA with full fine-tuning on your model and data.

    Each gets a learning rate of its own and is trained with several seeds. After Ctrl-C the same command resumes.
    """
    require_packages("scipy", extra="study")
    in_file = {name: value for name, value in (read_config_file(config) if config else {}).items() if name in OWN}
    chosen = merge_settings(flags, config, defaults=DEFAULTS, ignore=OWN)
    return _run(chosen, CompareConfig(**{**in_file, **_arms(arm, full, in_file), **(study or {})}), json)


def _arms(typed: list[str] | None, full: bool, in_file: dict[str, Any]) -> dict[str, Any]:
    """Returns the arms that the flags give, or {} if those of the file count."""
    if typed is None and "arms" in in_file:
        return {}
    arms = dict(map(_arm, typed)) if typed else {LORA: {}}
    if typed and len(arms) < len(typed):
        raise ConfigError("two arms have the same name")
    return {"arms": {**arms, **({FULL: {"method": FULL}} if full else {})}}


def _arm(text: str) -> tuple[str, dict[str, Any]]:
    name, _, rest = text.partition(":")
    if not name or "/" in name:
        raise ConfigError(f"--arm {text}: expected NAME:setting=value,..., with a name that can be a folder's")
    return name, parse_settings(rest)


def _run(chosen: Settings, study: CompareConfig, as_json: bool) -> int:
    from tailora.report.pages.compare import compare_page  # loads torch
    from tailora.study.compare import compare as run

    for text in chosen.notes:
        note(text)
    console = stderr()
    with resumable(chosen.config.output_dir):
        comparison = run(
            chosen.config, study, log=lambda text: console.print(text, markup=False), progress=bar(console)
        )
    if as_json:
        print_json(comparison.to_dict())
    else:
        print_page(stdout(), compare_page(comparison))
    log(write_page_if_possible(Path(chosen.config.output_dir)))
    return 0
