"""The description of a page: its numbers, tables and figures, once for the browser and for the terminal.

A file of `report/pages` turns a result into a `Page`; `report/html.py` and `report/terminal.py` show it. All text is
plain text, which html.py escapes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tailora.report.charts import Canvas

# Where a block is shown. The page shows all blocks; the terminal shows "always", and with --all also "all".
Detail = Literal["always", "all", "page"]


@dataclass(frozen=True)
class Number:
    """One of the few numbers that a reader looks for first."""

    label: str
    value: str
    note: str = ""
    detail: Detail = "always"


@dataclass(frozen=True)
class Column:
    """A column of a table.

    numeric: the cells are numbers, aligned to the right, and never broken.
    interval: the cells are intervals of the column before; the terminal writes them below its values.
    priority: where a terminal is too narrow for the table, the columns with the highest priority number are the first
        to move into one last column of text, "name value, name value".
    """

    name: str
    numeric: bool = False
    interval: bool = False
    priority: int = 0


@dataclass(frozen=True)
class Table:
    """title: above the table; on a page with `folded` it is what a reader clicks to see the table.

    rest: name of the last column, where a narrow terminal shows the columns that do not fit.
    first: a terminal shows so many rows, unless it is to show everything; None: all.
    """

    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    title: str = ""
    note: str = ""
    rest: str = "more"
    first: int | None = None
    folded: bool = False
    detail: Detail = "always"


@dataclass(frozen=True)
class Figure:
    """Shown only on pages, and drawn when a page is written: a terminal needs no matplotlib.

    name: unique on the page.    draw: draws it on a canvas.    alt: text for those who do not see it.
    wide: all of the page's width, and drawn a second time for narrow screens; else half of it.
    """

    name: str
    draw: Callable[[Canvas], None]
    alt: str
    caption: str
    wide: bool = False
    detail: Detail = "page"


FEWEST_LAYERS = 3  # that a heat map is worth in the terminal, and of an adapter


@dataclass(frozen=True)
class HeatMap:
    """A value for each matrix (a row) and layer (a column). In the terminal each value is one character.

    cells: (row, layer) -> value.    top: the value with the strongest colour.
    """

    name: str
    title: str
    cells: Mapping[tuple[str, int], float]
    top: float
    show: Callable[[float], str]
    caption: str
    detail: Detail = "page"


@dataclass(frozen=True)
class Answers:
    """The same questions, answered before and after. rows: question, answer before, answer after."""

    names: tuple[str, str]
    rows: Sequence[tuple[str, str, str]]
    detail: Detail = "always"


@dataclass(frozen=True)
class Finding:
    """What follows from the numbers, and what to copy for it."""

    title: str
    text: str
    code: str = ""
    detail: Detail = "always"


@dataclass(frozen=True)
class Paragraph:
    text: str
    detail: Detail = "always"


@dataclass(frozen=True)
class List:
    items: Sequence[str]
    detail: Detail = "always"


@dataclass(frozen=True)
class Code:
    """Commands or settings to copy: lines are never broken."""

    text: str
    title: str = ""
    detail: Detail = "always"


Block = Table | Figure | HeatMap | Answers | Finding | Paragraph | List | Code


@dataclass(frozen=True)
class Section:
    """text: one sentence that says what the blocks show. Blocks of None are left out."""

    title: str
    text: str
    blocks: Sequence[Block | None]


@dataclass(frozen=True)
class Page:
    """lead: the answer in a sentence or two.    conclusion: what follows from the numbers.

    A page has both at its top, a terminal at the end of the output.
    """

    kind: str
    title: str
    lead: str
    numbers: Sequence[Number]
    sections: Sequence[Section]
    notes: Sequence[str] = ()
    conclusion: Section | None = None
