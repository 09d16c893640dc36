"""Tokenised examples, end to end in two flat arrays."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from tailora.errors import DataError

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


# ---- Holding out examples, so that no copy of one stands on both sides.


class Sides(NamedTuple):
    train: list[int]
    held_out: list[int]


def split(keys: Sequence[bytes], share: float, seed: int) -> Sides:
    """Places of the examples on either side, in their order; equal keys go to the same side.

    share: of the examples to hold out, at least one; 0 holds out none. The same (keys, share, seed) give the same.
    Raises DataError when there are not two different examples to part.
    """
    if not share:
        return Sides(list(range(len(keys))), [])
    groups = group(keys)
    if len(groups) < 2:
        raise DataError(
            f"{len(groups)} different example in {len(keys)} rows: none can be held out; "
            "add data, or use --validation-split 0"
        )
    target = max(1, round(len(keys) * share))
    held: list[int] = []
    order = np.random.default_rng(seed).permutation(len(groups))
    for place in order[:-1]:  # the last one stays, so that something is left to learn
        if len(held) + len(groups[place]) <= target:
            held += groups[place]
    held = held or min(groups, key=len)
    chosen = set(held)
    return Sides([place for place in range(len(keys)) if place not in chosen], sorted(held))


def group(keys: Sequence[bytes]) -> list[list[int]]:
    """Places of equal keys together, in order of first appearance."""
    groups: dict[bytes, list[int]] = {}
    for place, key in enumerate(keys):
        groups.setdefault(key, []).append(place)
    return list(groups.values())


# ---- What was made of the data: counts, lengths, a hash.


@dataclass(frozen=True, slots=True)
class Bin:
    """Examples of `low` to `high` tokens, both included."""

    low: int
    high: int
    examples: int


@dataclass(frozen=True, slots=True)
class DataReport:
    source: str
    eval_source: str | None
    shape: str
    mapping: dict[str, str]  # the shape's key -> column
    ignored: list[str]  # columns that are not used
    chat_template: bool
    rows: int  # usable rows of source and eval_source
    train: int  # examples
    eval: int
    tokens: int  # train and eval
    supervised_tokens: int
    longest: int  # tokens of the longest row, before cutting
    truncated: int  # examples cut at max_length
    cut_away: int  # examples left out because the cut took all that would be learned
    replies_not_learned: int  # the template rewrites them once the chat goes on, or nothing comes before them
    repeated: int  # rows that repeat an earlier row of the same side
    duplicates: int  # eval examples that are train examples too
    lengths: list[Bin]
    sha256: str  # of all ids and labels, train then eval

    @property
    def supervised_share(self) -> float:
        return self.supervised_tokens / self.tokens

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "supervised_share": self.supervised_share}


def histogram(lengths: Int64, bins: int = 10) -> list[Bin]:
    """At most `bins` bins that cover all lengths, each wider than the last by the same factor: few are very long."""
    edges = np.unique(np.geomspace(lengths.min(), lengths.max() + 1, bins + 1).round().astype(np.int64))
    counts, _ = np.histogram(lengths, edges)
    return [Bin(int(start), int(stop) - 1, int(n)) for start, stop, n in zip(edges, edges[1:], counts, strict=False)]


def content_hash(*parts: Examples) -> str:
    digest = hashlib.sha256()
    for part in parts:
        for array in (part.starts, part.input_ids, part.labels):
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def repeats(train: list[bytes], held: list[bytes]) -> tuple[int, int]:
    """Rows that repeat one of their own side, and held-out rows that are trained on too."""
    known = set(train)
    own = sum(len(side) - len(group(side)) for side in (train, held))
    return own, sum(key in known for key in held)
