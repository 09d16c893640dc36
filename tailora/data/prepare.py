"""Reads, checks and tokenizes a source: completely for training, as a stream, or for evaluation.

readers -> schemas -> chat_template, loss_mask, tokenize -> dataset, 1000 rows at a time; see the package's docstring

Training data is also split into train and held-out here, with `split_examples` of dataset.py.
"""

import sys
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from tailora.data import dataset
from tailora.data.chat_template import ChatTokenizer, DataSettings, fit_to_template, has_tools, to_conversation
from tailora.data.dataset import WARNINGS, DataReport, Example, Examples, Mixture, SourceReport, with_other_replies
from tailora.data.demo import resolve_demo
from tailora.data.duplicates import copies, near_duplicates
from tailora.data.image_processor import text_tokenizer
from tailora.data.images import read_images, store_images
from tailora.data.messages import has_images, parsed_list, place_images
from tailora.data.readers import Row, RowProblem, Rows, Source, data_error, read_rows
from tailora.data.row_checks import (
    Flagged,
    RowCounts,
    count_messages,
    most_frequent,
    sample_hash,
    trained_hash,
    was_trained,
)
from tailora.data.samples import AnySample, Conversation, Pair, Prompt, Text
from tailora.data.schemas import (
    CAUSAL_LM,
    FEEDBACK,
    IMAGE_COLUMNS,
    PREFERENCE,
    SCHEMAS,
    TEXT,
    ColumnMapping,
    choices_from_preference,
    convert_row,
    detect_schema,
    weight_of,
)
from tailora.data.tokenize import EncodedSample, encode_samples, result_of, tokenized_parts
from tailora.errors import ConfigError, DataError, listing

CHUNK = 1000  # rows to tokenize at a time

# ---- Rows -> encoded samples


def encode_source(
    source: str, items: Rows, tokenizer: ChatTokenizer, *, detect_from: int | None = CHUNK, whole_texts: bool = False
) -> tuple[ColumnMapping, Iterator[EncodedSample | RowProblem]]:
    """Returns the column mapping, and the encoded sample or the problem of every item, in order.

    detect_from: number of items that determine the schema; None for all. Raises DataError if they fit none.
    whole_texts: do not truncate plain texts at max_length.
    """
    settings = tokenizer.settings
    if tokenizer.processor is not None:
        items = _with_stored_images(items, settings.field or {})
    first = deque(islice(items, detect_from))
    mapping = detect_schema(source, first, settings.field, settings.task)
    if tokenizer.processor is not None and (unused := [name for name in IMAGE_COLUMNS if name in mapping.ignored]):
        raise DataError(
            f"data {source}: {mapping.schema.name} rows cannot have images, but these have the column "
            f"{' and '.join(unused)}; use messages, or prompt and completion, or remove the column"
        )
    if settings.for_evaluation and mapping.schema.name == FEEDBACK:
        raise DataError(f"data {source}: single replies with a label cannot be evaluated; use chosen and rejected")
    if settings.for_evaluation and mapping.schema.task == PREFERENCE:
        mapping = replace(mapping, schema=replace(mapping.schema, convert=choices_from_preference))
    if whole_texts and mapping.schema.name == TEXT:
        tokenizer = replace(tokenizer, settings=replace(settings, max_length=sys.maxsize))
    waiting = (first.popleft() for _ in range(len(first)))  # so that each row is freed once it is encoded
    return mapping, _encode_rows(chain(waiting, items), mapping, tokenizer)


def _with_stored_images(items: Rows, field: Mapping[str, str]) -> Rows:
    """Yields the items with the images of all columns that a chat could use in the cache folder."""
    used = {field.get(key, key) for schema in SCHEMAS if {*IMAGE_COLUMNS} <= {*schema.keys} for key in schema.keys}
    for item in items:
        if isinstance(item, Row):
            fields = {name: store_images(value, name, is_used=name in used) for name, value in item.fields.items()}
            item = replace(item, fields=fields)
        yield item


def _encode_rows(
    items: Iterable[Row | RowProblem], mapping: ColumnMapping, tokenizer: ChatTokenizer
) -> Iterator[EncodedSample | RowProblem]:
    numbered = enumerate(items)
    while chunk := list(islice(numbered, CHUNK)):
        samples = [result_of(_sample_of, item, mapping, tokenizer) for _, item in chunk if isinstance(item, Row)]
        encoded = iter(encode_samples(samples, tokenizer))
        for index, item in chunk:
            if isinstance(item, RowProblem):
                yield item
                continue
            results = result_of(_with_origin, next(encoded), index, item, mapping)
            yield from [item.problem(results)] if isinstance(results, DataError) else results


