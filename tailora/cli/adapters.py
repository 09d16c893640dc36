"""What `combine`, `shrink` and `extract` share: where the result goes, which base it is for, and how it is told."""

import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from tailora.cli.console import print_json, results
from tailora.errors import ConfigError, listing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tailora.core.combine import Truncation
    from tailora.model import LoRAModel

OutputDir = Annotated[Path, Parameter(name="--output-dir", help="new folder for the adapter")]
Base = Annotated[
    str | None,
    Parameter(name="--model", help="base model: folder or Hub id, or 'demo'; default: the one that the adapter names"),
]


def check_new(folder: Path) -> None:
    """Raises ConfigError for a folder that holds something: no adapter is written over another."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ConfigError(f"--output-dir {folder} holds something already; give a new folder")


def base_name(model: str | None, folders: Sequence[Path]) -> str:
    """The base to load: as asked, or the one that all adapters name. Raises ConfigError, FormatError."""
    if model is not None:
        return model
    from tailora.formats.peft import SETTINGS
    from tailora.formats.peft_config import read_settings

    named = {str(folder): read_settings(folder / SETTINGS).get("base_model_name_or_path") for folder in folders}
    if len(set(named.values())) > 1:
        pairs = [f"{folder} was made for {name}" for folder, name in named.items()]
        raise ConfigError(f"the adapters name different base models; give --model: {listing(pairs)}")
    found = next(iter(named.values()))
    if not isinstance(found, str) or not found:
        raise ConfigError(f"{next(iter(named))} does not name its base model: give --model")
    return found


def load(model: str, folders: Mapping[str, Path], device: str = "cpu") -> tuple["LoRAModel", "PreTrainedTokenizerBase"]:
    """The base as it is stored, with these adapters, the first of them active; in evaluation mode.

    Raises ConfigError, FormatError, BaseMismatchError.
    """
    from tailora.model import LoRAModel
    from tailora.train.load import load_base

    base, tokenizer = load_base(model, "stored", device)
    (first, folder), *others = folders.items()
    adapted = LoRAModel.from_pretrained(base, folder, first)
    for name, folder in others:
        adapted.load_adapter(folder, name)
    return adapted.to(device).eval(), tokenizer


def facts(report: "Truncation") -> dict[str, Any]:
    """For --json: rank and relative error of every layer."""
    layers = {path: {"rank": rank, "error": report.error[path]} for path, rank in report.rank.items()}
    return {"layers": layers, "worst_error": report.worst}


def told(report: "Truncation") -> str:
    """Layers, ranks and what the lower rank loses, in a line."""
    ranks = [rank for rank in report.rank.values() if rank]
    span = f"{min(ranks)}" if len(set(ranks)) == 1 else f"{min(ranks)} to {max(ranks)}"
    gone = len(report.rank) - len(ranks)
    left = f"; {gone} layers are adapted no more" if gone else ""
    if report.worst < 1e-6:
        return f"{len(ranks)} layers of rank {span}{left}; nothing is lost"
    middle = statistics.median(report.error.values())
    return (
        f"{len(ranks)} layers of rank {span}{left}; relative error of the updates: "
        f"{middle:.2%} in the middle, {report.worst:.2%} at most"
    )


def show(done: str, lines: Sequence[str], model: str, folder: Path, payload: dict[str, Any], as_json: bool) -> None:
    """The result: one JSON object, or lines that end in the command to try it."""
    if as_json:
        print_json({"output_dir": str(folder), "model": model, **payload})
        return
    following = shlex.join(["tailora", "chat", "--model", model, "--adapter", str(folder)])
    for line in (f"{done}: {lines[0]}", *lines[1:], f"written to {folder}; to try it: {following}"):
        results().print(line, markup=False, soft_wrap=True)
