"""`tailora combine`, `tailora shrink` and `tailora extract`: new adapters from existing ones or from two models."""

import shlex
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter
from cyclopts.types import PositiveInt

from tailora.cli.flags import Json, Overwrite, flags_of, merge_settings
from tailora.cli.main import log, print_json, stdout
from tailora.cli.models import (
    ADAPTER_FLAG,
    BaseModel,
    Device,
    base_model_name,
    check_sources,
    command_to_use,
    device_of_flag,
    fetch_sources,
    find_adapter,
    labels_of,
    load_model,
    parse_adapters,
)
from tailora.errors import ConfigError, listing, nearest
from tailora.formats.run_folder import ADAPTER_FILES, check_result_folder, read_system_message, write_system_message
from tailora.report.blocks import Code, Paragraph, Section
from tailora.report.terminal import print_section
from tailora.train.config import TrainConfig

if TYPE_CHECKING:
    from tailora.core.combine import Truncation
    from tailora.data.labels import Labels

RESULT = "default"  # name of the new adapter

OutputDir = Annotated[Path, Parameter(help="new folder for the adapter")]
Rank = Annotated[PositiveInt | None, Parameter(help="maximum rank per layer")]
Energy = Annotated[
    float | None, Parameter(help="fraction of the energy (sum of squared singular values) to keep, such as 0.99")
]

# ---- `tailora combine`


Weights = Annotated[
    list[str] | None, Parameter(metavar="NAME=NUMBER", help="weight of an adapter; default: 1; repeatable")
]
Method = Annotated[
    Literal["cat", "svd", "ties", "dare"],
    Parameter(
        help="cat: exact, but the rank is the sum of all ranks; svd: best approximation of rank --r; ties, "
        "dare: drop entries, then svd"
    ),
]


