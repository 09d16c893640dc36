"""`tailora data FILE --model M`: shows what a run would be trained on."""

import re
import shlex
from collections.abc import Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from cyclopts.types import NonNegativeInt
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tailora.cli.flags import ConfigFile, Json, Overwrite, flags_of, merge_settings
from tailora.cli.main import log, note, print_json, stdout
from tailora.cli.models import check_sources, fetch_sources
from tailora.data.dataset import Example
from tailora.data.readers import MAX_SHOWN, parse_sources, source_names
from tailora.formats.run_folder import REPORT_FILES, check_result_folder, write_report
from tailora.report.blocks import Code, Sample, Section
from tailora.report.files import write_page_if_possible
from tailora.report.format import plural, printable
from tailora.report.terminal import print_rich_table, print_section
from tailora.train.config import TrainConfig

if TYPE_CHECKING:
    from tailora.data.prepare import PreparedData

SETTINGS = ["model", "task", "eval_data", "field", "max_length", "validation_split", "seed", "skip_bad_rows", "system"]
SETTINGS += ["assistant_only_loss", "completion_only_loss", "documents", "image_folder", "reward"]
Flags: Any = flags_of(TrainConfig, SETTINGS)
BAR = 40  # characters of the longest bar

Pieces = Sequence[tuple[str, bool]]  # text, learned
OutputDir = Annotated[Path | None, Parameter(help="new folder for report.html with the examples and their images")]


def data(
    *files: Annotated[str, Parameter(help="JSONL, JSON, CSV, Parquet, text, folder, Hub id, or FILE=WEIGHT")],
    config: ConfigFile = None,
    rows: Annotated[NonNegativeInt, Parameter(help="number of examples to show")] = 3,
    output_dir: OutputDir = None,
    overwrite: Overwrite = False,
    json: Json = False,
    flags: Flags = None,
) -> int:
    """Show what would be trained on, token by token.

    Shows the columns, counts and lengths of your data, and a few examples with the trained tokens highlighted.
    Without a file, it shows the demo's data.
    """
    settings = merge_settings(flags, config, arguments={"data": files[0] if len(files) == 1 else [*files] or None})
    if "data" not in settings.model_fields_set:
        note("this is the demo's data; to see yours, run `tailora data FILE`")
    if output_dir is not None:
        check_result_folder(output_dir, REPORT_FILES, overwrite=overwrite)
    check_sources(model=settings.model, data=(*source_names(settings.data), settings.eval_data))
    fetch_sources(settings.model)
    from tailora.data.tokenize import preview
    from tailora.report.pages.data import DataContent
    from tailora.train.dataloader import read_whole
    from tailora.train.model_loading import load_tokenizer
    from tailora.train.setup import find_labels

    labels, _ = find_labels(settings)
    tokenizer = load_tokenizer(settings.model, labels)
    prepared = read_whole(settings, tokenizer, labels)
    for problem in prepared.skipped[:MAX_SHOWN]:
        note(f"skipped {problem}")
    report = prepared.report.to_dict()
    examples: list[Sample] = []
    for index in range(min(rows, len(prepared.train))):
        title, example = f"example {index + 1}", prepared.train[index]
        if labels is None:
            parts = [(f"{title}{name}", preview(part, tokenizer)) for name, part in named_sequences(example)]
        else:
            parts = [(title, labels.preview(example, tokenizer))]
        examples += [Sample(name, pieces, example.images) for name, pieces in parts]
    if output_dir is not None:
        write_report(output_dir, "data", DataContent(report, examples).to_dict())
        log(write_page_if_possible(output_dir))
    if json:
        shown = [[{"text": text, "learned": learned} for text, learned in example.pieces] for example in examples]
        images = [[image.to_dict() for image in example.images] for example in examples]
        print_json({**report, "examples": shown, "example_images": images})
    else:
        show(stdout(), report, examples)
        print_section(stdout(), next_section(settings, prepared, config, flags or {}))
    return 0


def next_section(settings: TrainConfig, data: "PreparedData", config: Path | None, flags: Flags) -> Section:
    """Returns the command that trains on this data, with a warning if it holds out too little."""
    from tailora.evaluation.statistics import FEW_EXAMPLES, TOO_FEW

    held_out = data.report.eval
    few = f"It holds out {plural(held_out, 'example')}. {TOO_FEW}" if 0 < held_out < FEW_EXAMPLES else ""
    return Section("Next", few, [Code(shlex.join(train_command(settings, config, flags)))])


def train_command(
    settings: TrainConfig,
    config: Path | None,
    flags: Mapping[str, str | bool | list[str]],
) -> list[str]:
    """Returns the command that trains on this data with the same flags in a new folder."""
    sources = parse_sources(settings.data)
    command = ["tailora", "train", *(word for source in sources for word in ("--data", str(source)))]
    command += ["--config", str(config)] if config else []
    for name, value in flags.items():
        if isinstance(value, bool):
            command.append(f"--{'' if value else 'no-'}{name.replace('_', '-')}")
            continue
        command += [f"--{name.replace('_', '-')}", value if isinstance(value, str) else ",".join(value)]
    if "output_dir" not in settings.model_fields_set:
        name = re.sub(r"[^\w.-]+", "-", Path(sources[0].name).stem).strip("-.") or "run"
        folders = chain([Path("outputs", name)], (Path("outputs", f"{name}-{number}") for number in count(2)))
        command += ["--output-dir", str(next(folder for folder in folders if not folder.exists()))]
    return command


def named_sequences(example: Example) -> list[tuple[str, Example]]:
    """Returns the sequences to train on, with their roles if there are several."""
    if example.target is not None:
        return [(", wanted" if example.target[0] else ", unwanted", example.sequences[0])]
    names = (", chosen", ", rejected") if example.second_start else ("",)
    return list(zip(names, example.sequences, strict=True))


def show(console: Console, report: dict[str, Any], examples: Sequence[Sample]) -> None:
    from tailora.report.pages.data import facts_of

    table = Table.grid(padding=(0, 2))
    for name, value in facts_of(report).items():
        table.add_row(name, Text(printable(value)))
    print_rich_table(console, table)
    console.print()
    print_rich_table(console, histogram(report["lengths"]))
    in_color = console.color_system is not None and not console.no_color
    legend = highlight([("trained", True), (" and not trained", False)], in_color)
    for example in examples:
        title = Text(f"\n{example.title}", "bold")
        is_trained = any(learned for _, learned in example.pieces)
        console.print(Text.assemble(title, ": ", legend) if is_trained else title)
        console.print(highlight(example.pieces, in_color), soft_wrap=not console.is_terminal)


def histogram(bins: Sequence[dict[str, int]]) -> Table:
    """Returns the lengths of the examples. Bins with examples have at least one character."""
    most = max(counts["examples"] for counts in bins)
    table = Table("tokens", "examples", "", title="lengths", title_justify="left", box=None)
    for counts in bins:
        width = -(-BAR * counts["examples"] // most)
        low, high = counts["low"], counts["high"]
        table.add_row(f"{low}" if low == high else f"{low}-{high}", f"{counts['examples']:,}", "#" * width)
    return table


def highlight(pieces: Pieces, in_color: bool) -> Text:
    """Returns trained text in green and the rest dim; without color, trained text in [[ ]]."""
    if in_color:
        return Text.assemble(*((text, "green" if trained else "dim") for text, trained in pieces))
    return Text("".join(f"[[{text}]]" if trained else text for text, trained in pieces))
