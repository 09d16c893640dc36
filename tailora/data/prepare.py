"""Reads, checks and tokenises a source: all of it for training, as a stream, or in chunks for evaluation.

readers -> schemas -> chat_template -> tokenize -> dataset, 1000 rows at a time; see the package's docstring
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np

from tailora.data import dataset
from tailora.data.chat_template import ChatTokenizer, SampleOptions, with_system
from tailora.data.dataset import IGNORED, DataReport, Example, Examples, with_other_replies
from tailora.data.readers import Row, RowProblem, Rows, data_error, read_rows
from tailora.data.schemas import (
    AUTO,
    CAUSAL_LM,
    FEEDBACK,
    PREFERENCE,
    AnySample,
    Choices,
    ColumnMapping,
    Conversation,
    Feedback,
    Pair,
    Preference,
    Sample,
    Text,
    convert_row,
    detect_schema,
)
from tailora.data.tokenize import EncodedSample, encode_samples
from tailora.errors import ConfigError, DataError

CHUNK = 1000  # rows tokenised at a time

# ---- Rows -> encoded samples


class EncodedRow(NamedTuple):
    """choices: the choices whose right answer is `sample`; None for other schemas.

    sample: of two replies the better one.
    """

    sample: Sample
    encoded: EncodedSample
    choices: Choices | None = None


def encode_source(
    source: str,
    items: Rows,
    field: Mapping[str, str] | None,
    tokenizer: ChatTokenizer,
    max_length: int,
    detect_from: int | None = CHUNK,
    task: str = AUTO,
) -> tuple[ColumnMapping, Iterator[EncodedRow | RowProblem]]:
    """Returns how the columns are read, and the encoded row or the problem for every item, in order.

    detect_from: how many of the first items decide on the schema; None: all.
    Raises DataError if these hold no row, or no row of a known schema.
    """
    first = list(islice(items, detect_from))
    rows = [item.fields for item in first if isinstance(item, Row)]
    if not rows:
        problems = [item for item in first if isinstance(item, RowProblem)]
        raise data_error(problems or [RowProblem(source, 0, "no rows: there is nothing to learn from")])
    try:
        mapping = detect_schema(rows, field, task)
    except DataError as error:
        raise DataError(f"data {source}: {error}") from None
    return mapping, _encode_rows(chain(first, items), mapping, tokenizer, max_length)


def _encode_rows(
    items: Iterable[Row | RowProblem], mapping: ColumnMapping, tokenizer: ChatTokenizer, max_length: int
) -> Iterator[EncodedRow | RowProblem]:
    numbered = enumerate(items)
    while chunk := list(islice(numbered, CHUNK)):
        converted = [_sample_of(item, mapping, tokenizer) if isinstance(item, Row) else item for _, item in chunk]
        samples = [part for sample in converted if not isinstance(sample, RowProblem) for part in _parts(sample)]
        results = iter(encode_samples(samples, tokenizer, max_length))
        for (index, item), sample in zip(chunk, converted, strict=True):
            if isinstance(sample, RowProblem):
                yield sample
                continue
            result = _join(sample, [next(results) for _ in _parts(sample)])
            if isinstance(result, DataError):
                yield RowProblem(item.file, item.number, str(result))
                continue
            encoded = replace(result, example=replace(result.example, source_index=index))
            yield EncodedRow(_parts(sample)[0], encoded, sample if isinstance(sample, Choices) else None)


def _sample_of(row: Row, mapping: ColumnMapping, tokenizer: ChatTokenizer) -> AnySample | RowProblem:
    """Returns the row's sample as the options of the tokenizer want it, or why it has none."""
    sample = convert_row(row, mapping)
    if isinstance(sample, RowProblem) or tokenizer.options.system is None:
        return sample

    def reply(part: Conversation | Pair) -> Conversation | Pair:
        result = with_system(part, tokenizer)
        assert not isinstance(result, Text)
        return result

    try:
        match sample:
            case Choices():
                return replace(sample, options=tuple(map(reply, sample.options)))
            case Preference():
                return Preference(reply(sample.chosen), reply(sample.rejected))
            case Feedback():
                return replace(sample, reply=reply(sample.reply))
        return with_system(sample, tokenizer)
    except DataError as error:
        return RowProblem(row.file, row.number, str(error))


