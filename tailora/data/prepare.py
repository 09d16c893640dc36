"""Reads, checks and tokenises a source: all of it for training, as a stream, or in chunks for evaluation.

readers -> schemas -> chat_template -> tokenize -> dataset, 1000 rows at a time; see the package's docstring
"""

import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np

from tailora.data import dataset
from tailora.data.chat_template import ChatTokenizer, SampleOptions, with_system
from tailora.data.dataset import IGNORED, DataReport, Example, Examples, Mixture, SourceReport, with_other_replies
from tailora.data.demo import resolve_demo
from tailora.data.labels import Labels, encode_labelled, most_tokens
from tailora.data.readers import Row, RowProblem, Rows, Source, data_error, read_rows
from tailora.data.schemas import (
    AUTO,
    CAUSAL_LM,
    FEEDBACK,
    PREFERENCE,
    SEQ2SEQ,
    TEXT,
    AnySample,
    Choices,
    ColumnMapping,
    Conversation,
    Feedback,
    Labelled,
    Pair,
    Preference,
    Sample,
    Tagged,
    Text,
    convert_row,
    count_messages,
    detect_schema,
    evaluation_schema,
    weight_of,
)
from tailora.data.tokenize import EncodedSample, encode_samples, encode_seq2seq
from tailora.errors import ConfigError, DataError, listing

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
    whole_texts: bool = False,
    for_evaluation: bool = False,
    labels: Labels | None = None,
) -> tuple[ColumnMapping, Iterator[EncodedRow | RowProblem]]:
    """Returns how the columns are read, and the encoded row or the problem for every item, in order.

    for_evaluation: a pair of replies becomes choices, of which the chosen reply is right.
    detect_from: how many of the first items decide on the schema; None: all.
    whole_texts: plain texts are not cut at max_length.
    labels: of the tasks that have some.
    Raises DataError if these hold no row, or no row of a known schema.
    """
    first = list(islice(items, detect_from))
    rows = [item.fields for item in first if isinstance(item, Row)]
    if not rows:
        problems = [item for item in first if isinstance(item, RowProblem)]
        raise data_error(problems or [RowProblem(source, 0, "no rows: there is nothing to learn from")])
    try:
        mapping = detect_schema(rows, field, task)
        if for_evaluation:
            mapping = replace(mapping, schema=evaluation_schema(mapping.schema))
    except DataError as error:
        raise DataError(f"data {source}: {error}") from None
    longest = sys.maxsize if whole_texts and mapping.schema.name == TEXT else max_length
    return mapping, _encode_rows(chain(first, items), mapping, tokenizer, longest, labels)


def _encode_rows(
    items: Iterable[Row | RowProblem],
    mapping: ColumnMapping,
    tokenizer: ChatTokenizer,
    max_length: int,
    labels: Labels | None,
) -> Iterator[EncodedRow | RowProblem]:
    encode: Any = encode_samples if labels is None else partial(encode_labelled, labels=labels)
    if mapping.schema.task == SEQ2SEQ:
        encode = encode_seq2seq
    numbered = enumerate(items)
    while chunk := list(islice(numbered, CHUNK)):
        converted = [_sample_of(item, mapping, tokenizer) if isinstance(item, Row) else item for _, item in chunk]
        samples = [part for sample in converted if not isinstance(sample, RowProblem) for part in _parts(sample)]
        results = iter(encode(samples, tokenizer, max_length))
        for (index, item), sample in zip(chunk, converted, strict=True):
            if isinstance(sample, RowProblem):
                yield sample
                continue
            result = _join(sample, [next(results) for _ in _parts(sample)])
            if isinstance(result, DataError):
                yield RowProblem(item.file, item.number, str(result))
                continue
            weight = weight_of(item, mapping) if isinstance(item, Row) else 1.0
            encoded = replace(result, example=replace(result.example, source_index=index, weight=weight))
            yield EncodedRow(_parts(sample)[0], encoded, sample if isinstance(sample, Choices) else None)