def combine(
    adapter: Annotated[list[str], ADAPTER_FLAG],
    *,
    weight: Weights = None,
    output_dir: OutputDir,
    method: Method = "cat",
    r: Annotated[PositiveInt | None, Parameter(help="maximum rank; default: the highest rank of the adapters")] = None,
    density: Annotated[float | None, Parameter(help="ties: fraction of entries to keep; default: 0.2")] = None,
    drop: Annotated[float | None, Parameter(help="dare: probability of dropping an entry; default: 0.5")] = None,
    seed: Annotated[int | None, Parameter(help="dare: seed for dropping entries; default: 0")] = None,
    model: BaseModel = None,
    device: Device = "cpu",
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """Combine several adapters into one.

    In every layer, the new adapter's update is the weighted sum of the updates of all adapters.
    """
    folders = parse_adapters(adapter)
    check_result_folder(output_dir, ADAPTER_FILES, overwrite=overwrite, sources=folders.values())
    weights = parse_weights(weight or [], folders)
    base = base_model_name(model, list(folders.values()))
    log("loading the model")
    from tailora.core.combine import Combination, check_weights

    check_weights(weights)
    Combination(method=method, r=r, density=density, drop=drop, seed=seed)  # raises before models are loaded
    labels = labels_of(base, list(folders.values()))
    adapted = load_model(base, folders, quantize="none", dtype="stored", device=device, labels=labels).model
    report = adapted.combine(weights, RESULT, method, r=r, density=density, drop=drop, seed=seed)
    adapted.save_adapter(output_dir, RESULT)
    systems = {read_system_message(folder) for folder in folders.values()}
    write_system_message(output_dir, systems.pop() if len(systems) == 1 else None)
    sources = ", ".join(f"{name} x {value:g}" for name, value in weights.items())
    payload = {"model": base, "method": method, "weights": weights}
    return _finish(f"Combined {sources} by {method}", report, [], labels, output_dir, payload, json)


def parse_weights(texts: Sequence[str], folders: Mapping[str, Path]) -> dict[str, float]:
    """Returns name -> weight for every adapter, 1 by default. Raises ConfigError with all problems."""
    weights, problems = dict.fromkeys(folders, 1.0), []
    if RESULT in folders:
        problems.append(f"--adapter: the name {RESULT!r} is reserved; choose a name with NAME={folders[RESULT]}")
    for text in (part for argument in texts for part in argument.split(",")):
        name, _, number = text.rpartition("=")
        if name not in folders:
            available = f"available names: {', '.join(folders)}{nearest(name, folders)}"
            problems.append(f"--weight {text}: expected NAME=NUMBER; {available}")
            continue
        try:
            weights[name] = float(number)
        except ValueError:
            problems.append(f"--weight {text}: expected a number such as {name}=0.5, got {number!r}")
    if problems:
        raise ConfigError(listing(problems))
    return weights


# ---- `tailora shrink`


SOURCE = "source"  # name of the adapter that is shrunk


def shrink(
    adapter: Annotated[Path, Parameter(help="folder of the adapter or of its training run")],
    *,
    output_dir: OutputDir,
    r: Rank = None,
    energy: Energy = None,
    model: BaseModel = None,
    device: Device = "cpu",
    overwrite: Overwrite = False,
    json: Json = False,
) -> int:
    """Reduce the rank of an adapter.

    Every layer keeps its largest singular values; --r or --energy sets how many.
    """
    folder = find_adapter(str(adapter))
    check_result_folder(output_dir, ADAPTER_FILES, overwrite=overwrite, sources=[folder])
    base = base_model_name(model, [folder])
    log("loading the model")
    from tailora.core.compress import check

    check(r, energy)
    labels = labels_of(base, [folder])
    adapted = load_model(base, {SOURCE: folder}, quantize="none", dtype="stored", device=device, labels=labels).model
    report = adapted.shrink(SOURCE, RESULT, r=r, energy=energy)
    adapted.save_adapter(output_dir, RESULT)
    write_system_message(output_dir, read_system_message(folder))
    return _finish(f"Shrunk {folder}", report, [], labels, output_dir, {"model": base}, json)


# ---- `tailora extract`


ExtractFlags: Any = flags_of(TrainConfig, ["target_modules", "exclude_modules", "modules_to_save"])
MAX_LINES = 12  # for tensors that are not in the adapter
POOR_FIT = 0.5  # median relative error from which the adapter lacks most of the difference


def extract(
    *,
    model: Annotated[str, Parameter(help="base model: folder or Hub id, or 'demo'")],
    tuned: Annotated[str, Parameter(help="the same model after full fine-tuning: folder or Hub id")],
    output_dir: OutputDir,
    r: Rank = None,
    energy: Energy = None,
    device: Device = "cpu",
    overwrite: Overwrite = False,
    json: Json = False,
    flags: ExtractFlags = None,
) -> int:
    """Extract an adapter from a fine-tuned model and its base model.

    The adapter approximates the difference between the two models. The output lists the changed tensors that
    the adapter leaves out.
    """
    config = merge_settings(flags, None, arguments={"model": model}).lora()
    check_result_folder(output_dir, ADAPTER_FILES, overwrite=overwrite)
    for name in (model, tuned):
        check_sources(model=name)
    log("loading the model")
    from tailora.core.compress import check
    from tailora.model import LoRAModel
    from tailora.train.model_loading import load_base

    check(r, energy)
    chosen = device_of_flag(device)
    for name in (model, tuned):
        fetch_sources(name)
    base, other = (load_base(name, "stored", chosen)[0] for name in (model, tuned))
    adapted, report = LoRAModel.from_difference(base, other, config, r=r, energy=energy)
    adapted.save_adapter(output_dir)
    write_system_message(output_dir, read_system_message(Path(tuned)))
    left_over = {name: change if isfinite(change) else None for name, change in report.left_over.items()}
    payload = {"model": model, "tuned": tuned, "left_over": left_over}
    lines = _left_over_lines(report.left_over)
    if median(report.error.values()) >= POOR_FIT:
        lines.insert(0, "The rank is too low to capture most of the difference between the models; raise --r")
    return _finish(f"Extracted from {tuned}", report, lines, None, output_dir, payload, json)


def _left_over_lines(left_over: Mapping[str, float]) -> list[str]:
    if not left_over:
        return []
    largest_first = sorted(left_over.items(), key=lambda item: -item[1])
    lines = [f"  {name}: changed by {change:.2%}" for name, change in largest_first[:MAX_LINES]]
    if len(left_over) > MAX_LINES:
        lines.append(f"  ... and {len(left_over) - MAX_LINES} more (use --json to see all)")
    return [f"{len(left_over)} changed tensors are NOT in the adapter; to include them, use --modules-to-save:", *lines]


# ---- What all three print


def _finish(
    title: str,
    report: "Truncation",
    lines: Sequence[str],
    labels: "Labels | None",
    folder: Path,
    payload: dict[str, Any],
    as_json: bool,
) -> int:
    """Prints one JSON object with `payload`, or a summary, `lines` and a command to try the adapter."""
    if as_json:
        layers = {path: {"rank": rank, "error": report.error[path]} for path, rank in report.rank.items()}
        print_json({"output_dir": str(folder), **payload, "layers": layers, "worst_error": report.worst})
        return 0
    ranks = list(report.rank.values())
    span = f"{min(ranks)}" if len(set(ranks)) == 1 else f"{min(ranks)} to {max(ranks)}"
    errors = "nothing is lost"
    if report.worst >= 1e-6:
        middle = median(report.error.values())
        errors = f"relative error of the updates: {middle:.2%} (median), {report.worst:.2%} (largest)"
    texts = [f"{len(ranks)} layers of rank {span}; {errors}", *lines]
    command = shlex.join(command_to_use(payload["model"], str(folder), labels))
    blocks: list[Any] = [*map(Paragraph, texts), Code(command, title=f"Written to {folder}. To try it:")]
    print_section(stdout(), Section(title, "", blocks))
    return 0
