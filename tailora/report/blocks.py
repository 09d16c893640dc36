"""The description of a page: its numbers, tables and figures, shared by the browser and the terminal.

A file of `report/pages` turns a result into a `Page`; `report/html.py` and `report/terminal.py` display it. All text
is plain text, which html.py escapes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from tailora.data.images import Image
from tailora.report.charts import Canvas

# Where a block is shown. The page shows all blocks; the terminal shows "always", and with --all also "all".
Detail = Literal["always", "all", "page"]


@dataclass(frozen=True)
class Number:
    """One of the headline numbers."""

    label: str
    value: str
    note: str = ""
    detail: Detail = "always"


@dataclass(frozen=True)
class Column:
    """A column of a table.

    priority: if a terminal is too narrow for the table, the columns with the highest priority number are the first
        to move into one last column of text, "name value, name value".
    """

    name: str
    numeric: bool = False  # the cells are numbers: right-aligned and never wrapped
    interval: bool = False  # the cells are intervals of the previous column; the terminal prints them below its values
    priority: int = 0


@dataclass(frozen=True)
class Table:
    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    title: str = ""  # above the table
    note: str = ""
    rest: str = "more"  # name of the last column, where a narrow terminal shows the columns that do not fit
    first: int | None = None  # how many rows a terminal shows without --all; None for all
    folded: bool = False  # a page shows the table after a click on its title
    detail: Detail = "always"


@dataclass(frozen=True)
class Figure:
    """Only for pages, and drawn when a page is written, so a terminal needs no matplotlib."""

    name: str  # unique on the page
    draw: Callable[[Canvas], None]  # draws it on a canvas
    alt: str  # text for screen readers
    caption: str
    wide: bool = False  # as wide as the page, and drawn a second time for narrow screens; otherwise half as wide
    detail: Detail = "page"


@dataclass(frozen=True)
class Answers:
    """The same questions, answered before and after. rows: question, answer before, answer after."""

    names: tuple[str, str]
    rows: Sequence[tuple[str, str, str]]
    images: Sequence[Sequence[Image]] = ()  # of each question, for pages
    detail: Detail = "always"


@dataclass(frozen=True)
class Sample:
    """An example of the data. pieces: its texts, and whether each is trained."""

    title: str
    pieces: Sequence[tuple[str, bool]]
    images: Sequence[Image]
    detail: Detail = "page"


@dataclass(frozen=True)
class Finding:
    """Advice based on the numbers, with settings or a command to copy."""

    title: str
    text: str
    code: str = ""
    detail: Detail = "always"


@dataclass(frozen=True)
class Paragraph:
    text: str
    detail: Detail = "always"


@dataclass(frozen=True)
class Code:
    """Commands or settings to copy. Lines are never wrapped."""

    text: str
    title: str = ""
    detail: Detail = "always"


Block = Table | Figure | Answers | Sample | Finding | Paragraph | Code


@dataclass(frozen=True)
class Section:
    title: str
    text: str  # one sentence about the blocks. Blocks that are None are omitted.
    blocks: Sequence[Block | None]


@dataclass(frozen=True)
class Page:
    """Lead and conclusion are at the top of a page and at the end of terminal output."""

    kind: str
    title: str
    lead: str  # the result in a sentence or two
    numbers: Sequence[Number]
    sections: Sequence[Section]
    notes: Sequence[str] = ()
    conclusion: Section | None = None  # advice or commands that follow from it
