"""`tailora inspect ADAPTER`: what an adapter has learned, where, and what follows from it."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.types import NonNegativeInt
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from tailora.cli.compare import page_of
from tailora.cli.flags import Json, flags_of, merge_settings
from tailora.cli.main import log, on_terminal, print_json, stderr, stdout
from tailora.cli.models import AdapterPath, Quantize, base_model_of, find_adapter, quantize_method, recorded
from tailora.core.patterns import layer_index
from tailora.errors import ConfigError
from tailora.evaluation.spectral import ModuleReport
from tailora.formats.run_folder import write_report
from tailora.report import report_if_possible
from tailora.study.advice import cost_limit, first_few
from tailora.study.inspection import AdapterOverlap, Advice, HeldOutLosses, Inspection, ModuleOverlap, TruncationCost
from tailora.study.model_layout import DEPTHS, depth_of, layer_range
from tailora.train.config import TrainConfig

Flags: Any = flags_of(TrainConfig, only=["field", "max_length"])

Model = Annotated[
    str | None,
    Parameter(help="base model: folder or Hub id, or 'demo'; for ||dW|| / ||W||, intruder dimensions and --data"),
]
With = Annotated[str | None, Parameter(name="--with", help="another adapter of the same base model, to compare with")]
Data = Annotated[
    str | None, Parameter(help="held-out data, or 'demo': how much the smaller singular values lower the loss there")
]
Forgetting = Annotated[
    str | None, Parameter(help="texts that are not about the task; default: texts that the base model writes")
]
OutputDir = Annotated[Path | None, Parameter(name="--output-dir", help="new folder for a report with all numbers")]


def inspect(
    adapter: AdapterPath,
    /,
    *,
    with_: With = None,
    model: Model = None,
    data: Data = None,
    forgetting_data: Forgetting = None,
    intruders: Annotated[bool, Parameter(help="count intruder dimensions, by far the slowest part")] = True,
    quantize: Quantize = None,
    seed: Annotated[NonNegativeInt, Parameter(help="seed of the random updates that intruders are compared with")] = 0,
    all_: Annotated[bool, Parameter(name="--all", negative=(), help="show a row for every module")] = False,
    output_dir: OutputDir = None,
    json: Json = False,
    flags: Flags = None,
) -> int:
    """Show what an adapter has learned in each layer, with advice for the next run.

    From the adapter alone: ranks and energy of every module. With --model: size next to the base's weights, and
    directions that the base lacks. With --data: what each part is worth. The rules of the advice are in
    docs/inspect.md.
    """
    folder = find_adapter(adapter)
    second = None if with_ is None else find_adapter(with_)
    if model is None and (data is not None or forgetting_data is not None):
        hint = base_model_of(folder) or "FOLDER"
        raise ConfigError(f"--data and --forgetting-data need the base model: give --model {hint}")
    from tailora.formats.export import check_new_folder  # loads torch
    from tailora.study.inspect import InspectOptions
    from tailora.study.inspect import inspect as run

    if output_dir is not None:
        check_new_folder(output_dir)
    max_length = recorded(folder, "max_length")
    defaults = {"max_length": max_length} if max_length else {}
    settings = merge_settings(flags, None, defaults=defaults, arguments={"data": data} if data else {}).config
    options = InspectOptions(data, settings.field, settings.max_length, forgetting_data, intruders, seed)
    folders = [folder] if second is None else [folder, second]
    method = None if model is None else quantize_method(folders, quantize)
    with _bar() as progress:
        inspection = run(
            folder, model, data, other=second, options=options, quantize=method, log=log, progress=progress
        )
    if output_dir is not None:
        write_report(output_dir, "inspect", inspection.to_dict())
        report_if_possible(output_dir)
        log(page_of(output_dir))
    if json:
        print_json(inspection.to_dict())
    else:
        show(stdout(), inspection, every=all_)
    return 0


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    """Yields a function that shows how many modules are done: a bar, on a terminal only."""
    if not on_terminal(stderr()):
        yield lambda *_: None
        return
    with Progress(
        TextColumn("modules"),
        BarColumn(bar_width=20),
        TextColumn("{task.completed}/{task.total}"),
        console=stderr(),
        transient=True,
    ) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, of: bar.update(task, completed=done, total=of)


# ---- What `inspect` found, for a screen of 80 columns.


SHADES, PLAIN_SHADES = "▁▂▃▄▅▆▇█", ".:-=+*#%@"
SUM = "sum: ||dW1 + dW2||, 1 where they do not meet, 1.41 where equal, 0 where opposite"
WIDEST = 56  # cells of a map


def show(console: Console, found: Inspection, every: bool = False) -> None:
    console.print(headline(found), markup=False, soft_wrap=True)
    if found.modules:
        console.print("", _each(found) if every else _grouped(found), *_maps(found, console), sep="\n")
    for reason, paths in _by_reason(found.left_out).items():
        console.print(f"Left out, {reason}: {first_few(paths)}", markup=False, soft_wrap=True)
    for note, modules in _by_reason({module.path: module.note for module in found.modules if module.note}).items():
        console.print(f"{note}: {first_few(modules)}", markup=False, soft_wrap=True)
    if found.pair is not None:
        console.print(*_pair(found, found.pair), sep="\n", soft_wrap=True)
    if found.held_out is not None:
        console.print("", _losses(found.held_out), *_forgetting(found), sep="\n", soft_wrap=True)
    _advice(console, found)


def headline(found: Inspection) -> str:
    ranks = sorted({module.r for module in found.modules})
    scales = sorted({round(module.scaling, 4) for module in found.modules})
    beside = f", beside {found.model}" if found.model else f", made for {found.named_base}" if found.named_base else ""
    what = f"{len(found.modules)} updates" + (f" of rank {_range(ranks)}, scale {_range(scales)}" if ranks else "")
    learned = sum(module.learned_scaling for module in found.modules)
    dora = sum(module.use_dora for module in found.modules)
    extra = [f"{learned} scales learned"] * bool(learned) + [f"{dora} with DoRA's magnitudes"] * bool(dora)
    return f"{found.adapter}: {', '.join([what, *extra])}{beside}"


def _range(values: Sequence[float]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


# ---- tables of modules


def _grouped(found: Inspection) -> Table:
    """A row for each third of the layers and name of a matrix; numbers are means, energies sums."""
    table = _table("layers", "module", *_heads(found))
    for (depth, _), modules in _rows(found).items():
        name = _short(modules[0].path, found)
        table.add_row(layer_range([module.path for module in modules]) or depth or "-", name, *_cells(modules, found))
    return table


def _each(found: Inspection) -> Table:
    prefix = _prefix([module.path for module in found.modules])
    table = _table(f"module{f' (after {prefix})' if prefix else ''}", *_heads(found))
    for module in found.modules:
        table.add_row(Text(module.path.removeprefix(prefix), overflow="fold"), *_cells([module], found))
    return table


def _table(*heads: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for head in heads:
        words = head.startswith(("layers", "module"))
        table.add_column(head, justify="left" if words else "right", no_wrap=head == "layers")
    return table


def _heads(found: Inspection) -> list[str]:
    beside = ["dW/W"] if _has(found, "relative_norm") else []
    new = ["new/10", "random"] if _has(found, "intruders") else []
    scale = ["scale"] if any(module.learned_scaling for module in found.modules) else []
    return ["r", "eff.", "stable", "energy", *beside, *new, *scale]


def _cells(modules: Sequence[ModuleReport], found: Inspection) -> list[str]:
    def mean(name: str, form: str) -> str:
        values = [value for module in modules if (value := getattr(module, name)) is not None]
        return format(statistics.fmean(values), form) if values else "-"

    cells = [
        _range(sorted({module.r for module in modules})),
        mean("effective_rank", ".1f"),
        mean("stable_rank", ".1f"),
    ]
    cells.append(f"{sum(module.energy for module in modules):.1%}")
    if _has(found, "relative_norm"):
        cells.append(mean("relative_norm", ".2%"))
    if _has(found, "intruders"):
        cells += [mean("intruders", ".1f"), mean("intruders_random", ".1f")]
    if any(module.learned_scaling for module in found.modules):
        cells.append(mean("scaling", ".3g"))
    return cells


def _has(found: Inspection, name: str) -> bool:
    return any(getattr(module, name) is not None for module in found.modules)


def _rows(found: Inspection) -> dict[tuple[str, str], list[ModuleReport]]:
    rows: dict[tuple[str, str], list[ModuleReport]] = {}
    for module in found.modules:
        rows.setdefault((depth_of(module.path, found.layers), _after(module.path)), []).append(module)
    order = ["", *DEPTHS]
    return dict(sorted(rows.items(), key=lambda item: order.index(item[0][0])))


def _after(path: str) -> str:
    """The path without the number of its layer and what is before it."""
    parts = path.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdecimal()), -1)
    return ".".join(parts[number + 1 :])


def _short(path: str, found: Inspection) -> str:
    """The last name, where no other matrix of a layer has it."""
    last = path.rpartition(".")[2]
    same = {_after(module.path) for module in found.modules if module.path.rpartition(".")[2] == last}
    return last if len(same) == 1 else _after(path)


def _prefix(paths: Sequence[str]) -> str:
    """What all paths begin with, up to a dot."""
    shared = [each[0] for each in zip(*(path.split(".")[:-1] for path in paths), strict=False) if len(set(each)) == 1]
    prefix = ".".join(shared) + "." if shared else ""
    return prefix if all(path.startswith(prefix) for path in paths) else ""


# ---- maps: a row for each name, a cell for each layer

Cells = dict[str, dict[int, ModuleReport]]  # name -> layer -> module


def _maps(found: Inspection, console: Console) -> list[str | Text]:
    cells: Cells = {}
    for module in found.modules:
        if (layer := layer_index(module.path)) is not None:
            cells.setdefault(_short(module.path, found), {})[layer] = module
    layers = sorted({layer for each in cells.values() for layer in each})
    if len(layers) < 3:
        return []
    shades = SHADES if console.encoding.lower().startswith("utf") else PLAIN_SHADES
    most = max(module.energy for module in found.modules)
    energy = _map(cells, layers, lambda module: module.energy, most, shades)
    use = _map(cells, layers, lambda module: module.use, 1.0, shades)
    titles = f"energy by layer, up to {most:.1%} in one module", "effective rank / r by layer, up to 1"
    return ["", Text(titles[0], style="bold"), energy, "", Text(titles[1], style="bold"), use]


def _map(cells: Cells, layers: list[int], value: Callable[[ModuleReport], float], top: float, shades: str) -> Text:
    width = max(map(len, cells))
    step = -(-len(layers) // WIDEST)
    bins = [layers[start : start + step] for start in range(0, len(layers), step)]
    lines = []
    for name, own in cells.items():
        marks = [[value(own[layer]) for layer in each if layer in own] for each in bins]
        line = "".join(
            _shade(statistics.fmean(values) / top if top else 0.0, shades) if values else " " for values in marks
        )
        lines.append(f"{name:<{width}}  {line}")
    first, last = str(layers[0]), str(layers[-1])
    return Text("\n".join([*lines, f"{'':<{width}}  {first:<{max(len(bins) - len(last), 2)}}{last}"]), no_wrap=True)


def _shade(share: float, shades: str) -> str:
    return shades[round(min(share, 1.0) * (len(shades) - 1))]


# ---- data and advice


def _losses(held: HeldOutLosses) -> Table:
    losses = f"loss {held.base_loss:.4f} with the base, {held.loss:.4f} with the adapter"
    table = _table("modules halved", "loss", "rise", "95%", "of the gain", "limit")
    table.title, table.title_justify, table.title_style = f"{held.data}: {losses}, {held.examples} examples", "left", ""
    rows: dict[str, TruncationCost] = {"all modules": held.half, **held.groups}
    for name, rise in rows.items():
        spread = "" if rise.low is None else f"{rise.low:+.4f} to {rise.high:+.4f}"
        cost = "-" if rise.cost is None else f"{rise.cost:.1%}"
        table.add_row(name, f"{rise.loss:.4f}", f"{rise.rise:+.4f}", spread, cost, f"{cost_limit(rise):.1%}")
    return table


def _pair(found: Inspection, pair: AdapterOverlap) -> list[str | Table]:
    """A row for each third of the layers and name of a matrix; numbers are means."""
    if not pair.modules:
        return ["", f"Beside {pair.other}: no matrix is adapted by both"]
    rows: dict[tuple[str, str], list[ModuleOverlap]] = {}
    for each in pair.modules:
        rows.setdefault((depth_of(each.path, found.layers), _after(each.path)), []).append(each)
    table = _table("layers", "module", "cosine", "writes", "chance", "reads", "chance", "sum")
    table.title, table.title_justify, table.title_style = f"Beside {pair.other}: cosine {pair.cosine:+.3f}", "left", ""
    for (depth, _), modules in sorted(rows.items(), key=lambda item: ["", *DEPTHS].index(item[0][0])):
        names = "cosine", "writes", "writes_by_chance", "reads", "reads_by_chance"
        means = [statistics.fmean(getattr(each, name) for each in modules) for name in names]
        sums = [each.sum_norm / length for each in modules if (length := math.hypot(each.norm, each.other_norm))]
        where = layer_range([each.path for each in modules]) or depth or "-"
        cells = [f"{means[0]:+.2f}", *(f"{mean:.2f}" for mean in means[1:])]
        table.add_row(where, _short(modules[0].path, found), *cells, f"{statistics.fmean(sums):.2f}" if sums else "-")
    pieces: list[str | Table] = [
        "",
        table,
        "sum: ||dW1 + dW2||, 1 where they do not meet, 1.41 where equal, 0 where opposite",
    ]
    for what, paths in (("only in the first", pair.only_here), ("only in the other", pair.only_there)):
        pieces += [f"{len(paths)} {what}: {first_few(paths)}"] * bool(paths)
    if (both := pair.losses) is not None:
        pieces += [f"Loss: base {both.base:.4f}, first {both.one:.4f}, other {both.other:.4f}, both {both.both:.4f}"]
    return pieces


def _forgetting(found: Inspection) -> list[str]:
    lost = found.forgetting
    if lost is None:
        return []
    rise = lost["loss_after"] - lost["loss_before"]
    return ["", f"Forgetting, on {lost['text']}: KL {lost['kl']:.4f} nats per token from the base, loss {rise:+.4f}"]


def _advice(console: Console, found: Inspection) -> None:
    console.print("", Text("Advice", style="bold"), sep="\n")
    if not found.advice:
        console.print("No rule of docs/inspect.md asks for a change.")
    for advice in found.advice:
        console.print(Text.assemble((f"{advice.rule}: ", "bold"), advice.says))
        if advice.setting:
            console.print(f"  {_setting(advice)}", markup=False, soft_wrap=True)
        if advice.command:
            console.print(f"  {advice.command}", markup=False, soft_wrap=True)
    if missing := _missing(found):
        console.print("", Text(missing, style="dim"), sep="\n", soft_wrap=True)


def _setting(advice: Advice) -> str:
    """As a line of YAML, of which JSON is a part."""
    return "  ".join(f"{name}: {json.dumps(value)}" for name, value in advice.setting.items())


def _missing(found: Inspection) -> str:
    if found.model is None:
        base = found.named_base or "BASE"
        return f"More with --model {base}: ||dW|| / ||W||, intruder dimensions; and with --data: what ranks are worth."
    if found.held_out is None:
        return "More with --data HELD_OUT: what the smaller singular values are worth, and forgetting."
    return ""


def _by_reason(reasons: Mapping[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path, reason in reasons.items():
        found.setdefault(reason, []).append(path)
    return found