def _with_origin(encoded: list[EncodedSample], index: int, row: Row, mapping: ColumnMapping) -> list[EncodedSample]:
    """Adds the row's position, location and weight. Raises DataError for an invalid weight."""
    weight = weight_of(row, mapping)
    return [
        replace(
            part,
            example=replace(part.example, source_index=index, weight=weight),
            location=row.location,
            row=row.fields,
        )
        for part in encoded
    ]


def _sample_of(row: Row, mapping: ColumnMapping, tokenizer: ChatTokenizer) -> AnySample:
    """Returns the sample of a row with its images, which were read and checked. Raises DataError."""
    sample = convert_row(row, mapping)
    columns = [mapping.columns[key] for key in IMAGE_COLUMNS if key in mapping.columns]
    conversations = [part for part in tokenized_parts(sample) if isinstance(part, Conversation)]
    in_messages = any(has_images(conversation.messages) for conversation in conversations)
    if not (tokenizer.processor or columns or in_messages):
        return sample
    if isinstance(sample, Conversation | Pair):
        return _with_images(sample, row, columns, tokenizer)
    if in_messages:
        raise DataError("images are only supported in chats and in prompts with a completion")
    return sample


def _with_images(
    sample: Conversation | Pair, row: Row, columns: list[str], tokenizer: ChatTokenizer
) -> Conversation | Pair:
    """columns: that may contain images."""
    values = [value for column in columns if (value := row.fields.get(column)) not in (None, "", [])]
    if len(values) > 1:
        raise DataError(f"the row has {' and '.join(columns)}; use one column for all images")
    chat, file, image_folder = to_conversation(sample), Path(row.file), tokenizer.settings.image_folder
    folder = file if file.is_dir() else file.parent if file.exists() else None  # None: from the Hub
    if image_folder is not None:
        folder = Path(image_folder).expanduser()
    parsed = parsed_list(values[0], IMAGE_COLUMNS[0]) if values else []
    messages = place_images(chat.messages, parsed if isinstance(parsed, list) else [parsed])
    if not has_images(messages):
        return sample
    if tokenizer.processor is None:
        raise DataError("the row has images, but the model reads only text; use a vision-language model")
    return replace(chat, messages=read_images(messages, folder))


def check_vocabulary(tokenizer: Any, embedding_rows: int) -> None:
    """Raises DataError if the tokenizer has ids beyond the model's embedding."""
    token, last = max(text_tokenizer(tokenizer).get_vocab().items(), key=lambda entry: entry[1])
    if last >= embedding_rows:
        raise DataError(
            f"the tokenizer is larger than the model's embedding: its last token {token!r} has id {last}, but the "
            f"embedding has only {embedding_rows} rows; use the model's own tokenizer, or resize the model first: "
            f"model.resize_token_embeddings({last + 1})"
        )


def _all_cut(source: str, max_length: int, counts: RowCounts, use: str = "trained") -> DataError:
    if without_weight := counts.flagged.numbers["without_weight"]:
        return DataError(
            f"data {source}: nothing to train on, because {without_weight:,} rows have weight 0; use higher weights"
        )
    return DataError(
        f"data {source}: truncation to max_length {max_length} removes all {use} tokens from every row; raise "
        f"--max-length (the longest row has {counts.longest:,} tokens)"
    )


# ---- Training data, all at once


@dataclass(frozen=True, slots=True, eq=False)
class PreparedData:
    train: Examples
    eval: Examples  # without duplicates, because these are not independent
    report: DataReport
    eval_samples: list[Any]  # eval_samples[i] became eval[i]
    eval_rows: list[Mapping[str, Any]]  # of these
    trained_rows: set[bytes]  # `trained_hash` of the training rows
    skipped: list[RowProblem]  # unusable rows, with `skip_bad_rows`
    prompts: list[Prompt]  # for reinforcement learning; prompts[i] became train[i]
    locations: list[str]  # of the row of each training example