def _sample_of(row: Row, mapping: ColumnMapping, tokenizer: ChatTokenizer) -> AnySample | RowProblem:
    """Returns the row's sample as the options of the tokenizer want it, or why it has none."""
    sample = convert_row(row, mapping)
    if isinstance(sample, RowProblem | Labelled | Tagged) or tokenizer.options.system is None:
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


def _parts(sample: AnySample) -> list[Any]:
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
    are_same = first.example.hash == last.example.hash
    if are_same and max(first.length, last.length) == len(first.example.input_ids):  # nothing was cut
        return DataError("nothing to learn: chosen and rejected are the same tokens")
    if are_same or not (first.example.supervised and last.example.supervised):
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
    without_weight: rows whose weight is 0.
    cut_away: rows without a trained token left, of those that were cut.    replies_not_learned: see RenderedSample.
    duplicates: rows that are held-out examples too, if `held_out` has the hashes of those.
    """

    rows: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    longest: int = 0
    truncated: int = 0
    read_in_part: int = 0
    without_weight: int = 0
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
            self.without_weight += example.weight == 0
            self.cut_away += not encoded.is_learned
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


def _is_trained(encoded: EncodedSample) -> bool:
    return encoded.is_learned and encoded.example.weight > 0


def _all_cut(source: str, max_length: int, counts: RowCounts, use: str = "learned") -> DataError:
    if counts.without_weight:
        return DataError(f"data {source}: nothing to learn: {counts.without_weight:,} rows have the weight 0")
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
    source: str | Sequence[Source],
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
    labels: Labels | None = None,
    for_evaluation: bool = False,
) -> PreparedData:
    """Reads, checks and tokenises everything; holds out a part of all sources unless there is an `eval_source`.

    task: what is trained; "auto" finds it from the rows.    labels: those of all rows, for tasks that have some.
    embedding_rows: rows of the model's embedding, which must have every token id.
    for_evaluation: as in `encode_source`, for the loss of a language model.
    Raises DataError that names every problem with file, row and cause.
    """
    chat_tokenizer = checked_tokenizer(tokenizer, embedding_rows, options)
    if labels is not None:
        max_length = most_tokens(tokenizer, max_length)
    sources = [Source(source)] if isinstance(source, str) else list(source)
    read = partial(
        _load_sources,
        tokenizer=chat_tokenizer,
        field=field,
        max_length=max_length,
        labels=labels,
        for_evaluation=for_evaluation,
    )
    loaded = read(sources, "train", task=task)
    if eval_source is None:
        everything = loaded
        trained, held_out = _split(loaded, validation_split, seed, max_length, labels)
    else:
        trained = loaded
        held_out = read([Source(eval_source)], "validation", task=loaded[0].mapping.schema.task)
        everything = [*trained, *held_out]
    _check_same_task(everything)
    trained, held_out = ([part.in_blocks(max_length) for part in side] for side in (trained, held_out))
    train, judged = (Examples.of(chain.from_iterable(part.examples for part in side)) for side in (trained, held_out))
    if any(part.source.weight != 1 for part in trained):
        sizes, weights = zip(*((len(part.examples), part.source.weight) for part in trained), strict=True)
        train = replace(train, mixture=Mixture(sizes, weights))
    distinct = [copies[0] for copies in dataset.group_equal(judged.hashes())]
    lengths = np.concatenate([train.lengths, judged.lengths])
    repeated, duplicates = dataset.count_repeats(train.hashes(), judged.hashes())
    counts = [part.counts for part in everything]
    mappings = [part.mapping for part in loaded]
    per_epoch = train.mixture.counts if train.mixture else [len(part.examples) for part in trained]
    report = DataReport(
        source=", ".join(map(str, sources)),
        sources=[
            SourceReport(
                name=part.source.name,
                weight=part.source.weight,
                shape=part.mapping.schema.name,
                rows=part.counts.rows,
                train=len(part.examples),
                eval=0 if eval_source else len(other.examples),
                epoch=count,
            )
            for part, other, count in zip(trained, trained if eval_source else held_out, per_epoch, strict=True)
        ],
        eval_source=eval_source,
        task=loaded[0].mapping.schema.task,
        shape=", ".join(dict.fromkeys(mapping.schema.name for mapping in mappings)),
        mapping={key: column for mapping in mappings for key, column in mapping.columns.items()},
        ignored=list(dict.fromkeys(column for mapping in mappings for column in mapping.ignored)),
        chat_template=chat_tokenizer.template is not None and any(m.schema.uses_chat_template for m in mappings),
        messages=count_messages(chain.from_iterable(part.samples for part in everything)),
        rows=sum(part.rows for part in counts),
        train=len(train),
        eval=len(judged),
        eval_copies=len(judged) - len(distinct),
        tokens=int(lengths.sum()),
        supervised_tokens=int(train.supervised.sum() + judged.supervised.sum()),
        longest=max(part.longest for part in counts),
        truncated=sum(part.truncated for part in counts),
        read_in_part=sum(part.read_in_part for part in counts),
        without_weight=sum(part.without_weight for part in counts),
        cut_away=sum(part.cut_away for part in counts),
        replies_not_learned=sum(part.replies_not_learned for part in counts),
        repeated=repeated,
        duplicates=duplicates,
        lengths=dataset.length_histogram(lengths),
        sha256=dataset.dataset_hash(train, judged),
        labels={} if labels is None else labels.counts(train),
        eval_labels={} if labels is None else labels.counts(judged),
    )
    samples = [sample for part in held_out for sample in part.samples or part.decoded(tokenizer)]
    judged, samples = judged.select(distinct), [samples[index] for index in distinct]
    if loaded[0].mapping.schema.name == FEEDBACK:
        if 1 in (len(train), len(judged)):
            raise DataError(
                f"data {report.source}: {len(train):,} rows are to train on and {len(judged):,} different ones held "
                "out; of single replies each side needs two rows, because a reply is compared with those to other "
                "prompts: add data, or change --validation-split"
            )
        if train.targets is not None and len(np.unique(train.targets)) == 1:
            raise DataError(
                f"data {report.source}: all labels are {'true' if train.targets.any() else 'false'}, so there is "
                "nothing to tell apart: add rows with the other label, or take --task causal-lm"
            )
        train, judged = (with_other_replies(part, seed, max_length) for part in (train, judged))
    return PreparedData(train, judged, report, samples)


@dataclass(frozen=True, slots=True, eq=False)
class LoadedSource:
    """samples[i] became examples[i]; [] for blocks of texts.

    documents: how the texts of the source become examples, while they are still whole; None if its rows are examples.
    """

    source: Source
    mapping: ColumnMapping
    examples: Examples
    samples: list[Sample]
    counts: RowCounts
    documents: str | None

    def select(self, indices: Sequence[int]) -> "LoadedSource":
        samples = [self.samples[index] for index in indices] if self.samples else []
        return replace(self, examples=self.examples.select(indices), samples=samples)

    def in_blocks(self, max_length: int) -> "LoadedSource":
        """Returns texts in examples of at most max_length tokens; other sources as they are."""
        if self.documents is None:
            return self
        blocks = dataset.cut_into_blocks(self.examples, max_length, concatenated=self.documents == "concatenated")
        return replace(self, examples=Examples.of(blocks), samples=[], documents=None)

    def decoded(self, tokenizer: Any) -> list[Sample]:
        return [Text(tokenizer.decode(example.input_ids.tolist())) for example in self.examples]


def _load_sources(
    sources: Sequence[Source],
    split: str,
    *,
    tokenizer: ChatTokenizer,
    field: Mapping[str, str] | None,
    max_length: int,
    task: str,
    labels: Labels | None,
    for_evaluation: bool,
) -> list[LoadedSource]:
    """Raises DataError that names the problems of all sources."""
    loaded, problems = [], []
    for source in sources:
        try:
            loaded.append(_load_source(source, split, tokenizer, field, max_length, task, labels, for_evaluation))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError(problems[0] if len(problems) == 1 else listing(problems))
    if split == "train":
        check_options([part.mapping for part in loaded], tokenizer.options)
    return loaded


def _check_same_task(sources: Sequence[LoadedSource]) -> None:
    """Raises DataError if sources are for different tasks, or have different rows for one that needs the same."""
    first = sources[0]
    schema = first.mapping.schema
    for other in sources[1:]:
        its_schema = other.mapping.schema
        if its_schema.task != schema.task or (schema.task != CAUSAL_LM and its_schema.name != schema.name):
            raise DataError(
                f"data {other.source}: its rows are {its_schema.name}, and those of {first.source} are {schema.name}; "
                "give sources and held-out rows with the same keys for this task"
            )


def check_options(mappings: Sequence[ColumnMapping], options: SampleOptions) -> None:
    """Raises DataError if an option is given that no row of the data can follow."""
    names = ", ".join(dict.fromkeys(mapping.schema.name for mapping in mappings))
    is_text = [mapping.schema.name == TEXT for mapping in mappings]
    has_preferences = any(mapping.schema.task == PREFERENCE for mapping in mappings)
    has_completion = [not COMPLETION_KEYS.isdisjoint(mapping.schema.required) for mapping in mappings]
    problems = [
        f"{option} and the rows are read as {names}: leave it out"
        for cannot_be_followed, option in (
            (options.documents == "concatenated" and not any(is_text), "--documents concatenated is for plain texts,"),
            (options.system is not None and all(is_text), "--system needs conversations,"),
            (options.assistant_only_loss and all(is_text), "--assistant-only-loss needs conversations,"),
            (options.completion_only_loss and not any(has_completion), "--completion-only-loss needs completions,"),
            (
                has_preferences and options.completion_only_loss is False,
                "--no-completion-only-loss makes prompts a part of the replies that are compared,",
            ),
            (
                has_preferences and options.assistant_only_loss is False,
                "--no-assistant-only-loss makes other messages a part of the replies that are compared,",
            ),
        )
        if cannot_be_followed
    ]
    if problems:
        raise DataError(listing(problems))


COMPLETION_KEYS = frozenset({"completion", "output", "choices", "chosen"})


def _load_source(
    source: Source,
    split: str,
    tokenizer: ChatTokenizer,
    field: Mapping[str, str] | None,
    max_length: int,
    task: str,
    labels: Labels | None,
    for_evaluation: bool,
) -> LoadedSource:
    mapping, encoded = encode_source(
        source.name,
        read_rows(source.name, split=split),
        field,
        tokenizer,
        max_length,
        detect_from=None,
        task=task,
        whole_texts=True,
        for_evaluation=for_evaluation,
        labels=labels,
    )
    is_text = mapping.schema.name == TEXT
    results = list(encoded)
    if problems := [result for result in results if isinstance(result, RowProblem)]:
        raise data_error(problems)
    counts, usable = RowCounts(), []
    for row in results:
        if isinstance(row, EncodedRow):
            counts.add(row.encoded, sys.maxsize if is_text else max_length)
            usable += [row] if _is_trained(row.encoded) else []
    if not usable or max_length < 2:
        raise _all_cut(source.name, max_length, counts)
    examples = Examples.of(row.encoded.example for row in usable)
    samples = [row.sample for row in usable]
    return LoadedSource(source, mapping, examples, samples, counts, tokenizer.options.documents if is_text else None)


def _split(
    loaded: list[LoadedSource], share: float, seed: int, max_length: int, labels: Labels | None
) -> tuple[list[LoadedSource], list[LoadedSource]]:
    """Returns what is trained and what is held out of each source. Texts stay whole, unless there is only one.

    labels: if an example has one of several classes, about the same share of each class is held out.
    """
    hashes = [part.examples.hashes() for part in loaded]
    if share and len(set(chain.from_iterable(hashes))) < 2:
        loaded = [part.in_blocks(max_length) for part in loaded]
        hashes = [part.examples.hashes() for part in loaded]
    left_out = sum(part.counts.cut_away for part in loaded)
    classes = [] if labels is None else [index for part in loaded for index in labels.classes(part.examples)]
    split = dataset.split_examples(list(chain.from_iterable(hashes)), share, seed, left_out, classes)
    sides: tuple[list[LoadedSource], list[LoadedSource]] = ([], [])
    first = 0
    for part in loaded:
        end = first + len(part.examples)
        for side, indices in zip(sides, split, strict=True):
            side.append(part.select([index - first for index in indices if first <= index < end]))
        first = end
    if empty := [str(part.source) for part in sides[0] if not len(part.examples)]:
        raise DataError(f"data {', '.join(empty)}: all examples are held out; add data, or use --validation-split 0")
    return sides


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
    items = read_rows(source, streaming=True)
    mapping, rows = encode_source(source, items, field, chat_tokenizer, max_length, task=task, whole_texts=True)
    if mapping.schema.task == PREFERENCE:
        raise ConfigError(
            f"data {source} holds preferences, for which the whole data is read before training: leave --streaming out"
        )
    is_text, concatenated = mapping.schema.name == TEXT, chat_tokenizer.options.documents == "concatenated"
    check_options([mapping], chat_tokenizer.options)
    known_counts = counts or RowCounts()

    def usable_examples() -> Iterator[Example]:
        is_empty = True
        for row in rows:
            if isinstance(row, RowProblem):
                raise data_error([row])
            known_counts.add(row.encoded, sys.maxsize if is_text else max_length)
            if _is_trained(row.encoded) and max_length > 1:
                is_empty = False
                yield row.encoded.example
        if is_empty:
            raise _all_cut(source, max_length, known_counts)

    examples = usable_examples()
    yield from dataset.cut_into_blocks(examples, max_length, concatenated=concatenated) if is_text else examples


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
    """How the rows are read. name: of the data, or "demo".    limit: read at most so many rows.
    labels: of a model that predicts some.
    """

    name: str
    tokenizer: Any
    field: Mapping[str, str]
    max_length: int
    limit: int | None = None
    options: SampleOptions | None = None
    labels: Labels | None = None
    task: str = AUTO

    @property
    def chat_tokenizer(self) -> ChatTokenizer:
        return ChatTokenizer.of(self.tokenizer, self.options)

    def read(self) -> tuple[ColumnMapping, Iterator[EncodedRow | RowProblem]]:
        """Raises DataError if there is no row of a known schema."""
        items = islice(read_rows(resolve_demo(self.name, "eval_data"), split="validation"), self.limit)
        return encode_source(
            self.name,
            items,
            self.field,
            self.chat_tokenizer,
            self.max_length,
            task=self.task if self.labels is None else self.labels.task,
            for_evaluation=True,
            labels=self.labels,
        )


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
    for name in ("without_weight", "replies_not_learned", "duplicates", "held_out"):
        del numbers[name]
    has_template = tokenizer.template is not None and mapping.schema.uses_chat_template
    copies = counts.rows - counts.cut_away - len(seen)
    return EvalDataReport(source.name, mapping.schema.name, mapping.columns, has_template, **numbers, copies=copies)


def _is_evaluated(row: EncodedRow, seen: set[bytes]) -> bool:
    """Returns False if the row has no supervised token or is a copy of a row in `seen`, to which it is added.

    Copies have the same ids and labels up to max_length, and the same choices.
    """
    example = row.encoded.example
    key = hashlib.sha256(example.hash + repr(row.choices).encode()).digest()
    if not row.encoded.is_learned or key in seen:
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
