"""What `combine`, `shrink` and `extract` share: where the result goes, which base it is for, and how it is told."""

import re
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.types import NonNegativeFloat, PositiveInt

from tailora.cli.flags import Json, flags_of, merge_settings
from tailora.cli.main import log, note, print_json, stdout
from tailora.cli.models import named
from tailora.errors import ConfigError, listing, nearest
from tailora.train.config import TrainConfig

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
    from tailora.formats.peft import ADAPTER_CONFIG
    from tailora.formats.peft_config import read_adapter_config

    named = {
        str(folder): read_adapter_config(folder / ADAPTER_CONFIG).get("base_model_name_or_path") for folder in folders
    }
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
    from tailora.train.model_loading import load_base

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
        stdout().print(line, markup=False, soft_wrap=True)


# ---- `tailora combine`: one adapter out of several.


RESULT = "default"

Sources = Annotated[
    list[str], Parameter(name="--adapter", negative=(), metavar="NAME=FOLDER", help="folder, named or not; repeatable")
]
Weights = Annotated[
    list[str] | None,
    Parameter(name="--weight", negative=(), metavar="NAME=NUMBER", help="of an adapter; without it 1; repeatable"),
]
Method = Annotated[
    Literal["cat", "svd", "ties", "dare"],
    Parameter(help="cat is exact and ranks add up; svd is the nearest of rank --r; ties and dare thin out first"),
]


def combine(
    *,
    adapter: Sources,
    weight: Weights = None,
    output_dir: OutputDir,
    method: Method = "cat",
    r: Annotated[PositiveInt | None, Parameter(help="highest rank; default: the highest of the adapters")] = None,
    density: Annotated[float | None, Parameter(help="ties: share of the entries to keep; default .2")] = None,
    drop: Annotated[float | None, Parameter(help="dare: probability of dropping an entry; default .5")] = None,
    seed: Annotated[int | None, Parameter(help="dare: of what is dropped; default 0")] = None,
    model: Base = None,
    json: Json = False,
) -> int:
    """Make one adapter out of several: the weighted sum of what they add to every layer."""
    folders = named(adapter)
    weights = weights_of(weight or [], folders)
    check_new(output_dir)
    from tailora.core.combine import Combination, check

    check(weights, Combination(method, r, density, drop, seed))  # before a model is loaded
    base = base_name(model, list(folders.values()))
    adapted, _ = load(base, folders)
    report = adapted.combine(weights, RESULT, method, r=r, density=density, drop=drop, seed=seed)
    adapted.save_adapter(output_dir, RESULT)
    sources = ", ".join(f"{each} x {value:g}" for each, value in weights.items())
    payload = {"method": method, "weights": weights, **facts(report)}
    show(f"combined {sources} by {method}", [told(report)], base, output_dir, payload, json)
    return 0


def weights_of(texts: Sequence[str], folders: Mapping[str, Path]) -> dict[str, float]:
    """Name -> weight for every adapter, 1 where none is given. Raises ConfigError with all that is wrong."""
    weights, problems = dict.fromkeys(folders, 1.0), []
    if RESULT in folders:
        problems.append(f"--adapter: {RESULT!r} is the new adapter's name; write OTHER={folders[RESULT]}")
    for text in (part for each in texts for part in each.split(",")):
        name, _, number = text.rpartition("=")
        if name not in folders:
            known = f"there are: {', '.join(folders)}{nearest(name, folders)}"
            problems.append(f"--weight {text}: write NAME=NUMBER; {known}")
            continue
        try:
            weights[name] = float(number)
        except ValueError:
            problems.append(f"--weight {text}: {number!r} is not a number")
    if problems:
        raise ConfigError(listing(problems))
    return weights


# ---- `tailora shrink`: an adapter of lower rank, by its singular values.


ShrinkFlags: Any = flags_of(TrainConfig, only=["field", "max_length"])
SOURCE = "source"


