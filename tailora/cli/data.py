"""`tailora data FILE --model M`: what training would learn from, before a step is taken."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.types import NonNegativeInt
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tailora.cli.flags import ConfigFile, Json, flags_of, merge_settings
from tailora.cli.main import note, print_json, stdout
from tailora.cli.models import vocabulary
from tailora.train.config import TrainConfig

# ---- What was dropped or cut of the data: told by `data` and at the start of a run, whenever there is any.


MEANINGS = {  # count of the report -> name, meaning
    "truncated": ("cut", "examples are longer than --max-length"),
    "cut_away": ("left out", "examples whose learned tokens were all cut away"),
    "replies_not_learned": ("not learned", "replies that the chat template rewrites once the chat goes on"),
    "repeated": ("repeated", "rows are copies of an earlier row"),
    "duplicates": ("DUPLICATES", "held-out rows are trained on too: the held-out loss will look too good"),
}


def counted(report: Mapping[str, Any]) -> dict[str, str]:
    """Name -> count and meaning, for every count that is not 0."""
    return {name: f"{report[key]:,} {meaning}" for key, (name, meaning) in MEANINGS.items() if report[key]}


# ----


Flags: Any = flags_of(TrainConfig, only=["model", "eval_data", "field", "max_length", "validation_split", "seed"])
BAR = 40  # characters of the longest bar

Pieces = list[tuple[str, bool]]  # text, learned


def data(
    file: Annotated[str | None, Parameter(help="JSONL, JSON, CSV, Parquet, folder or Hub id, or 'demo'")] = None,
    /,
    *,
    config: ConfigFile = None,
    rows: Annotated[NonNegativeInt, Parameter(help="examples to show")] = 3,
    json: Json = False,
    flags: Flags = None,
) -> int:
    """Show what training would learn from a file: columns, counts, lengths, trained and masked tokens."""
    chosen = merge_settings(flags, config, arguments={"data": file} if file else {})
    for text in chosen.notes:
        note(text)
    from tailora.data.tokenize import preview
    from tailora.train.dataloader import read_whole

    tokenizer, embedding_rows = vocabulary(chosen.config.model)
    prepared = read_whole(chosen.config, tokenizer, embedding_rows)
    report = prepared.report.to_dict()
    examples = [preview(prepared.train[index], tokenizer) for index in range(min(rows, len(prepared.train)))]
    if json:
        shown = [[{"text": text, "learned": learned} for text, learned in pieces] for pieces in examples]
        print_json({**report, "examples": shown})
    else:
        show(stdout(), report, examples)
    return 0


def show(console: Console, report: dict[str, Any], examples: Sequence[Pieces]) -> None:
    console.print(facts(report), "", histogram(report["lengths"]), sep="\n", markup=False)
    colour = console.color_system is not None and not console.no_color
    legend = painted([("learned", True), (" and only read", False)], colour)
    for number, pieces in enumerate(examples, 1):
        console.print(Text.assemble((f"\nexample {number}: ", "bold"), legend))
        console.print(painted(pieces, colour), soft_wrap=True)


def facts(report: dict[str, Any]) -> Table:
    mapping = ", ".join(key if key == column else f"{key} = {column}" for key, column in report["mapping"].items())
    template = "the model's chat template" if report["chat_template"] else "no chat template: the texts as they are"
    share = f"{report['supervised_tokens']:,} learned ({report['supervised_share']:.0%})"
    rows = {
        "source": report["source"],
        "held-out source": report["eval_source"],
        "read as": f"{report['shape']} ({mapping})",
        "not used": ", ".join(report["ignored"]),
        "written by": template,
        "rows": f"{report['rows']:,}: {report['train']:,} to train on, {report['eval']:,} held out",
        "tokens": f"{report['tokens']:,}, {share}",
        "longest": f"{report['longest']:,} tokens",
        **counted(report),
        "sha256": report["sha256"],
    }
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        if value:
            table.add_row(name, Text(value))
    return table


def histogram(bins: Sequence[dict[str, int]]) -> Table:
    most = max(each["examples"] for each in bins)
    table = Table("tokens", "examples", "", title="lengths", title_justify="left", box=None)
    for each in bins:
        width = -(-BAR * each["examples"] // most)  # rounded up: what is there is seen
        lengths = f"{each['low']}" if each["low"] == each["high"] else f"{each['low']}-{each['high']}"
        table.add_row(lengths, f"{each['examples']:,}", "#" * width)
    return table


def painted(pieces: Pieces, colour: bool) -> Text:
    """Learned text in green and the rest dim; in [[ ]] where there is no colour."""
    if colour:
        return Text.assemble(*((text, "green" if learned else "dim") for text, learned in pieces))
    return Text("".join(f"[[{text}]]" if learned else text for text, learned in pieces))
