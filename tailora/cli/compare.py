"""`tailora compare`: LoRA against full fine-tuning on the user's own model and data."""

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tailora.cli.flags import (
    FIELDS,
    ConfigFile,
    Json,
    Settings,
    changes,
    flags_beside,
    flags_of,
    given,
    read_mapping,
    settings,
)
from tailora.cli.main import aside, logs, note, on_terminal, print_json, results
from tailora.errors import ConfigError, require_packages
from tailora.formats.run_folder import PAGE
from tailora.report import report_if_possible, words
from tailora.study.config import AT_THE_END, FULL, LORA, CompareConfig

# ---- What the commands of studies share: a line that shows the step, and what to type after Ctrl-C.


def bar(console: Console) -> Callable[[int, int, float], None] | None:
    """One line that is written over, on a terminal only."""
    if not on_terminal(console):
        return None

    def show_step(step: int, steps: int, loss: float) -> None:
        end = "\r" if step < steps else "\r\x1b[K"
        console.print(f"  step {step}/{steps}  loss {loss:.3f}   ", end=end, style="dim")

    return show_step


def page_of(folder: Path) -> str:
    """Where the page of a run or a study is, or what it takes to have one."""
    if (folder / PAGE).exists():
        return f"a page with all of it: {folder / PAGE}"
    return f"a page with all of it: pip install 'tailora[study]' && tailora report {shlex.quote(str(folder))}"


@contextmanager
def resumable(output_dir: str) -> Iterator[None]:
    """Ctrl-C says where the finished runs are and which command goes on."""
    try:
        yield
    except KeyboardInterrupt:
        again = shlex.join(["tailora", *sys.argv[1:]])
        raise KeyboardInterrupt(f"finished runs are in {output_dir}; to go on:\n{again}") from None


# ----


OWN = CompareConfig.model_fields
LEFT_OUT = {"resume_from_checkpoint", "samples", "report_to", "save_steps", "streaming", "method", "learning_rate"}
LEFT_OUT |= AT_THE_END
FLAGS: Any = flags_of({"output_dir": "outputs/compare"}, FIELDS.keys() - LEFT_OUT)
NONE_GIVEN = FLAGS()
STUDY = "Comparison"
TITLED: dict[str, Any] = {"title_justify": "left", "title_style": "bold"}
STUDY_FLAGS: Any = flags_beside(CompareConfig, STUDY, [name for name in OWN if name != "arms"])
NO_STUDY_FLAGS = STUDY_FLAGS()

Arms = Annotated[
    list[str] | None,
    Parameter(
        name="--arm",
        negative=(),
        group=STUDY,
        help="NAME:setting=value,...; repeatable; without it one arm, 'lora', with the settings below",
    ),
]


def compare(
    *,
    config: ConfigFile = None,
    arm: Arms = None,
    full: Annotated[bool, Parameter(group=STUDY, help="an arm of full fine-tuning, too")] = True,
    study: Annotated[STUDY_FLAGS, Parameter(name="*")] = NO_STUDY_FLAGS,
    json: Json = False,
    flags: Annotated[FLAGS, Parameter(name="*")] = NONE_GIVEN,
) -> int:
    """Compare LoRA with full fine-tuning, each at a learning rate of its own, over several seeds.

    Interrupted, the same command goes on.
    """
    require_packages("scipy", extra="study")
    written = {name: value for name, value in (read_mapping(config) if config else {}).items() if name in OWN}
    chosen = settings(flags, config, {"output_dir": "outputs/compare"}, others=OWN)
    return _run(chosen, CompareConfig(**{**written, **_arms(arm, full, written), **given(study)}), json)


def _arms(typed: list[str] | None, full: bool, written: dict[str, Any]) -> dict[str, Any]:
    """The arms that were asked for; {} leaves the file's."""
    if typed is None and "arms" in written:
        return {}
    arms = dict(map(_arm, typed)) if typed else {LORA: {}}
    if typed and len(arms) < len(typed):
        raise ConfigError("two arms have the same name")
    return {"arms": {**arms, **({FULL: {"method": FULL}} if full else {})}}


def _arm(text: str) -> tuple[str, dict[str, Any]]:
    name, _, rest = text.partition(":")
    if not name or "/" in name:
        raise ConfigError(f"--arm {text}: expected NAME:setting=value,..., with a name that can be a folder's")
    return name, changes(rest)


def _run(chosen: Settings, study: CompareConfig, as_json: bool) -> int:
    from tailora.study.compare import compare as run  # torch from here on

    for text in chosen.notes:
        note(text)
    console = logs()
    with resumable(chosen.config.output_dir):
        comparison = run(
            chosen.config, study, say=lambda text: console.print(text, markup=False), progress=bar(console)
        )
    if as_json:
        print_json(comparison.to_dict())
    else:
        show(results(), comparison)
    report_if_possible(Path(chosen.config.output_dir))
    aside(page_of(Path(chosen.config.output_dir)))
    return 0


def show(console: Console, comparison: Any) -> None:
    seeds, examples = len(comparison.seeds), comparison.judged_examples
    title = f"{comparison.steps} steps, {words.plural(seeds, 'seed')}, judged on {examples} held-out examples"
    quality = Table(
        "arm", "best rate", "held-out loss", f"- {comparison.reference}", title=title, show_lines=True, **TITLED
    )
    cost = Table("arm", "training", "memory", "trained", "on disk", "KL from base", title="What it costs", **TITLED)
    for arm in comparison.arms:
        if arm.outcome == "done":
            quality.add_row(*_quality(arm))
            cost.add_row(*_cost(arm))
    console.print(quality, f"With 95% intervals. The base has {comparison.base_loss:.3f}.", "", cost, sep="\n")
    console.print("KL: nats per token, on text that the task did not ask for: what was forgotten.")
    console.print("", Text(comparison.verdict, style="bold"), sep="\n", soft_wrap=True)
    for text in comparison.notes:
        console.print(f"Note: {text}", markup=False, soft_wrap=True)


def _quality(arm: Any) -> list[str]:
    (low, high), apart = arm.interval, arm.difference
    return [
        arm.name,
        f"{words.rate(arm.learning_rate)}{'' if arm.bracketed else ' (edge)'}",
        f"{arm.eval_loss:.3f}\n{low:.3f} to {high:.3f}",
        f"{apart['value']:+.3f}\n{apart['low']:+.3f} to {apart['high']:+.3f}" if apart else "",
    ]


def _cost(arm: Any) -> list[str]:
    return [
        arm.name,
        words.duration(arm.seconds),
        words.size(arm.peak_memory_bytes),
        words.count(arm.trainable_parameters),
        words.size(arm.bytes),
        f"{arm.forgetting['kl']:.3f}" if arm.forgetting else "",
    ]
