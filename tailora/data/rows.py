"""One row of a data file, and one row that cannot be used."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tailora.errors import DataError, listing

SHOWN = 20


@dataclass(frozen=True, slots=True)
class Row:
    """`number` is the line of a text file, or the item's place in any other form; both count from 1."""

    file: str
    number: int
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a row cannot be used; `number` 0 means the whole file."""

    file: str
    number: int
    cause: str

    def __str__(self) -> str:
        return f"{self.file}:{self.number}: {self.cause}" if self.number else f"{self.file}: {self.cause}"


def refusal(faults: Sequence[Fault]) -> DataError:
    """One error for all faults: the first 20 in full, the rest counted."""
    lines = [str(fault) for fault in faults[:SHOWN]]
    if len(faults) > SHOWN:
        return DataError(
            f"{len(faults)} problems:\n"
            + "\n".join([*(f"  - {line}" for line in lines), f"  and {len(faults) - SHOWN} more"])
        )
    return DataError(listing(lines))
