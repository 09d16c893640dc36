"""All of the data's way to training: rows, shape, samples, tokens, checks, split, report."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np

from tailora.data.chat_template import Codec, codec_of
from tailora.data.dataset import DataReport, Example, Examples, content_hash, histogram, repeats, split
from tailora.data.readers import Fault, Row, read_rows, refusal
from tailora.data.schemas import Choices, Mapped, Sample, convert, recognise
from tailora.data.tokenize import Encoded, encode_all
from tailora.errors import DataError

CHUNK = 1000  # rows tokenised at a time


@dataclass(frozen=True, slots=True, eq=False)
class PreparedData:
    train: Examples
    eval: Examples
    report: DataReport
    eval_samples: list[Sample]  # eval_samples[i] became eval[i]


class Learned(NamedTuple):
    sample: Sample
    encoded: Encoded
    choices: Choices | None = None  # that the sample is the right one of


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """One source, tokenised. `samples[i]` became `examples[i]`."""

    name: str
    mapped: Mapped
    examples: Examples
    samples: list[Sample]
    rows: int
    longest: int  # before cutting
    truncated: int
    cut_away: int
    lost: int


@dataclass(slots=True)
class Cuts:
    """What was cut of a stream so far. A row counts once, however often the stream is read."""

    rows: int = 0
    truncated: int = 0  # longer than max_length
    cut_away: int = 0  # of those: left out, because the cut took all that would be learned

    def count(self, encoded: Encoded, max_length: int) -> None:
        if encoded.example.row >= self.rows:
            self.rows = encoded.example.row + 1
            self.truncated += encoded.length > max_length
            self.cut_away += encoded.example.supervised == 0


def prepare(
    source: str,
    tokenizer: Any,
    *,
    eval_source: str | None = None,
    field: Mapping[str, str] | None = None,
    max_length: int = 1024,
    validation_split: float = 0.05,
    seed: int = 0,
    embedding_rows: int | None = None,
) -> PreparedData:
    """Read, check and tokenise everything; hold a part out unless `eval_source` brings one.

    embedding_rows: rows of the model's embedding, which every token id must be below.
    Raises DataError that names every problem with file, row and cause.
    """
    codec = codec_of(tokenizer)
    if embedding_rows is not None:
        check_vocabulary(codec, embedding_rows)
    data = _load(source, "train", codec, field or {}, max_length)
    if eval_source is not None:
        other = _load(eval_source, "validation", codec, field or {}, max_length)
        report = _report([data, other], data.examples, other.examples, codec)
        return PreparedData(data.examples, other.examples, report, other.samples)
    train, held = split(data.examples.keys(), validation_split, seed)
    sides = data.examples.select(train), data.examples.select(held)
    return PreparedData(*sides, _report([data], *sides, codec), [data.samples[place] for place in held])


def stream(
    source: str,
    tokenizer: Any,
    *,
    field: Mapping[str, str] | None = None,
    max_length: int = 1024,
    embedding_rows: int | None = None,
    cuts: Cuts | None = None,
) -> Iterator[Example]:
    """Examples in order, while they are read; those whose learned tokens are all cut off are left out.

    cuts: counts what is cut; a stream that is read again goes on with the same one.
    Raises DataError at the first unusable rows, or at the end when no row was usable.
    """
    codec = codec_of(tokenizer)
    if embedding_rows is not None:
        check_vocabulary(codec, embedding_rows)
    items = read_rows(source, streaming=True)
    ahead = list(islice(items, CHUNK))
    mapped = recognised(source, ahead, field or {})
    longest, found = 0, False
    for one in taught(chain(ahead, items), mapped, codec, max_length):
        if isinstance(one, Fault):
            raise refusal([one])
        longest = max(longest, one.encoded.length)
        if cuts is not None:
            cuts.count(one.encoded, max_length)
        if one.encoded.example.supervised:
            found = True
            yield one.encoded.example
    if not found:
        raise _all_cut(source, max_length, longest)


def _load(source: str, part: str, codec: Codec, field: Mapping[str, str], max_length: int) -> Loaded:
    items = list(read_rows(source, split=part))
    mapped = recognised(source, items, field)
    outcomes = list(taught(items, mapped, codec, max_length))
    faults = [one for one in outcomes if isinstance(one, Fault)]
    if faults:
        raise refusal(faults)
    learned = [one for one in outcomes if isinstance(one, Learned)]
    kept = [one for one in learned if one.encoded.example.supervised]
    if not kept:
        raise _all_cut(source, max_length, max(one.encoded.length for one in learned))
    return Loaded(
        name=source,
        mapped=mapped,
        examples=Examples.of(one.encoded.example for one in kept),
        samples=[one.sample for one in kept],
        rows=len(items),
        longest=max(one.encoded.length for one in learned),
        truncated=sum(one.encoded.length > max_length for one in learned),
        cut_away=len(learned) - len(kept),
        lost=sum(one.encoded.lost for one in learned),
    )


def recognised(source: str, items: Sequence[Row | Fault], field: Mapping[str, str]) -> Mapped:
    """Raises DataError when there is no row to look at, or none of a known shape."""
    rows = [item.fields for item in items if isinstance(item, Row)]
    if rows:
        return recognise(rows, field)
    faults = [item for item in items if isinstance(item, Fault)]
    raise refusal(faults or [Fault(source, 0, "no rows: there is nothing to learn from")])


def taught(items: Iterable[Row | Fault], mapped: Mapped, codec: Codec, max_length: int) -> Iterator[Learned | Fault]:
    """What became of every item, in order."""
    numbered = enumerate(items)
    while chunk := list(islice(numbered, CHUNK)):
        samples = [convert(item, mapped) if isinstance(item, Row) else item for _, item in chunk]
        results = iter(encode_all([_right(each) for each in samples if not isinstance(each, Fault)], codec, max_length))
        for (place, item), sample in zip(chunk, samples, strict=True):
            yield sample if isinstance(sample, Fault) else _outcome(place, item, sample, next(results))


def _right(sample: Sample | Choices) -> Sample:
    return sample.options[sample.answer] if isinstance(sample, Choices) else sample


def _outcome(place: int, item: Row | Fault, sample: Sample | Choices, result: Encoded | DataError) -> Learned | Fault:
    if isinstance(result, DataError):
        return Fault(item.file, item.number, str(result))
    encoded = replace(result, example=replace(result.example, row=place))
    return Learned(_right(sample), encoded, sample if isinstance(sample, Choices) else None)


def _all_cut(source: str, max_length: int, longest: int) -> DataError:
    return DataError(
        f"data {source}: cutting at max_length {max_length} takes away all that would be learned, in every row; "
        f"raise --max-length (the longest row has {longest} tokens)"
    )


def check_vocabulary(codec: Codec, embedding_rows: int) -> None:
    token, last = max(codec.tokenizer.get_vocab().items(), key=lambda entry: entry[1])
    if last >= embedding_rows:
        raise DataError(
            f"the tokenizer is larger than the model's embedding: its last token {token!r} has the id {last}, and the "
            f"embedding has {embedding_rows} rows; take the model's own tokenizer, or first resize the model: "
            f"model.resize_token_embeddings({last + 1})"
        )


def _report(sources: list[Loaded], train: Examples, held: Examples, codec: Codec) -> DataReport:
    lengths = np.concatenate([train.lengths, held.lengths])
    repeated, duplicates = repeats(train.keys(), held.keys())
    return DataReport(
        source=sources[0].name,
        eval_source=sources[1].name if len(sources) > 1 else None,
        shape=sources[0].mapped.shape.name,
        mapping=sources[0].mapped.columns,
        ignored=list(sources[0].mapped.ignored),
        chat_template=codec.template is not None,
        rows=sum(source.rows for source in sources),
        train=len(train),
        eval=len(held),
        tokens=int(lengths.sum()),
        supervised_tokens=int(train.supervised.sum() + held.supervised.sum()),
        longest=max(source.longest for source in sources),
        truncated=sum(source.truncated for source in sources),
        cut_away=sum(source.cut_away for source in sources),
        replies_not_learned=sum(source.lost for source in sources),
        repeated=repeated,
        duplicates=duplicates,
        lengths=histogram(lengths),
        sha256=content_hash(train, held),
    )


# ---- Data to judge a model by, of any size: read once to check all of it, and again in chunks to be judged.


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
