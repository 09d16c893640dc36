"""What was made of the data: counts, lengths, a hash."""

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tailora.data.dataset import Examples, Int64
from tailora.data.split import group


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