def prepare(
    source: str | Sequence[Source],
    tokenizer: Any,
    settings: DataSettings | None = None,
    *,
    eval_source: str | None = None,
    split: str = "train",
) -> PreparedData:
    """Reads, checks and tokenizes all data; holds out a part of all sources unless there is an `eval_source`.

    split: which to read, of sources that have several.
    Raises DataError with the file, row and cause of every problem.
    """
    chat_tokenizer = ChatTokenizer.of(tokenizer, settings)
    settings = chat_tokenizer.settings
    given = [Source(source)] if isinstance(source, str) else source
    loaded = _load_sources(given, split, chat_tokenizer, keep_rows=eval_source is None)
    check_settings([part.mapping for part in loaded], settings)
    # hold out a part, or read the held-out data
    first, whole = loaded[0].mapping.schema, loaded
    if eval_source is None:
        trained, held_out = _split(loaded, settings)
        everything = loaded
    else:
        of_task = replace(chat_tokenizer, settings=replace(settings, task=first.task))
        trained, held_out = loaded, _load_sources([Source(eval_source)], "validation", of_task, keep_rows=True)
        everything = [*trained, *held_out]
    _check_same_task(everything)
    # blocks of a single text have no samples, but the text has
    parts = [part if part.samples else text for part, text in zip(trained, whole, strict=True)]
    trained_rows = {trained_hash(sample) for part in parts for sample in part.samples}
    # cut texts into blocks, and join the sources of each side
    trained, held_out = ([part.in_blocks(settings) for part in side] for side in (trained, held_out))
    train, evaluated = (Examples.of(e for part in side for e in part.examples) for side in (trained, held_out))
    if any(part.source.weight != 1 for part in trained):
        sizes, weights = zip(*((len(part.examples), part.source.weight) for part in trained), strict=True)
        train = replace(train, mixture=Mixture(sizes, weights))
    per_epoch = train.mixture.counts if train.mixture else [len(part.examples) for part in trained]
    held_out_counts = [0] * len(trained) if eval_source else [len(part.examples) for part in held_out]
    sources = [
        SourceReport(*part.source, part.mapping.schema.name, part.counts.rows, len(part.examples), kept_out, epoch)
        for part, kept_out, epoch in zip(trained, held_out_counts, per_epoch, strict=True)
    ]
    report = _report(everything, sources, eval_source, (trained, held_out), (train, evaluated), chat_tokenizer)
    # evaluate copies once
    samples: list[AnySample] = []
    for part in held_out:  # blocks of texts have no samples
        samples += part.samples or [Text(tokenizer.decode(example.input_ids.tolist())) for example in part.examples]
    distinct = [copies[0] for copies in dataset.group_equal([value for part in held_out for value, _ in part.hashes()])]
    fields = [part.rows.get(example.source_index, {}) for part in held_out for example in part.examples]
    evaluated, samples = evaluated.select(distinct), [samples[index] for index in distinct]
    rows = [fields[index] for index in distinct]
    if first.name == FEEDBACK:
        _check_feedback(train, evaluated, report.source)
        train, evaluated = (with_other_replies(part, settings.seed, settings.max_length) for part in (train, evaluated))
    skipped = [problem for part in everything for problem in part.skipped]
    prompts = [sample for part in trained for sample in part.samples if isinstance(sample, Prompt)]
    locations = [part.location(example) for part in trained for example in part.examples]
    return PreparedData(train, evaluated, report, samples, rows, trained_rows, skipped, prompts, locations)


