"""Tokenized examples, stored end to end in two flat arrays; the split into train and held-out; the report."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from tailora.data.images import Image
from tailora.errors import ConfigError, DataError

FOLDERS = re.compile(r".*/(?=[^/]*(:|, item )\d+( \(|$))")  # before FILE:ROW or FILE:ROW (label)
ENOUGH, USUAL_SHARE, LARGEST_SHARE = 20, 0.05, 0.2  # of the examples, to hold out
# Two halves of the held-out examples: one selects settings or the best step, the other evaluates what was selected
FEWEST_HALVED = 4  # examples
ENOUGH_TO_HALVE = 40  # with fewer, all examples of a run select its best step
IGNORED = -100  # the label of a token that is read but not trained

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids and labels, which are not shifted: labels[i] is input_ids[i], or -100 if it is not trained.

    `of_text` creates the labels of a language model. In other tasks the labels are the tags of words, or the text that
    a decoder predicts from its first token on.
    """

    input_ids: Int32  # (length,)
    labels: Int32  # (length,)
    source_index: int = 0  # position of its row in its source
    second_start: int = 0  # of the second sequence, such as the rejected reply after the chosen one; 0: there is none
    target: Float64 | None = None  # (targets,), for tasks with a target for the example as a whole
    weight: float = 1.0  # of its loss in training
    images: tuple[Image, ...] = ()  # in the order of their placeholders among the tokens

    @property
    def supervised(self) -> int:
        """The number of trained tokens."""
        return int(np.count_nonzero(self.labels != IGNORED))

    @property
    def hash(self) -> bytes:
        """Equal for duplicates: examples with the same ids, labels, sequences, targets and images."""
        content = self.input_ids.tobytes() + self.labels.tobytes()
        if self.second_start:
            content += self.second_start.to_bytes(8, "little")
        if self.target is not None:
            content += self.target.tobytes()
        return hashlib.sha256(content + self.image_hashes).digest()

    @property
    def image_hashes(self) -> bytes:
        return "".join(image.sha256 for image in self.images).encode()

    @property
    def sequences(self) -> tuple["Example", ...]:
        """The one or two sequences that the model reads, as examples without targets."""
        if not self.second_start:
            return (self,)
        parts = slice(self.second_start), slice(self.second_start, None)
        return tuple(Example(self.input_ids[part], self.labels[part], self.source_index) for part in parts)

    def beginning(self, tokens: int) -> "Example":
        second_start = self.second_start if self.second_start < tokens else 0
        return replace(self, input_ids=self.input_ids[:tokens], labels=self.labels[:tokens], second_start=second_start)

    @classmethod
    def of_text(cls, input_ids: Int32, is_trained: NDArray[np.bool_] | bool = True) -> Self:
        """Returns a text to predict token by token. The first token is never trained, because nothing precedes it.

        is_trained: (length,), or one value for all tokens.
        """
        labels = np.where(is_trained, input_ids, IGNORED).astype(np.int32)
        labels[:1] = IGNORED
        return cls(input_ids, labels)

    @classmethod
    def of_two(cls, first: "Example", second: "Example", target: Float64 | None = None) -> "Example":
        """Returns both as one example with two sequences."""
        input_ids = np.concatenate([first.input_ids, second.input_ids])
        labels = np.concatenate([first.labels, second.labels])
        return cls(input_ids, labels, first.source_index, len(first.input_ids), target, first.weight)


