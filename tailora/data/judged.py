"""Data to judge a model by, of any size: read once to check all of it, and again in chunks to be judged."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from tailora.data.codec import codec_of
from tailora.data.prepare import CHUNK, Learned, check_vocabulary, recognised, taught
from tailora.data.rows import Fault, refusal
from tailora.data.sources import read_rows
from tailora.errors import DataError


@dataclass(frozen=True, slots=True)
class Judged:
    """What there is to judge by, all of it checked."""

    source: str
    shape: str
    mapping: dict[str, str]  # the shape's key -> column
    chat_template: bool
    rows: int
    tokens: int  # as cut
    supervised_tokens: int
    longest: int  # tokens of the longest row, before cutting
    truncated: int  # rows cut at max_length
    cut_away: int  # of those: nothing that would be judged is left


@dataclass(frozen=True, slots=True)
class Source:
    """How the rows are read."""

    name: str
    tokenizer: Any
    field: Mapping[str, str]
    max_length: int
    limit: int | None = None  # the first so many rows

    def read(self) -> tuple[str, dict[str, str], Iterator[Learned | Fault]]:
        """Shape, mapping, and what becomes of every row. Raises DataError when there is no row of a known shape."""
        items = islice(read_rows(self.name, split="validation"), self.limit)
        ahead = list(islice(items, CHUNK))
        mapped = recognised(self.name, ahead, self.field)
        outcomes = taught(chain(ahead, items), mapped, codec_of(self.tokenizer), self.max_length)
        return mapped.shape.name, mapped.columns, outcomes


def examine(source: Source, embedding_rows: int) -> Judged:
    """Reads all of it. Raises DataError that names every problem with file, row and cause."""
    codec = codec_of(source.tokenizer)
    check_vocabulary(codec, embedding_rows)
    shape, mapping, outcomes = source.read()
    faults: list[Fault] = []
    rows = tokens = supervised = longest = truncated = cut_away = 0
    for one in outcomes:
        if isinstance(one, Fault):
            faults.append(one)
            continue
        example, length = one.encoded.example, one.encoded.length
        rows, tokens, supervised = rows + 1, tokens + len(example.input_ids), supervised + example.supervised
        longest = max(longest, length)
        truncated += length > source.max_length
        cut_away += example.supervised == 0
    if faults:
        raise refusal(faults)
    if rows == cut_away:
        raise DataError(
            f"data {source.name}: cutting at max_length {source.max_length} takes away all that would be judged, "
            f"in every row; raise --max-length (the longest row has {longest} tokens)"
        )
    template = codec.template is not None
    return Judged(source.name, shape, mapping, template, rows, tokens, supervised, longest, truncated, cut_away)


def chunks(source: Source, size: int) -> Iterator[list[Learned]]:
    """Rows with something to judge, `size` at a time. Raises DataError when the data is not what it was."""
    outcomes = source.read()[2]
    while chunk := list(islice(outcomes, size)):
        if faults := [one for one in chunk if isinstance(one, Fault)]:
            raise refusal(faults)
        if kept := [one for one in chunk if isinstance(one, Learned) and one.encoded.example.supervised]:
            yield kept