def _report(
    loaded: Sequence["LoadedSource"],
    sources: list[SourceReport],
    eval_source: str | None,
    sides: tuple[Sequence["LoadedSource"], Sequence["LoadedSource"]],
    examples: tuple[Examples, Examples],
    tokenizer: ChatTokenizer,
) -> DataReport:
    """loaded: the sources before the split, training sources first. examples: of both sides, including duplicates."""
    (train, evaluated), labels, flagged = examples, tokenizer.settings.labels, Flagged()
    for part in loaded:
        flagged.update(part.counts.flagged)
        flagged.add("skipped", *(problem.location for problem in part.skipped))
    samples = [
        (sample, part.location(example))
        for part in loaded
        for sample, example in zip(part.samples, part.examples, strict=False)  # blocks of texts have no samples
    ]
    for sample, location in samples:
        if isinstance(sample, Conversation) and has_tools(sample) and not has_tools(fit_to_template(sample, tokenizer)):
            flagged.add("tools_as_text", location)
    flagged.add_suspicious(samples, labels)
    for name, location in copies(*([row for part in side for row in part.hashes()] for side in sides)):
        flagged.add(name, location)
    trained = loaded[: len(sources)]
    mappings = [part.mapping for part in trained]
    lengths = np.concatenate([train.lengths, evaluated.lengths])
    prompts = [sample for part in chain(*sides) for sample in part.samples if isinstance(sample, Prompt)]
    return DataReport(
        source=", ".join(str(part.source) for part in trained),
        sources=sources,
        eval_source=eval_source,
        task=mappings[0].schema.task,
        shape=", ".join(dict.fromkeys(mapping.schema.name for mapping in mappings)),
        mapping={key: column for mapping in mappings for key, column in mapping.columns.items()},
        ignored=list(dict.fromkeys(column for mapping in mappings for column in mapping.ignored)),
        chat_template=tokenizer.template is not None and any(m.schema.uses_chat_template for m in mappings),
        system=most_frequent(part.counts.systems for part in loaded),
        messages=count_messages(chain.from_iterable(part.samples for part in loaded)),
        rows=sum(part.counts.rows for part in loaded),
        train=len(train),
        eval=len({value for part in sides[1] for value, _ in part.hashes()}),
        tokens=int(lengths.sum()),
        supervised_tokens=int(train.supervised.sum() + evaluated.supervised.sum()),
        longest=max(part.counts.longest for part in loaded),
        split_examples=sum(part.counts.split_examples for part in loaded),
        flagged={name: flagged.numbers[name] for name in WARNINGS},
        rows_of={name: locations for name, locations in flagged.locations.items() if locations},
        lengths=dataset.length_histogram(lengths),
        sha256=dataset.dataset_hash(train, evaluated, columns=[prompt.columns for prompt in prompts]),
        labels={} if labels is None else labels.counts(train),
        eval_labels={} if labels is None else labels.counts(evaluated),
    )


def _check_feedback(train: Examples, held_out: Examples, source: str) -> None:
    """Raises DataError if there are too few single replies to compare, or if all have the same label."""
    if 1 in (len(train), len(held_out)):
        raise DataError(
            f"data {source}: expected at least two rows on each side of the split, because single replies are compared "
            f"with replies to other prompts; got {len(train):,} and {len(held_out):,}; add data"
        )
    if train.targets is not None and len(np.unique(train.targets)) == 1:
        raise DataError(f"data {source}: all rows have the same label; add others, or use --task causal-lm")


@dataclass(frozen=True, slots=True, eq=False)
class LoadedSource:
    source: Source
    mapping: ColumnMapping
    examples: Examples
    samples: list[AnySample]  # samples[i] became examples[i]; [] for blocks of texts
    counts: RowCounts
    is_whole: bool  # texts before the split into blocks
    locations: dict[int, str]  # source_index of an example -> the location of its row
    rows: dict[int, Mapping[str, Any]]  # the same -> its row; empty if rows are not kept
    skipped: list[RowProblem]  # with `skip_bad_rows`

    def location(self, example: Example) -> str:
        return self.locations[example.source_index]

    def hashes(self) -> list[tuple[bytes, str]]:
        """Returns the hash and the location of each example. Copies have the same hash, which covers reward columns."""
        columns = [sample_hash(sample.columns) if isinstance(sample, Prompt) else b"" for sample in self.samples]
        columns = columns or [b""] * len(self.examples)  # blocks of texts have no samples
        pairs = zip(self.examples, columns, strict=True)
        return [(example.hash + of_columns, self.location(example)) for example, of_columns in pairs]

    def select(self, indices: Sequence[int]) -> "LoadedSource":
        samples = [self.samples[index] for index in indices] if self.samples else []
        return replace(self, examples=self.examples.select(indices), samples=samples)

    def in_blocks(self, settings: DataSettings) -> "LoadedSource":
        """Splits texts into blocks of at most max_length tokens; returns other sources unchanged."""
        if not self.is_whole:
            return self
        concatenated = settings.documents == "concatenated"
        blocks = dataset.cut_into_blocks(self.examples, settings.max_length, concatenated=concatenated)
        return replace(self, examples=Examples.of(blocks), samples=[], is_whole=False)


def _load_sources(
    sources: Sequence[Source], split: str, tokenizer: ChatTokenizer, *, keep_rows: bool
) -> list[LoadedSource]:
    """keep_rows: also their unused columns, for held-out examples.    Raises DataError with all problems."""
    loaded, problems = [], []
    for source in sources:
        try:
            loaded.append(_load_source(source, split, tokenizer, keep_rows=keep_rows))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError(problems[0] if len(problems) == 1 else listing(problems))
    return loaded