@dataclass(frozen=True, slots=True)
class Mixture:
    """How often the examples of several consecutive sources appear in an epoch.

    The weight 2 uses every example twice; 0.5 uses one half, and the other half in the next epoch.
    """

    sizes: tuple[int, ...]  # number of examples of each source
    weights: tuple[float, ...]  # passes over each source per epoch

    @property
    def counts(self) -> list[int]:
        """Number of examples of each source in an epoch."""
        return [max(1, round(size * weight)) for size, weight in zip(self.sizes, self.weights, strict=True)]

    def epoch(self, number: int, seed: int) -> Int64:
        """Returns the indices of the examples in an epoch: each source continues where the previous epoch ended."""
        chosen = []
        first = 0
        for source, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            start = number * count
            passes = range(start // size, (start + count - 1) // size + 1)
            order = np.concatenate([np.random.default_rng([seed, source, i]).permutation(size) for i in passes])
            skipped = start - passes.start * size
            chosen.append(first + np.sort(order[skipped : skipped + count]))
            first += size
        return np.concatenate(chosen)


@dataclass(frozen=True, slots=True, eq=False)
class Examples:
    """A sequence of examples: `examples[i]` is a view into the flat arrays."""

    input_ids: Int32  # (tokens,)
    labels: Int32  # (tokens,)
    starts: Int64  # (examples + 1,)
    source_indices: Int64  # (examples,)
    second_starts: Int64  # (examples,)
    targets: Float64 | None  # (examples, targets)
    weights: Float64  # (examples,)
    images: tuple[tuple[Image, ...], ...] = ()  # of each example; empty if none has any
    mixture: Mixture | None = None  # None: an epoch has each example once

    @classmethod
    def of(cls, examples: Iterable[Example]) -> Self:
        examples = list(examples)
        empty = np.zeros(0, np.int32)
        return cls(
            input_ids=np.concatenate([empty, *(example.input_ids for example in examples)], dtype=np.int32),
            labels=np.concatenate([empty, *(example.labels for example in examples)], dtype=np.int32),
            starts=np.cumsum([0, *(len(example.input_ids) for example in examples)], dtype=np.int64),
            source_indices=np.array([example.source_index for example in examples], dtype=np.int64),
            second_starts=np.array([example.second_start for example in examples], dtype=np.int64),
            targets=np.stack(targets) if (targets := [e.target for e in examples if e.target is not None]) else None,
            weights=np.array([example.weight for example in examples], dtype=np.float64),
            images=tuple(e.images for e in examples) if any(e.images for e in examples) else (),
        )

    def __len__(self) -> int:
        return len(self.source_indices)

    def __getitem__(self, index: int) -> Example:
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        index %= len(self)
        tokens = slice(self.starts[index], self.starts[index + 1])
        source_index, second_start = int(self.source_indices[index]), int(self.second_starts[index])
        target = None if self.targets is None else self.targets[index]
        ids, labels, images = self.input_ids[tokens], self.labels[tokens], self.images[index] if self.images else ()
        return Example(ids, labels, source_index, second_start, target, float(self.weights[index]), images)

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> Int64:  # (examples,)
        return np.diff(self.starts)

    @property
    def supervised(self) -> Int64:
        """The number of trained tokens of each example, (examples,)."""
        return np.diff(np.concatenate([[0], np.cumsum(self.labels != IGNORED, dtype=np.int64)])[self.starts])

    @property
    def epoch_size(self) -> int:
        return len(self) if self.mixture is None else sum(self.mixture.counts)

    def epoch(self, number: int, seed: int) -> Int64:
        """Returns the indices of the examples in an epoch."""
        return np.arange(len(self)) if self.mixture is None else self.mixture.epoch(number, seed)

    @property
    def mean_length(self) -> float:
        """The mean length in an epoch."""
        return float(self.lengths[self.epoch(0, seed=0)].mean())

    def select(self, indices: Iterable[int] | Int64) -> "Examples":
        return Examples.of(self[int(index)] for index in indices)

    def distinct(self) -> "Examples":
        """Returns the examples without duplicates of earlier ones."""
        return self.select(copies[0] for copies in group_equal(self.hashes()))

    def hashes(self) -> list[bytes]:
        return [example.hash for example in self]

    def row_hashes(self) -> list[bytes]:
        """Returns the hash of each example's row. Examples of one conversation share it, and so do duplicates."""
        rows: dict[int, bytes] = {}
        for index, value in zip(self.source_indices.tolist(), self.hashes(), strict=True):
            rows[index] = rows.get(index, b"") + value
        return [rows[index] for index in self.source_indices.tolist()]


def with_other_replies(examples: Examples, seed: int, max_length: int) -> Examples:
    """Adds a second, untrained sequence to each example: its prompt with the reply to a different prompt.

    Each reply is used once, truncated so that the sequence has at most max_length tokens. KTO uses them to estimate the
    distance between the model and its reference.
    """
    order = np.random.default_rng(seed).permutation(len(examples))
    other = np.empty(len(examples), dtype=np.int64)
    other[order] = np.roll(order, 1)
    starts = [int(np.argmax(example.labels != IGNORED)) for example in examples]  # of the replies
    pairs = []
    for example, start, index in zip(examples, starts, other.tolist(), strict=True):
        prompt, reply = slice(start), slice(starts[index], starts[index] + max_length - start)
        ids = np.concatenate([example.input_ids[prompt], examples[index].input_ids[reply]])
        labels = np.concatenate([example.labels[prompt], examples[index].labels[reply]])
        pairs.append(Example.of_two(example, Example(ids, labels), example.target))
    return replace(Examples.of(pairs), mixture=examples.mixture)


def cut_into_blocks(documents: Iterable[Example], length: int, *, concatenated: bool) -> Iterator[Example]:
    """Yields the tokens of documents in blocks of at most `length` tokens; all tokens are trained.

    A block begins with the last token of the previous one, so that each token is predicted once.
    concatenated: join all documents, so that all blocks except the last are full. Raises DataError for weighted rows.
    """
    rest: Int32 | None = None
    last: Example | None = None
    for document in documents:
        if concatenated and document.weight != 1:
            raise DataError("row weights are not supported with --documents concatenated; use --documents isolated")
        last = document
        ids = document.input_ids if rest is None else np.concatenate([rest, document.input_ids])
        while len(ids) > length:
            yield _block(ids[:length], document)
            ids = ids[length - 1 :]
        if concatenated:
            rest = ids
        else:
            yield _block(ids, document)
    if rest is not None and last is not None:
        yield _block(rest, last)


def _block(ids: Int32, document: Example) -> Example:
    return replace(document, input_ids=ids, labels=Example.of_text(ids).labels)


# ---- The split


def split_examples(
    hashes: Sequence[bytes], share: float | None, seed: int, omitted: int = 0, classes: Sequence[int] = ()
) -> tuple[list[int], list[int]]:
    """Returns the indices of the training examples and of the held-out ones. Equal examples go to the same side.

    share: of the examples to hold out, at least one; 0 holds out none. None: ENOUGH examples or USUAL_SHARE, whichever
        is more, and at most LARGEST_SHARE. The same arguments give the same split.
    omitted: number of rows omitted because of --max-length, for the message.
    classes: of all examples, or empty; about the same share of each class is held out.
    Raises DataError for fewer than two distinct examples.
    """
    if share == 0:
        return list(range(len(hashes))), []
    groups = group_equal(hashes)
    if len(groups) < 2:
        given = distinct_of(len(hashes), len(groups), "example")
        more = f" ({omitted:,} longer rows were skipped; raise --max-length to use them)" if omitted else ""
        raise DataError(
            f"need two distinct examples to hold one out, got {given}{more}; add data, or use --validation-split 0"
        )
    if share is None:
        share = max(USUAL_SHARE, min(ENOUGH / len(hashes), LARGEST_SHARE))
    target = max(1, round(len(hashes) * share))
    held_out: list[int] = []
    order = np.random.default_rng(seed).permutation(len(groups)).tolist()
    if classes:
        order = _in_turns(order, [classes[group[0]] for group in groups])
    for group in order[:-1]:  # the last one always stays in the training data
        if len(held_out) + len(groups[group]) <= target:
            held_out += groups[group]
    held_out = held_out or min(groups, key=len)
    return sorted(set(range(len(hashes))) - set(held_out)), sorted(held_out)


def _in_turns(order: list[int], classes: Sequence[int]) -> list[int]:
    """Reorders so that a first part of any length contains about the same share of each class."""
    sizes, seen, positions = Counter(classes[index] for index in order), Counter[int](), dict[int, float]()
    for index in order:
        positions[index] = (seen[classes[index]] + 0.5) / sizes[classes[index]]
        seen[classes[index]] += 1
    return sorted(order, key=lambda index: positions[index])


def selection_half(count: int) -> Int64:
    """Returns the indices of the selection half. Raises ConfigError for fewer than 4 held-out examples."""
    return np.sort(_shuffled(count)[: count // 2])


def evaluation_half(count: int) -> Int64:
    """Returns the indices of the evaluation half, all others. Raises ConfigError for fewer than 4."""
    return np.sort(_shuffled(count)[count // 2 :])


def _shuffled(count: int) -> Int64:
    """Returns a permutation that depends only on `count`."""
    if count < FEWEST_HALVED:
        examples = "1 distinct held-out example is" if count == 1 else f"{count} distinct held-out examples are"
        raise ConfigError(
            f"{examples} too few: one half selects settings, and the other half evaluates them. Hold out at least "
            f"{FEWEST_HALVED}, preferably 100, with --eval-data FILE or a larger --validation-split. Duplicates do not "
            "count, nor do rows that have no trained tokens left after truncation to --max-length"
        )
    return np.random.default_rng(0).permutation(count)


def group_equal(hashes: Sequence[bytes]) -> list[list[int]]:
    """Groups the indices of equal hashes, in order of first appearance."""
    groups: dict[bytes, list[int]] = {}
    for index, value in enumerate(hashes):
        groups.setdefault(value, []).append(index)
    return list(groups.values())


def distinct_of(examples: int, distinct: int, name: str) -> str:
    """7, 3, "example" -> "7 examples, 3 distinct"; without the second part if there are no duplicates."""
    words = f"{examples:,} {name}{'s' * (examples != 1)}"
    return words if distinct == examples else f"{words}, {distinct:,} distinct"


def sources_of(report: Mapping[str, Any]) -> dict[str, str]:
    """Returns "sources" -> the counts of each, if there are several or one is weighted. report: as in warnings_of."""
    sources = report.get("sources", [])
    if len(sources) < 2 and all(source["weight"] == 1 for source in sources):
        return {}
    counts = [
        f"{source['name']}: {source['rows']:,} rows ({source['shape']}), {source['train']:,} training examples, "
        f"{source['epoch']:,} per epoch"
        for source in sources
    ]
    return {"sources": "; ".join(counts)}


# ---- The report


@dataclass(frozen=True, slots=True)
class SourceReport:
    name: str
    weight: float
    shape: str
    rows: int
    train: int  # examples
    eval: int
    epoch: int  # training examples per epoch


@dataclass(frozen=True, slots=True)
class DataReport:
    """What a run counts in its data. The names are the keys of report.json."""

    source: str  # with weights; several sources separated by commas
    sources: list[SourceReport]
    eval_source: str | None
    shape: str  # name of the schema; several separated by commas
    task: str
    mapping: dict[str, str]  # key of the schema -> column
    ignored: list[str]  # unused columns
    chat_template: bool
    system: str | None  # the system message of most examples
    messages: dict[str, int]  # of conversations: by role, and number of tool calls, tools, ...
    rows: int  # usable rows of source and eval_source
    train: int  # examples
    eval: int  # distinct examples: duplicates are evaluated once
    tokens: int  # train and eval
    supervised_tokens: int
    longest: int  # tokens of the longest row, before truncation
    split_examples: int  # from conversations that became several examples
    flagged: dict[str, int]  # key of WARNINGS -> number of rows; in report.json these are top-level keys
    rows_of: dict[str, list[str]]  # key of WARNINGS -> the first of those rows
    lengths: list[dict[str, int]]  # number of examples with low to high tokens, both inclusive
    sha256: str  # of all ids, labels and images, train then eval
    labels: dict[str, int]  # number of training examples or words with each label; {} for other tasks
    eval_labels: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        content = {**asdict(self), **self.flagged, "supervised_share": self.supervised_tokens / self.tokens}
        del content["flagged"]
        return content


WARNINGS = {  # count in the report -> name, meaning
    "truncated": ("truncated", "examples are longer than --max-length"),
    "without_weight": ("weight 0", "rows have weight 0, so they are skipped"),
    "cut_away": ("no targets", "examples have no tokens to train on after truncation, so they are skipped"),
    "skipped": ("skipped", "rows cannot be used"),
    "split_rows": (
        "split",
        "conversations became {split_examples:,} examples, because the template rewrites earlier replies",
    ),
    "tools_as_text": (
        "tools",
        "conversations have tools that the chat template does not support; the tools are written as text, and programs "
        "that use the adapter must do the same",
    ),
    "repeated": ("repeated", "training rows are copies of earlier ones"),
    "eval_copies": ("copies", "held-out rows are duplicates and are evaluated only once"),
    "duplicates": ("LEAKAGE", "held-out rows are also in the training data, so the held-out loss will look too good"),
    # probable mistakes
    "empty_question": ("no question", "rows have an empty question"),
    "missing_answer": ("no answer", 'rows have an answer such as "N/A" or "nan", probably from an empty cell'),
    "no_prompt": ("no prompt", "conversations begin with the assistant, so their first reply is not trained"),
    "similar_labels": ("similar", "rows have a label that differs from a more frequent one only in whitespace or case"),
    "two_labels": ("two labels", "rows have the same text as an earlier row but a different label"),
    "imbalance": ("imbalance", "rows belong to a class that is more than 20 times rarer than the most frequent one"),
}
MOST_NAMED = 5  # rows per warning


def warnings_of(report: Mapping[str, Any]) -> dict[str, str]:
    """Returns name -> count, meaning and rows of truncated, skipped, duplicate and suspicious rows.

    report: DataReport.to_dict(), or parts of it.
    """
    rows_of = report.get("rows_of", {})
    return {
        name: f"{report[key]:,} {meaning.format_map(report)}{named_rows(rows_of.get(key, ()), report[key])}"
        for key, (name, meaning) in WARNINGS.items()
        if report.get(key)
    }


def named_rows(locations: Sequence[str], count: int) -> str:
    """Returns ": a.jsonl:3, a.jsonl:7 and 8 more", or "" without locations. count: number of all rows."""
    first = [FOLDERS.sub("", location, count=1) for location in locations[:MOST_NAMED]]
    more = f" and {count - len(first):,} more" if count > len(first) else ""
    return f": {', '.join(first)}{more}" if first else ""


def length_histogram(lengths: Int64, bins: int = 10) -> list[dict[str, int]]:
    """Returns the number of examples with low to high tokens, in geometric bins because few are very long."""
    edges = np.unique(np.geomspace(lengths.min(), lengths.max() + 1, bins + 1).round().astype(np.int64))
    counts = zip(pairwise(edges.tolist()), np.histogram(lengths, edges)[0].tolist(), strict=True)
    return [{"low": start, "high": stop - 1, "examples": number} for (start, stop), number in counts]


def dataset_hash(*parts: Examples, columns: Sequence[Mapping[str, Any]] = ()) -> str:
    """columns: what reward functions get of each prompt."""
    digest = hashlib.sha256(json.dumps(columns, sort_keys=True, default=str).encode() if columns else b"")
    for part in parts:
        for array in (part.starts, part.input_ids, part.labels):
            digest.update(np.ascontiguousarray(array).tobytes())
        if part.second_starts.any():
            digest.update(part.second_starts.tobytes())
        if part.targets is not None:
            digest.update(part.targets.tobytes())
        if (part.weights != 1).any():
            digest.update(part.weights.tobytes())
        digest.update("".join(image.sha256 for images in part.images for image in images).encode())
    return digest.hexdigest()
