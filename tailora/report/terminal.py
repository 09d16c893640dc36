"""A page in the terminal: all blocks except those for the browser, fitted to the terminal's width.

    title, numbers -> sections -> lead -> notes

The lead comes last, where you look when a command has finished, or below the title if more output follows. Commands
are never wrapped, nor is anything if the output is not a terminal.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tailora.report import blocks
from tailora.report.format import NONE, plural, printable

GAP = 2  # between two columns
LONG_WORD = 20  # longer words, such as the path of a layer, may be wrapped after . / and _


def print_page(console: Console, page: blocks.Page, *, everything: bool = False, lead_first: bool = False) -> None:
    """everything: include the blocks that only --all shows. lead_first prints the lead below the title."""
    details = {"always", "all"} if everything else {"always"}
    _print(console, page.title, style="bold")
    if lead_first:
        _print(console, page.lead, style="bold")
        console.print()
    numbers = [(number.label, number.value, number.note) for number in page.numbers if number.detail in details]
    if numbers:
        _print_table(console, blocks.Table([blocks.Column("")] * 3, numbers))
    for section in [*page.sections, *([page.conclusion] if page.conclusion else [])]:
        shown = [block for block in section.blocks if block is not None and block.detail in details]
        if shown:
            blocks_shown = shown if everything else [_with_first_rows(block) for block in shown]
            print_section(console, replace(section, blocks=blocks_shown))
    if page.lead or page.notes:
        console.print()
    if not lead_first:
        _print(console, page.lead, style="bold")
    for note in page.notes:
        _print(console, f"Note: {note}")


def _with_first_rows(block: blocks.Block) -> blocks.Block:
    """Shortens a table with many rows, and adds how to see the others. Returns other blocks unchanged."""
    if not isinstance(block, blocks.Table) or block.first is None or len(block.rows) <= block.first:
        return block
    more = f"--all shows {plural(len(block.rows) - block.first, 'more row')}."
    return replace(block, rows=block.rows[: block.first], note=f"{more} {block.note}".rstrip())


def print_section(console: Console, section: blocks.Section) -> None:
    console.print()
    _print(console, section.title, style="bold")
    _print(console, section.text)
    after_table = False
    for block in section.blocks:
        if block is not None:
            if after_table:
                console.print()
            _print_block(console, block)
            after_table = isinstance(block, blocks.Table | blocks.Answers)


def _print_block(console: Console, block: blocks.Block) -> None:
    match block:
        case blocks.Table():
            _print_table(console, block)
        case blocks.Answers():
            columns = [blocks.Column(""), *map(blocks.Column, block.names)]
            _print_table(console, blocks.Table(columns, block.rows), lines_between_rows=True)
        case blocks.Finding():
            _print(console, f"{block.title}: {block.text}")
            _print_lines(console, [f"  {line}" for line in block.code.splitlines()])
        case blocks.Paragraph():
            _print(console, block.text)
        case blocks.Code():
            _print(console, block.title, style="bold")
            _print_lines(console, block.text.splitlines())
        case blocks.Figure() | blocks.Sample():
            raise TypeError(f"{type(block).__name__} is only for pages")


# ---- Text


def _print(console: Console, text: str, style: str = "") -> None:
    """Prints a paragraph, wrapped between words on a terminal and in one line elsewhere; nothing for an empty text."""
    if text:
        text = _wrapped(printable(text), console.width) if console.is_terminal else printable(text)
        console.print(Text(text, style=style), soft_wrap=not console.is_terminal)


def _print_lines(console: Console, lines: Sequence[str]) -> None:
    """Prints lines to copy, without wrapping."""
    for line in lines:
        console.print(Text(printable(line)), soft_wrap=True)


# ---- Tables

Columns: TypeAlias = list[tuple[blocks.Column, Sequence[str]]]  # each with its cells


def _print_table(console: Console, table: blocks.Table, *, lines_between_rows: bool = False) -> None:
    _print(console, table.title, style="bold")
    columns: Columns = [
        (replace(column, name=printable(column.name)), [printable(row[index]) for row in table.rows])
        for index, column in enumerate(table.columns)
    ]
    lines_between_rows |= any(column.interval for column, _ in columns)
    columns = _narrowed(_with_intervals_below(columns), table.rest, console.width)
    widths = _widths(columns, console.width)
    rows = zip(*(cells for _, cells in columns), strict=True)
    if widths is None:  # too wide: a line for every value
        for first, *rest in rows:
            _print(console, first, style="bold")
            for (column, _), cell in zip(columns[1:], rest, strict=True):
                if cell:
                    _print(console, f"  {column.name}: {cell}".replace("\n", " / "))
    else:
        shown = Table(
            box=SIMPLE_HEAD,
            show_header=any(column.name for column, _ in columns),
            show_edge=False,
            show_lines=lines_between_rows,
            header_style="bold",
            padding=(0, GAP - 1, 0, 0),
            pad_edge=False,
        )
        for (column, _), width in zip(columns, widths, strict=True):
            name = Text(_wrapped(column.name, width))
            shown.add_column(name, justify="right" if column.numeric else "left", width=width, no_wrap=True)
        for row in rows:
            shown.add_row(*(Text(_wrapped(cell, width)) for cell, width in zip(row, widths, strict=True)))
        print_rich_table(console, shown)
    _print(console, table.note)


def print_rich_table(console: Console, table: Table) -> None:
    """Prints the table without trailing spaces."""
    for segments in console.render_lines(table, pad=False):
        line = Text.assemble(*((segment.text, segment.style or "") for segment in segments))
        line.rstrip()
        console.print(line, soft_wrap=True)


def _with_intervals_below(columns: Columns) -> Columns:
    """Moves intervals to a second line of the previous column."""
    merged: Columns = []
    for column, cells in columns:
        if column.interval:
            before, values = merged[-1]
            texts = [f"{value}\n{ends}" if ends else value for value, ends in zip(values, cells, strict=True)]
            merged[-1] = (replace(before, name=f"{before.name}\n{column.name}"), texts)
        else:
            merged.append((column, cells))
    return merged


def _narrowed(columns: Columns, rest: str, width: int) -> Columns:
    """Moves the least important columns into one last column, named `rest`, until the table fits."""
    priorities = {column.priority for column, _ in columns}
    for highest in sorted({0} | priorities, reverse=True):
        kept = [(column, cells) for column, cells in columns if column.priority <= highest]
        moved = [(column.name, cells) for column, cells in columns if column.priority > highest]
        if moved:
            rows = zip(*([(name, cell) for cell in cells] for name, cells in moved), strict=True)
            texts = [", ".join(f"{name} {cell}" for name, cell in row if cell not in ("", "-", NONE)) for row in rows]
            kept.append((blocks.Column(rest), texts))
        if _widths(kept, width) is not None:
            break
    return kept


def _widths(columns: Columns, width: int) -> list[int] | None:
    """Returns widths with which the table fits without breaking words; None if there are none."""
    texts = [[column.name, *cells] for column, cells in columns]
    widths = [max(cell_len(line) for cell in column for line in (cell.splitlines() or [""])) for column in texts]
    narrowest = [
        natural if column.numeric else max(cell_len(part.rstrip()) for cell in cells for part in _parts(cell) or [""])
        for (column, _), cells, natural in zip(columns, texts, widths, strict=True)
    ]
    available = width - GAP * (len(columns) - 1)
    if sum(narrowest) > available:
        return None
    while sum(widths) > available:
        shrinkable = [index for index in range(len(widths)) if widths[index] > narrowest[index]]
        widths[max(shrinkable, key=lambda index: widths[index])] -= 1
    return widths


def _parts(text: str) -> list[str]:
    """Splits a text where it may be wrapped: after words, in long words after . or / and, if necessary, after _"""
    parts = []
    for word in re.findall(r"\S+\s*|\s+", text):
        pieces = [word] if len(word) <= LONG_WORD else re.findall(r"[^./]+[./]*|[./]+", word)
        for piece in pieces:
            parts += [piece] if len(piece) <= LONG_WORD else re.findall(r"[^_]+_*|_+", piece)
    return parts


def _wrapped(text: str, width: int) -> str:
    """Wraps the text into lines of at most `width` cells, as far as its parts allow."""
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