def _parts(sample: AnySample) -> list[Sample]:
    """Returns what is tokenised of a sample."""
    match sample:
        case Choices():
            return [sample.options[sample.answer]]
        case Preference():
            return [sample.chosen, sample.rejected]
        case Feedback():
            return [sample.reply]
    return [sample]


def _join(sample: AnySample, parts: Sequence[EncodedSample | DataError]) -> EncodedSample | DataError:
    """Returns a sample from its encoded parts. Where the cut takes a whole reply of two, nothing of it is trained."""
    encoded = [part for part in parts if isinstance(part, EncodedSample)]
    if errors := [part for part in parts if isinstance(part, DataError)]:
        return errors[0]
    first, last = encoded[0], encoded[-1]
    if isinstance(sample, Feedback):
        return replace(first, example=replace(first.example, target=np.array([float(sample.desirable)])))
    if not isinstance(sample, Preference):
        return first
    example = Example.of_two(first.example, last.example)
    is_usable = first.example.supervised and last.example.supervised and first.example.hash != last.example.hash
    if not is_usable:
        example = replace(example, labels=np.full_like(example.labels, IGNORED))
    return EncodedSample(
        example,
        max(first.length, last.length),
        first.is_whole and last.is_whole,
        first.untrained_replies + last.untrained_replies,
    )


@dataclass(slots=True)
class RowCounts:
    """Counts of encoded rows. A row counts once, even if its source is read again.

    tokens: after cutting.    longest: tokens of the longest row, before cutting.    truncated: rows cut at max_length.
    read_in_part: of those, rows so long that their tokens were not all counted: `longest` is a lower bound then.
    cut_away: of those, rows without a trained token left.    replies_not_learned: see RenderedSample.
    duplicates: rows that are held-out examples too, if `held_out` has the hashes of those.
    """

    rows: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    longest: int = 0
    truncated: int = 0
    read_in_part: int = 0
    cut_away: int = 0
    replies_not_learned: int = 0
    duplicates: int = 0
    held_out: frozenset[bytes] = frozenset()

    def add(self, encoded: EncodedSample, max_length: int) -> None:
        example = encoded.example
        if example.source_index >= self.rows:
            self.rows = example.source_index + 1
            self.tokens += len(example.input_ids)
            self.supervised_tokens += example.supervised
            self.longest = max(self.longest, encoded.length)
            self.truncated += encoded.length > max_length
            self.read_in_part += not encoded.is_whole
            self.cut_away += example.supervised == 0
            self.replies_not_learned += encoded.untrained_replies
            self.duplicates += bool(self.held_out) and example.hash in self.held_out


def checked_tokenizer(
    tokenizer: Any, embedding_rows: int | None, options: SampleOptions | None = None
) -> ChatTokenizer:
    """Raises DataError if the tokenizer has ids that the model's embedding lacks; None: there is no model."""
    if embedding_rows is not None:
        token, last = max(tokenizer.get_vocab().items(), key=lambda entry: entry[1])
        if last >= embedding_rows:
            raise DataError(
                f"the tokenizer is larger than the model's embedding: its last token {token!r} has the id {last}, and "
                f"the embedding has {embedding_rows} rows; take the model's own tokenizer, or first resize the model: "
                f"model.resize_token_embeddings({last + 1})"
            )
    return ChatTokenizer.of(tokenizer, options)


def _all_cut(source: str, max_length: int, counts: RowCounts, use: str = "learned") -> DataError:
    longest = f"{'at least ' * (counts.read_in_part > 0)}{counts.longest:,}"
    return DataError(
        f"data {source}: cutting at max_length {max_length} removes all tokens that would be {use} from every row; "
        f"raise --max-length (the longest row has {longest} tokens)"
    )


# ---- Training data, all of it at once


