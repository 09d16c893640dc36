"""What a page is made of. Text is plain text: the template escapes it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from matplotlib.figure import Figure


@dataclass(frozen=True)
class Drawing:
    """A figure, and what its marks say when pointed at: id of a collection -> one text for each of its marks."""

    figure: Figure
    tips: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Picture:
    """Half of the page's width, or, where `wide`, all of it: then drawn a second time for narrow screens."""

    macro: ClassVar = "picture"
    name: str  # unique on the page
    draw: Callable[[float], Drawing]  # width in CSS pixels ->
    alt: str
    caption: str
    wide: bool = False


@dataclass(frozen=True)
class Table:
    macro: ClassVar = "table"
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1  # columns of words, on the left; the others hold numbers
    folded: str = ""  # shown only when asked for, under this title


@dataclass(frozen=True)
class Answers:
    """The same questions, answered before and after."""

    macro: ClassVar = "answers"
    heads: tuple[str, str]
    rows: Sequence[tuple[str, str, str]]  # question, answer, answer


@dataclass(frozen=True)
class Finding:
    """What follows from the numbers, and what to copy for it."""

    macro: ClassVar = "finding"
    title: str
    text: str
    code: str = ""


@dataclass(frozen=True)
class Points:
    macro: ClassVar = "points"
    items: Sequence[str]


@dataclass(frozen=True)
class Code:
    macro: ClassVar = "code"
    text: str
    folded: str = ""


Part = Picture | Table | Answers | Finding | Points | Code


@dataclass(frozen=True)
class Section:
    """Parts of None are left out; a section without any is not shown."""

    title: str
    reading: str  # one sentence: what is to be seen
    parts: Sequence[Part | None]


@dataclass(frozen=True)
class Tile:
    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Page:
    kind: str
    title: str
    lead: str
    tiles: Sequence[Tile]
    sections: Sequence[Section]
    notes: Sequence[str] = ()

    @property
    def shown(self) -> list[Section]:
        """Sections that have something to show."""
        return [section for section in self.sections if any(section.parts)]


Settings = Mapping[str, Any]