def _load_source(source: Source, split: str, tokenizer: ChatTokenizer, *, keep_rows: bool) -> LoadedSource:
    items = read_rows(source.name, split=split)
    mapping, encoded = encode_source(source.name, items, tokenizer, detect_from=None, whole_texts=True)
    settings, is_text = tokenizer.settings, mapping.schema.name == TEXT
    rows, problems, counts = list[EncodedSample](), list[RowProblem](), RowCounts()
    for result in encoded:
        if isinstance(result, RowProblem):
            problems.append(result)
        else:
            rows.append(result if keep_rows else replace(result, row={}))
    if problems and not (settings.skip_bad_rows and rows and all(problem.number for problem in problems)):
        raise data_error(problems)
    for row in rows:
        counts.add(row, sys.maxsize if is_text else settings.max_length)
    usable = [row for row in rows if row.is_learned and row.example.weight > 0]
    if not usable or settings.max_length < 2:
        raise _all_cut(source.name, settings.max_length, counts)
    examples, samples = Examples.of(row.example for row in usable), [row.sample for row in usable]
    locations = {row.example.source_index: row.location for row in usable}
    fields = {row.example.source_index: row.row for row in usable if keep_rows}
    return LoadedSource(source, mapping, examples, samples, counts, is_text, locations, fields, problems)


def _check_same_task(sources: Sequence[LoadedSource]) -> None:
    """Raises DataError if sources have different tasks, or different schemas where the task needs a single one."""
    first = sources[0]
    schema = first.mapping.schema
    for other in sources[1:]:
        its_schema = other.mapping.schema
        if its_schema.task != schema.task or (schema.task != CAUSAL_LM and its_schema.name != schema.name):
            raise DataError(
                f"data {other.source}: expected {schema.name} rows as in {first.source}, got {its_schema.name}; use "
                "the same keys in all sources and in the held-out data for this task"
            )


def check_settings(mappings: Sequence[ColumnMapping], settings: DataSettings) -> None:
    """Raises DataError for settings that apply to no row of the data."""
    names = ", ".join(dict.fromkeys(mapping.schema.name for mapping in mappings))
    is_text = [mapping.schema.name == TEXT for mapping in mappings]
    has_preferences = any(mapping.schema.task == PREFERENCE for mapping in mappings)
    has_completion = [not COMPLETION_KEYS.isdisjoint(mapping.schema.required) for mapping in mappings]
    problems = [
        f"{option} only applies to {needed}, but the data has {names} rows; remove it"
        for is_wrong, option, needed in (
            (settings.documents == "concatenated" and not any(is_text), "--documents concatenated", "plain texts"),
            (settings.system is not None and all(is_text), "--system", "conversations"),
            (settings.assistant_only_loss and all(is_text), "--assistant-only-loss", "conversations"),
            (settings.completion_only_loss and not any(has_completion), "--completion-only-loss", "completions"),
            (has_preferences and settings.completion_only_loss is False, "--no-completion-only-loss", "single replies"),
            (has_preferences and settings.assistant_only_loss is False, "--no-assistant-only-loss", "single replies"),
        )
        if is_wrong
    ]
    if problems:
        raise DataError(listing(problems))


COMPLETION_KEYS = frozenset({"completion", "output", "choices", "chosen"})


def _split(loaded: list[LoadedSource], settings: DataSettings) -> tuple[list[LoadedSource], list[LoadedSource]]:
    """Returns the training and the held-out part of each source. A single text is split into blocks, others stay whole.

    For classification, about the same share of each class is held out.
    """
    share, labels = settings.validation_split, settings.labels
    hashes = [part.examples.row_hashes() for part in loaded]
    if share != 0 and len(set(chain.from_iterable(hashes))) < 2:
        loaded = [part.in_blocks(settings) for part in loaded]
        hashes = [part.examples.hashes() for part in loaded]
    omitted = sum(part.counts.flagged.numbers["cut_away"] for part in loaded)
    classes = [] if labels is None else [index for part in loaded for index in labels.classes(part.examples)]
    keys = list(chain.from_iterable(hashes))
    if share != 0:
        keys = _near_duplicates_as_one(keys, [example for part in loaded for example in part.examples])
    split = dataset.split_examples(keys, share, settings.seed, omitted, classes)
    sides: tuple[list[LoadedSource], list[LoadedSource]] = ([], [])
    first = 0
    for part in loaded:
        end = first + len(part.examples)
        for side, indices in zip(sides, split, strict=True):
            side.append(part.select([index - first for index in indices if first <= index < end]))
        first = end
    if empty := [str(part.source) for part in sides[0] if not len(part.examples)]:
        raise DataError(
            f"data {', '.join(empty)}: no examples left to train on; add more data, or use --validation-split 0"
        )
    return sides