@dataclass(frozen=True, slots=True, eq=False)
class PreparedData:
    """eval: distinct examples, since copies would count as independent ones. eval_samples[i] became eval[i]."""

    train: Examples
    eval: Examples
    report: DataReport
    eval_samples: list[Sample]


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
    options: SampleOptions | None = None,
    task: str = AUTO,
) -> PreparedData:
    """Reads, checks and tokenises everything; holds out a part unless there is an `eval_source`.

    task: what is trained; "auto" finds it from the rows.
    embedding_rows: rows of the model's embedding, which must have every token id.
    Raises DataError that names every problem with file, row and cause.
    """
    chat_tokenizer = checked_tokenizer(tokenizer, embedding_rows, options)
    data = _load_source(source, "train", chat_tokenizer, field, max_length, task)
    counts = [data.counts]
    if eval_source is not None:
        schema = data.mapping.schema
        eval_data = _load_source(eval_source, "validation", chat_tokenizer, field, max_length, schema.task)
        if schema.task != CAUSAL_LM and eval_data.mapping.schema.name != schema.name:
            raise DataError(
                f"data {eval_source}: its rows are {eval_data.mapping.schema.name}, and those of {source} are "
                f"{schema.name}; the held-out rows must have the same keys as the others"
            )
        counts.append(eval_data.counts)
        train, held_out, samples = data.examples, eval_data.examples, eval_data.samples
    else:
        split = dataset.split_examples(data.examples.hashes(), validation_split, seed, data.counts.cut_away)
        train, held_out = data.examples.select(split.train), data.examples.select(split.held_out)
        samples = [data.samples[index] for index in split.held_out]
    distinct = [copies[0] for copies in dataset.group_equal(held_out.hashes())]
    lengths = np.concatenate([train.lengths, held_out.lengths])
    repeated, duplicates = dataset.count_repeats(train.hashes(), held_out.hashes())
    report = DataReport(
        source=source,
        eval_source=eval_source,
        shape=data.mapping.schema.name,
        task=data.mapping.schema.task,
        mapping=data.mapping.columns,
        ignored=list(data.mapping.ignored),
        chat_template=chat_tokenizer.template is not None,
        rows=sum(part.rows for part in counts),
        train=len(train),
        eval=len(held_out),
        eval_copies=len(held_out) - len(distinct),
        tokens=int(lengths.sum()),
        supervised_tokens=int(train.supervised.sum() + held_out.supervised.sum()),
        longest=max(part.longest for part in counts),
        truncated=sum(part.truncated for part in counts),
        read_in_part=sum(part.read_in_part for part in counts),
        cut_away=sum(part.cut_away for part in counts),
        replies_not_learned=sum(part.replies_not_learned for part in counts),
        repeated=repeated,
        duplicates=duplicates,
        lengths=dataset.length_histogram(lengths),
        sha256=dataset.dataset_hash(train, held_out),
    )
    held_out, samples = held_out.select(distinct), [samples[index] for index in distinct]
    if data.mapping.schema.name == FEEDBACK:
        train, held_out = (with_other_replies(part, seed) for part in (train, held_out))
    return PreparedData(train, held_out, report, samples)


@dataclass(frozen=True, slots=True, eq=False)
class LoadedSource:
    """samples[i] became examples[i]."""

    mapping: ColumnMapping
    examples: Examples
    samples: list[Sample]
    counts: RowCounts


def _load_source(
    source: str, split: str, tokenizer: ChatTokenizer, field: Mapping[str, str] | None, max_length: int, task: str
) -> LoadedSource:
    rows = read_rows(source, split=split)
    mapping, encoded = encode_source(source, rows, field, tokenizer, max_length, detect_from=None, task=task)
    results = list(encoded)
    if problems := [result for result in results if isinstance(result, RowProblem)]:
        raise data_error(problems)
    counts, usable = RowCounts(), []
    for row in results:
        if isinstance(row, EncodedRow):
            counts.add(row.encoded, max_length)
            usable += [row] if row.encoded.example.supervised else []
    if not usable:
        raise _all_cut(source, max_length, counts)
    examples = Examples.of(row.encoded.example for row in usable)
    return LoadedSource(mapping, examples, [row.sample for row in usable], counts)


# ---- Training data as a stream


