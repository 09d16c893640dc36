"""A page in the terminal: the blocks that are not for the browser alone, fitted to the terminal's width.

    title, numbers -> sections -> lead -> notes

The lead stands at the end, where a reader's eyes are when a command has finished. Commands, and everything where the
output is no terminal, are never broken into lines. Where the encoding is not Unicode, signs have ASCII spellings.
"""

import re
import statistics
from collections.abc import Sequence
from dataclasses import replace

from rich.box import SIMPLE_HEAD, Box
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from tailora.report.blocks import (
    Answers,
    Block,
    Code,
    Column,
    Figure,
    Finding,
    HeatMap,
    List,
    Page,
    Paragraph,
    Section,
    Table,
)
from tailora.report.format import NONE, printable

ASCII_HEAD = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
ASCII = {"−": "-", "–": "-", "×": "x", "‖": "||", "Δ": "d", "→": "->", "✓": "+", "✗": "-", "…": "..."}
SHADES, ASCII_SHADES = "▁▂▃▄▅▆▇█", ".:-=+*#%@"
GAP = 2  # between two columns
LONG_WORD = 20  # a longer word, such as the path of a layer, may be broken after . / and _
FEWEST_LAYERS = 3  # of a heat map


def print_page(console: Console, page: Page, *, everything: bool = False) -> None:
    """everything: with the blocks that only --all shows."""
    details = {"always", "all"} if everything else {"always"}
    _print(console, page.title, style="bold")
    numbers = [(number.label, number.value, number.note) for number in page.numbers if number.detail in details]
    if numbers:
        _print_table(console, Table([Column(""), Column(""), Column("")], numbers))
    for section in [*page.sections, *([page.conclusion] if page.conclusion else [])]:
        blocks = [block for block in section.blocks if block is not None and block.detail in details]
        if blocks:
            print_section(console, replace(section, blocks=blocks))
    if page.lead:
        console.print()
        _print(console, page.lead, style="bold")
    for note in page.notes:
        _print(console, f"Note: {note}")


def print_section(console: Console, section: Section) -> None:
    console.print()
    _print(console, section.title, style="bold")
    if section.text:
        _print(console, section.text)
    after_table = False
    for block in section.blocks:
        if block is not None:
            if after_table:
                console.print()
            _print_block(console, block)
            after_table = isinstance(block, Table | HeatMap | Answers)


def _print_block(console: Console, block: Block) -> None:
    match block:
        case Table():
            _print_table(console, block)
        case Answers():
            columns = [Column(""), *map(Column, block.names)]
            _print_table(console, Table(columns, block.rows), lines_between_rows=True)
        case HeatMap():
            _print_heat_map(console, block)
        case Finding():
            _print(console, f"{block.title}: {block.text}")
            _print_lines(console, [f"  {line}" for line in block.code.splitlines()])
        case Paragraph():
            _print(console, block.text)
        case List():
            for item in block.items:
                _print(console, f"- {item}")
        case Code():
            _print(console, block.title, style="bold")
            _print_lines(console, block.text.splitlines())
        case Figure():
            raise TypeError("a figure is for the page alone")


# ---- Text


def _print(console: Console, text: str, style: str = "") -> None:
    """A paragraph, broken between words on a terminal and left whole elsewhere."""
    if text:
        text = _spelled(console, text)
        text = _wrapped(text, console.width) if console.is_terminal else text
        console.print(Text(text, style=style), soft_wrap=not console.is_terminal)


def _print_lines(console: Console, lines: Sequence[str]) -> None:
    """Lines to copy."""
    for line in lines:
        console.print(Text(_spelled(console, line)), soft_wrap=True)


def _unicode(console: Console) -> bool:
    return console.encoding.lower().startswith("utf")


def _spelled(console: Console, text: str) -> str:
    """The text as this terminal can show it."""
    text = printable(text)
    return text if _unicode(console) else "".join(ASCII.get(letter, letter) for letter in text)


# ---- Tables


def _print_table(console: Console, table: Table, *, lines_between_rows: bool = False) -> None:
    rows = [[_spelled(console, cell) for cell in row] for row in table.rows]
    columns = [replace(column, name=_spelled(console, column.name)) for column in table.columns]
    if table.title:
        _print(console, table.title, style="bold")
    lines_between_rows |= any(column.interval for column in columns)
    columns, rows = _narrowed(*_with_intervals_below(columns, rows), table.rest, console.width)
    widths = _widths(columns, rows, console.width)
    if widths is None:
        _print_records(console, columns, rows)
    else:
        console.print(_rich_table(console, columns, rows, widths, lines_between_rows))
    if table.note:
        _print(console, table.note)


def _with_intervals_below(columns: list[Column], rows: list[list[str]]) -> tuple[list[Column], list[list[str]]]:
    """Intervals as a second line of the column before them."""
    kept: list[Column] = []
    merged: list[list[str]] = [[] for _ in rows]
    for index, column in enumerate(columns):
        if column.interval:
            kept[-1] = replace(kept[-1], name=f"{kept[-1].name}\n{column.name}")
            for row, cells in zip(rows, merged, strict=True):
                cells[-1] += f"\n{row[index]}" if row[index] else ""
        else:
            kept.append(column)
            for row, cells in zip(rows, merged, strict=True):
                cells.append(row[index])
    return kept, merged


