"""Tokenised examples, end to end in two flat arrays."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

IGNORED = -100  # the label of a token that is read but not learned

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Example:
    """labels[i] is input_ids[i], or -100 where it is not learned; not shifted, and labels[0] is always -100."""

    input_ids: Int32  # (length,)
    labels: Int32  # (length,)
    row: int = 0  # place among the usable rows of its source, from 0

    @property
    def supervised(self) -> int:
        return int(np.count_nonzero(self.labels[1:] != IGNORED))


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """A sequence of examples: `examples[i]` is a view into the flat arrays."""

    input_ids: Int32  # (tokens,)
    labels: Int32  # (tokens,)
    starts: Int64  # (examples + 1,)
    rows: Int64  # (examples,)

    @classmethod
    def of(cls, examples: Iterable[Example]) -> Self:
        held = list(examples)
        lengths = [len(example.input_ids) for example in held]
        return cls(
            input_ids=_joined([example.input_ids for example in held]),
            labels=_joined([example.labels for example in held]),
            starts=np.cumsum([0, *lengths], dtype=np.int64),
            rows=np.array([example.row for example in held], dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        index %= len(self)
        part = slice(self.starts[index], self.starts[index + 1])
        return Example(self.input_ids[part], self.labels[part], int(self.rows[index]))

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> Int64:  # (examples,)
        return np.diff(self.starts)

    @property
    def supervised(self) -> Int64:
        """Learned tokens of each example (labels[1:] that are not -100)."""  # (examples,)
        learned = self.labels != IGNORED
        learned[self.starts[:-1][self.lengths > 0]] = False
        return np.diff(np.concatenate([[0], np.cumsum(learned, dtype=np.int64)])[self.starts])

    def select(self, indices: Iterable[int] | Int64) -> "Examples":
        return Examples.of(self[int(index)] for index in indices)

    def keys(self) -> list[bytes]:
        """One hash per example, equal where ids and labels are."""
        return [hashlib.sha256(example.input_ids.tobytes() + example.labels.tobytes()).digest() for example in self]


def _joined(parts: list[Int32]) -> Int32:
    return np.concatenate(parts, dtype=np.int32) if parts else np.zeros(0, np.int32)