def shrink(
    *,
    adapter: Annotated[Path, Parameter(help="folder of the adapter, or of the run that made it")],
    output_dir: OutputDir,
    r: Annotated[PositiveInt | None, Parameter(help="highest rank of a layer")] = None,
    energy: Annotated[float | None, Parameter(help="share of the squared singular values to keep, such as .99")] = None,
    max_loss_increase: Annotated[
        NonNegativeFloat | None, Parameter(help="nats per token by which the loss on --data may rise")
    ] = None,
    data: Annotated[str | None, Parameter(help="held-out data for --max-loss-increase, or 'demo'")] = None,
    model: Base = None,
    json: Json = False,
    flags: ShrinkFlags = None,
) -> int:
    """Make an adapter smaller: keep the singular values that matter, layer by layer."""
    folder = next(iter(named([str(adapter)]).values()))
    check_new(output_dir)
    if (data is None) != (max_loss_increase is None):
        raise ConfigError("--max-loss-increase and --data go together: the loss is measured on the data")
    from tailora.core.compress import check

    check(r, energy, loss=data and len, budget=max_loss_increase)  # before a model is loaded
    base = base_name(model, [folder])
    chosen = merge_settings(flags, None, arguments={"model": base, **({"data": data} if data else {})})
    adapted, tokenizer = load(base, {SOURCE: folder}, device="cpu" if data is None else _device())
    if data is None:
        losses: dict[str, float] = {}
        report = adapted.shrink(SOURCE, RESULT, r=r, energy=energy)
    else:
        loss = loss_on(chosen.config, adapted, tokenizer)
        report = adapted.shrink(SOURCE, RESULT, loss=loss, budget=max_loss_increase)
        losses = {"loss_before": loss(adapted)}
        adapted.set_adapter(RESULT)
        losses["loss_after"] = loss(adapted)
    adapted.save_adapter(output_dir, RESULT)
    lines = [told(report)]
    if losses:
        lines.append(f"loss on {data}: {losses['loss_before']:.4f} before, {losses['loss_after']:.4f} after")
    show(f"shrunk {folder}", lines, base, output_dir, {**losses, **facts(report)}, json)
    return 0


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def loss_on(config: TrainConfig, model: "LoRAModel", tokenizer: Any) -> Callable[["LoRAModel"], float]:
    """The loss of this model on all of the data, in nats per supervised token; every call is told on stderr."""
    from tailora.evaluation.scores import loss_on_data

    measured = loss_on_data(config, model, tokenizer, note)

    def loss(_: "LoRAModel") -> float:
        value = measured().loss
        log(f"loss {value:.4f}")
        return value

    return loss


# ---- `tailora extract`: the adapter between a base and a fully tuned model.


ExtractFlags: Any = flags_of(TrainConfig, only=["target_modules", "exclude_modules", "modules_to_save"])
NUMBERED = re.compile(r"\.\d+\.")
SHOWN = 12  # lines of what is left over
POOR = 0.5  # relative error in the middle: most of the difference is missing


def extract(
    *,
    model: Annotated[str, Parameter(help="the base: folder or Hub id, or 'demo'")],
    tuned: Annotated[str, Parameter(help="the same model after full fine-tuning: folder or Hub id")],
    output_dir: OutputDir,
    r: Annotated[PositiveInt | None, Parameter(help="highest rank of a layer")] = None,
    energy: Annotated[float | None, Parameter(help="share of the squared singular values to keep, such as .99")] = None,
    json: Json = False,
    flags: ExtractFlags = None,
) -> int:
    """Get the adapter between a base and a tuned model, and what it cannot hold."""
    check_new(output_dir)
    config = merge_settings(flags, None, arguments={"model": model}).config.lora()
    from tailora.core.compress import check

    check(r, energy)  # before a model is loaded
    from tailora.model import LoRAModel
    from tailora.train.model_loading import load_base

    base, other = load_base(model, "stored")[0], load_base(tuned, "stored")[0]
    adapted, report = LoRAModel.from_difference(base, other, config, r=r, energy=energy)
    adapted.save_adapter(output_dir)
    left = {name: change if isfinite(change) else None for name, change in report.left_over.items()}
    payload = {"tuned": tuned, **facts(report), "left_over": left}
    lines = [told(report), *poor(report.error), *rest(report.left_over)]
    show(f"extracted from {tuned}", lines, model, output_dir, payload, json)
    return 0


def poor(error: Mapping[str, float]) -> list[str]:
    """What to do where most of the difference is not in the adapter; [] elsewhere."""
    if median(error.values()) < POOR:
        return []
    return [
        "Most of the difference is of a higher rank than the adapter's: raise --r, or --energy .9 for what it takes"
    ]


def rest(left_over: Mapping[str, float]) -> list[str]:
    """Lines about what else differs, the layers of a model taken together; [] when nothing does."""
    alike: dict[str, list[float]] = {}
    for name, change in left_over.items():
        alike.setdefault(NUMBERED.sub(".*.", name), []).append(change)
    if not alike:
        return []
    ranked = sorted(alike.items(), key=lambda each: -max(each[1]))
    lines = [
        f"  {name}{f' ({len(changes)})' if len(changes) > 1 else ''}: changed by up to {max(changes):.2%}"
        for name, changes in ranked[:SHOWN]
    ]
    more = [f"  and {len(ranked) - SHOWN} others; --json has them all"] if len(ranked) > SHOWN else []
    count = len(left_over)
    return [
        f"NOT in the adapter: {count} tensors that differ, too; --modules-to-save takes modules over:",
        *lines,
        *more,
    ]
