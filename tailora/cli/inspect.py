"""`tailora inspect ADAPTER`: what an adapter has learned, where, and what follows from it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.types import NonNegativeInt
from rich.progress import BarColumn, Progress, TextColumn

from tailora.cli.adapters import check_new
from tailora.cli.console import aside, logs, on_terminal, print_json, results
from tailora.cli.flags import Json, flags_of, settings
from tailora.cli.models import Quantize, chosen_method, is_lora_file, recorded
from tailora.cli.studying import page_of
from tailora.errors import ConfigError
from tailora.formats.run_folder import SETTINGS, adapter_in

FLAGS: Any = flags_of({}, only=["field", "max_length"])
NONE_GIVEN = FLAGS()

Source = Annotated[str, Parameter(name="adapter", help="folder of an adapter or of a run, or a LoRA's .safetensors")]
Model = Annotated[
    str | None,
    Parameter(help="its base: folder or Hub id, or 'demo'; for ||dW|| / ||W||, intruder dimensions and --data"),
]
With = Annotated[str | None, Parameter(name="--with", help="another adapter of the same base, to be compared with")]
Data = Annotated[
    str | None, Parameter(help="held-out data, or 'demo': what the smaller singular values are worth there")
]
Forgetting = Annotated[str | None, Parameter(help="texts of other tasks; by default what the base writes")]
OutputDir = Annotated[Path | None, Parameter(name="--output-dir", help="new folder for a report with all numbers")]


def inspect(
    adapter: Source,
    /,
    *,
    with_: With = None,
    model: Model = None,
    data: Data = None,
    forgetting_data: Forgetting = None,
    intruders: Annotated[bool, Parameter(help="count intruder dimensions, by far the slowest part")] = True,
    quantize: Quantize = None,
    seed: Annotated[NonNegativeInt, Parameter(help="of the random updates that intruders are compared with")] = 0,
    all_: Annotated[bool, Parameter(name="--all", negative=(), help="a row for every module")] = False,
    output_dir: OutputDir = None,
    json: Json = False,
    flags: Annotated[FLAGS, Parameter(name="*")] = NONE_GIVEN,
) -> int:
    """Look into an adapter: ranks and energy of every module; beside its base, what is new; on data, what it is worth.

    Advice follows from stated rules, each with its numbers (docs/inspect.md).
    """
    folder = found_at(adapter)
    second = None if with_ is None else found_at(with_)
    if output_dir is not None:
        check_new(output_dir)
    if model is None and (data is not None or forgetting_data is not None):
        raise ConfigError(f"--data and --forgetting-data need the base model: give --model{_hint(folder)}")
    from tailora.cli.inspected import show
    from tailora.study.inspect import Asked, write_report
    from tailora.study.inspect import inspect as run

    longest = recorded(folder, "max_length")
    read = settings(flags, None, {"max_length": longest} if longest else {}, {"data": data} if data else {}).config
    asked = Asked(data, read.field, read.max_length, forgetting_data, intruders, seed)
    method = None if model is None else chosen_method([each for each in (folder, second) if each], quantize)
    with _bar() as progress:
        found = run(folder, model, data, other=second, asked=asked, quantize=method, say=aside, progress=progress)
    if output_dir is not None:
        write_report(found, output_dir)
        aside(page_of(output_dir))
    if json:
        print_json(found.to_dict())
    else:
        show(results(), found, every=all_)
    return 0


def found_at(text: str) -> Path:
    """The adapter's own folder or file. Raises ConfigError where there is nothing."""
    path = adapter_in(Path(text))
    if not (path.is_dir() or is_lora_file(path)):
        raise ConfigError(f"{text} is not a folder; give that of an adapter or of a run")
    return path


def _hint(folder: Path) -> str:
    """The base that the adapter names, if it does."""
    from tailora.formats.peft_config import read_settings

    path = folder / SETTINGS
    name = read_settings(path).get("base_model_name_or_path") if path.is_file() else None
    return f" {name}" if isinstance(name, str) and name else " FOLDER"


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    """What hears of each module that was looked at: a bar, on a terminal only."""
    if not on_terminal(logs()):
        yield lambda *_: None
        return
    with Progress(
        TextColumn("modules"),
        BarColumn(bar_width=20),
        TextColumn("{task.completed}/{task.total}"),
        console=logs(),
        transient=True,
    ) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, of: bar.update(task, completed=done, total=of)