def _near_duplicates_as_one(keys: list[bytes], examples: Sequence[Example]) -> list[bytes]:
    """Returns the keys with that of the first one for near duplicates, so that these go to the same side."""
    same = {keys[index]: keys[group[0]] for group in near_duplicates(examples) for index in group}
    merged = [same.get(key, key) for key in keys]
    return merged if len({*merged}) > 1 else keys


# ---- Training data as a stream


def stream_examples(
    source: str, tokenizer: Any, settings: DataSettings | None = None, counts: RowCounts | None = None
) -> Iterator[Example]:
    """Yields examples in order while reading; skips those without trained tokens after truncation.

    counts: updated with every row; pass the same one to read the stream again.
    Raises DataError at the first unusable row, or at the end if no row was usable.
    """
    chat_tokenizer = ChatTokenizer.of(tokenizer, settings)
    settings = chat_tokenizer.settings
    mapping, rows = encode_source(source, read_rows(source, streaming=True), chat_tokenizer, whole_texts=True)
    if mapping.schema.task == PREFERENCE:
        raise ConfigError(f"data {source}: preferences cannot be streamed; remove --streaming")
    check_settings([mapping], settings)
    is_text, max_length = mapping.schema.name == TEXT, settings.max_length
    known_counts = counts or RowCounts()

    def usable_examples() -> Iterator[Example]:
        is_empty = True
        for row in rows:
            if isinstance(row, RowProblem):
                raise data_error([row])
            known_counts.add(row, sys.maxsize if is_text else max_length)
            if row.is_learned and row.example.weight > 0 and max_length > 1:
                is_empty = False
                yield row.example
        if is_empty:
            raise _all_cut(source, max_length, known_counts)

    examples, concatenated = usable_examples(), settings.documents == "concatenated"
    yield from dataset.cut_into_blocks(examples, max_length, concatenated=concatenated) if is_text else examples


# ---- Evaluation data


@dataclass(frozen=True, slots=True)
class EvalDataReport:
    """Counts of the checked data. The names are the keys of report.json, as in DataReport."""

    source: str
    shape: str
    mapping: dict[str, str]
    chat_template: bool
    rows: int  # or examples, if conversations become several
    tokens: int  # after truncation
    supervised_tokens: int  # of the evaluated rows, without duplicates
    longest: int  # tokens of the longest row, before truncation
    truncated: int  # rows truncated at max_length
    cut_away: int  # truncated rows without any supervised token left
    copies: int  # rows that are copies of an earlier one and not evaluated again
    trained_on: int | None  # evaluated rows that the adapter was trained on; None if unknown


def read_eval_data(
    name: str, tokenizer: ChatTokenizer, limit: int | None = None, trained_rows: Collection[bytes] | None = None
) -> tuple[EvalDataReport, list[EncodedSample]]:
    """Returns the rows with supervised tokens, without duplicates.

    name: of the data, or "demo".
    limit: maximum number of rows to read.
    trained_rows: `trained_hash` of the model's training rows; None if unknown.
    Raises DataError with the file, row and cause of every problem.
    """
    items = islice(read_rows(resolve_demo(name, "eval_data"), split="validation"), limit)
    mapping, results = encode_source(name, items, tokenizer)
    max_length, counts, problems = tokenizer.settings.max_length, RowCounts(), []
    evaluated: dict[tuple[bytes, str], EncodedSample] = {}  # duplicates have the same ids, labels and choices
    for result in results:
        if isinstance(result, RowProblem):
            problems.append(result)
            continue
        counts.add(result, max_length)
        if result.is_learned:
            evaluated.setdefault((result.example.hash, repr(result.choices)), result)
    if problems:
        raise data_error(problems)
    if not evaluated:
        raise _all_cut(name, max_length, counts, use="evaluated")
    rows, cut_away = list(evaluated.values()), counts.flagged.numbers["cut_away"]
    report = EvalDataReport(
        source=name,
        shape=mapping.schema.name,
        mapping=mapping.columns,
        chat_template=tokenizer.template is not None and mapping.schema.uses_chat_template,
        rows=counts.examples,
        tokens=counts.tokens,
        supervised_tokens=sum(row.example.supervised for row in rows),
        longest=counts.longest,
        truncated=counts.flagged.numbers["truncated"],
        cut_away=cut_away,
        copies=counts.examples - cut_away - len(rows),
        trained_on=None if trained_rows is None else sum(was_trained(row.sample, trained_rows) for row in rows),
    )
    return report, rows