def _narrowed(
    columns: list[Column], rows: list[list[str]], rest: str, width: int
) -> tuple[list[Column], list[list[str]]]:
    """Moves the least important columns into one last column, named `rest`, until the table fits."""
    kept = list(range(len(columns)))
    while True:
        moved = [index for index in range(len(columns)) if index not in kept]
        shown_columns = [columns[index] for index in kept]
        shown_rows = [[row[index] for index in kept] for row in rows]
        if moved:
            shown_columns.append(Column(rest))
            for row, cells in zip(rows, shown_rows, strict=True):
                cells.append(", ".join(f"{columns[i].name} {row[i]}" for i in moved if row[i] not in ("", "-", NONE)))
        lowest = max((columns[index].priority for index in kept), default=0)
        if lowest == 0 or _widths(shown_columns, shown_rows, width) is not None:
            return shown_columns, shown_rows
        kept = [index for index in kept if columns[index].priority < lowest]


def _widths(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int) -> list[int] | None:
    """Of the columns, so that the table fits and no word is broken; None if that cannot be."""
    cells = [[column.name, *(row[index] for row in rows)] for index, column in enumerate(columns)]
    widths = [max(cell_len(line) for cell in column for line in (cell.splitlines() or [""])) for column in cells]
    narrowest = [
        natural if column.numeric else max(cell_len(part.rstrip()) for cell in texts for part in _parts(cell) or [""])
        for column, texts, natural in zip(columns, cells, widths, strict=True)
    ]
    available = width - GAP * (len(columns) - 1)
    if sum(narrowest) > available:
        return None
    while sum(widths) > available:
        widest = max(
            (index for index in range(len(widths)) if widths[index] > narrowest[index]), key=lambda i: widths[i]
        )
        widths[widest] -= 1
    return widths


def _rich_table(
    console: Console,
    columns: Sequence[Column],
    rows: Sequence[Sequence[str]],
    widths: Sequence[int],
    lines_between_rows: bool,
) -> RichTable:
    table = RichTable(
        box=SIMPLE_HEAD if _unicode(console) else ASCII_HEAD,
        show_header=any(column.name for column in columns),
        show_edge=False,
        show_lines=lines_between_rows,
        header_style="bold",
        padding=(0, GAP - 1, 0, 0),
        pad_edge=False,
    )
    for column, width in zip(columns, widths, strict=True):
        name = Text(_wrapped(column.name, width))
        table.add_column(name, justify="right" if column.numeric else "left", width=width, no_wrap=True)
    for row in rows:
        table.add_row(*(Text(_wrapped(cell, width)) for cell, width in zip(row, widths, strict=True)))
    return table


def _print_records(console: Console, columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """A table that is too wide by any means: its rows below each other, with a line for every value."""
    for first, *rest in rows:
        _print(console, first, style="bold")
        for column, cell in zip(columns[1:], rest, strict=True):
            if cell:
                _print(console, f"  {column.name}: {cell}".replace("\n", " / "))


def _parts(text: str) -> list[str]:
    """What may stand on different lines: words, and of long words what ends with . or / and, if need be, with _"""
    parts = []
    for word in re.findall(r"\S+\s*|\s+", text):
        pieces = [word] if len(word) <= LONG_WORD else re.findall(r"[^./]+[./]*|[./]+", word)
        for piece in pieces:
            parts += [piece] if len(piece) <= LONG_WORD else re.findall(r"[^_]+_*|_+", piece)
    return parts


def _wrapped(text: str, width: int) -> str:
    """The text in lines of at most `width` cells, as far as its parts allow."""
    lines = []
    for line in text.splitlines():
        current = ""
        for part in _parts(line):
            if current and cell_len(current + part.rstrip()) > width:
                lines.append(current.rstrip())
                current = ""
            current += part
        lines.append(current.rstrip())
    return "\n".join(lines)


# ---- Heat maps


def _print_heat_map(console: Console, heat: HeatMap) -> None:
    """A line for each name, a character for each layer, or for the mean of several where there are many."""
    layers = sorted({layer for _, layer in heat.cells})
    if len(layers) < FEWEST_LAYERS:
        return
    names = list(dict.fromkeys(name for name, _ in heat.cells))
    spelled = {name: set_cell_size(_spelled(console, name), max(map(cell_len, names))) for name in names}
    margin = max(map(cell_len, spelled.values())) + GAP
    step = -(-len(layers) // max(console.width - margin, 1))
    groups = [layers[start : start + step] for start in range(0, len(layers), step)]
    shades = SHADES if _unicode(console) else ASCII_SHADES
    lines = []
    for name in names:
        values = [[heat.cells[name, layer] for layer in group if (name, layer) in heat.cells] for group in groups]
        shaded = (_shade(statistics.fmean(group), heat.top, shades) if group else " " for group in values)
        lines.append(spelled[name] + " " * GAP + "".join(shaded))
    first, last = str(layers[0]), str(layers[-1])
    lines.append(" " * margin + first.ljust(max(len(groups) - len(last), 2)) + last)
    _print(console, f"{heat.title} by layer, up to {heat.show(heat.top)}", style="bold")
    console.print(Text(printable("\n".join(lines)), no_wrap=True))


def _shade(value: float, top: float, shades: str) -> str:
    share = min(value / top, 1.0) if top else 0.0
    return shades[round(share * (len(shades) - 1))]