def stream_examples(
    source: str,
    tokenizer: Any,
    *,
    field: Mapping[str, str] | None = None,
    max_length: int = 1024,
    embedding_rows: int | None = None,
    options: SampleOptions | None = None,
    counts: RowCounts | None = None,
    task: str = AUTO,
) -> Iterator[Example]:
    """Yields examples in order, while they are read, without those whose trained tokens are all cut off.

    counts: is updated with every row; pass the same one when the stream is read again.
    Raises DataError at the first unusable row, or at the end if no row was usable.
    """
    chat_tokenizer = checked_tokenizer(tokenizer, embedding_rows, options)
    rows = read_rows(source, streaming=True)
    mapping, encoded = encode_source(source, rows, field, chat_tokenizer, max_length, task=task)
    if mapping.schema.task == PREFERENCE:
        raise ConfigError(
            f"data {source} holds preferences, for which the whole data is read before training: leave --streaming out"
        )
    counts, is_empty = counts or RowCounts(), True
    for row in encoded:
        if isinstance(row, RowProblem):
            raise data_error([row])
        counts.add(row.encoded, max_length)
        if row.encoded.example.supervised:
            is_empty = False
            yield row.encoded.example
    if is_empty:
        raise _all_cut(source, max_length, counts)


# ---- Evaluation data of any size: read once to check all of it, and again in chunks to be scored


@dataclass(frozen=True, slots=True)
class EvalDataReport:
    """Counts of the checked data. The names are the keys of report.json, as in DataReport."""

    source: str
    shape: str
    mapping: dict[str, str]
    chat_template: bool
    rows: int
    tokens: int  # after cutting
    supervised_tokens: int  # of the rows that are evaluated, without copies
    longest: int  # tokens of the longest row, before cutting
    truncated: int  # rows cut at max_length
    read_in_part: int  # of those, rows so long that not all of their tokens were counted
    cut_away: int  # of those: no supervised token is left
    copies: int  # rows that are copies of an earlier one: they are not evaluated again


@dataclass(frozen=True, slots=True)
class EvalSource:
    """How the rows are read. limit: read at most so many rows."""

    name: str
    tokenizer: Any
    field: Mapping[str, str]
    max_length: int
    limit: int | None = None
    options: SampleOptions | None = None

    @property
    def chat_tokenizer(self) -> ChatTokenizer:
        return ChatTokenizer.of(self.tokenizer, self.options)

    def read(self) -> tuple[ColumnMapping, Iterator[EncodedRow | RowProblem]]:
        """Raises DataError if there is no row of a known schema."""
        items = islice(read_rows(self.name, split="validation"), self.limit)
        return encode_source(self.name, items, self.field, self.chat_tokenizer, self.max_length, task=CAUSAL_LM)


def check_eval_source(source: EvalSource, embedding_rows: int) -> EvalDataReport:
    """Reads all of it. Raises DataError that names every problem with file, row and cause."""
    tokenizer = checked_tokenizer(source.tokenizer, embedding_rows, source.options)
    mapping, results = source.read()
    problems, counts, seen, judged = [], RowCounts(), set[bytes](), 0
    for result in results:
        if isinstance(result, RowProblem):
            problems.append(result)
        else:
            counts.add(result.encoded, source.max_length)
            judged += result.encoded.example.supervised if _is_evaluated(result, seen) else 0
    if problems:
        raise data_error(problems)
    if counts.rows == counts.cut_away:
        raise _all_cut(source.name, source.max_length, counts, use="judged")
    numbers = {**asdict(counts), "supervised_tokens": judged}
    for name in ("replies_not_learned", "duplicates", "held_out"):
        del numbers[name]
    has_template = tokenizer.template is not None
    copies = counts.rows - counts.cut_away - len(seen)
    return EvalDataReport(source.name, mapping.schema.name, mapping.columns, has_template, **numbers, copies=copies)


def _is_evaluated(row: EncodedRow, seen: set[bytes]) -> bool:
    """Returns False if the row has no supervised token or is a copy of a row in `seen`, to which it is added.

    Copies have the same ids and labels up to max_length, and the same choices.
    """
    example = row.encoded.example
    key = hashlib.sha256(example.hash + repr(row.choices).encode()).digest()
    if not example.supervised or key in seen:
        return False
    seen.add(key)
    return True


def read_eval_chunks(source: EvalSource, size: int) -> Iterator[list[EncodedRow]]:
    """Yields the rows that have supervised tokens, without copies of earlier rows, of `size` rows at a time.

    Raises DataError if the data has problems that `check_eval_source` did not see, because it has changed.
    """
    _, results = source.read()
    seen = set[bytes]()
    while chunk := list(islice(results, size)):
        if problems := [result for result in chunk if isinstance(result, RowProblem)]:
            raise data_error(problems)
        if rows := [row for row in chunk if isinstance(row, EncodedRow) and _is_evaluated(row, seen)]:
            yield rows
