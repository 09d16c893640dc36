"""The counts in the data report: rows and messages, duplicates, and usable rows that look like mistakes.

WARNINGS in dataset.py has their names and texts.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import chain
from typing import Any, TypeAlias

from tailora.data.chat_template import to_conversation
from tailora.data.images import Image, images_of
from tailora.data.labels import SINGLE, Labels
from tailora.data.messages import REASONING, text_of
from tailora.data.samples import AnySample, Conversation, Labelled, Pair, Prompt, Text
from tailora.data.schemas import REGRESSION
from tailora.data.tokenize import EncodedSample, last_reply, tokenized_parts

MOST_LOCATIONS = 20  # per warning in a report
MOST_SYSTEMS = 1000  # different system messages to count, because a stream may have a new one in every row
MISSING = frozenset({"n/a", "nan", "null", "none"})  # values of empty cells in tables
RARE = 20  # this many times rarer than the most frequent class


@dataclass(slots=True)
class Flagged:
    """How many rows each of WARNINGS applies to, and where the first ones are."""

    numbers: Counter[str] = field(default_factory=Counter)
    locations: dict[str, list[str]] = field(default_factory=dict)

    def add(self, name: str, *locations: str) -> None:
        self.numbers[name] += len(locations)
        self.locations[name] = [*self.locations.get(name, ()), *locations][:MOST_LOCATIONS]

    def update(self, other: "Flagged") -> None:
        for name, number in other.numbers.items():
            self.add(name, *other.locations[name])
            self.numbers[name] += number - len(other.locations[name])

    def add_suspicious(self, samples: "Located", labels: Labels | None) -> None:
        """Adds usable rows that look like mistakes."""
        chats = (
            (name, location)
            for sample, location in samples
            for part in tokenized_parts(sample)
            if not isinstance(part, Text)
            for name in _of_chat(to_conversation(part))
        )
        of_labels = [] if labels is None else _of_labels(samples, labels)
        for name, location in dict.fromkeys(chain(chats, of_labels)):  # once per row, also if it has several parts
            self.add(name, location)


@dataclass(slots=True)
class RowCounts:
    """Counts of encoded rows and their examples. An example counts once, even if its source is read again."""

    rows: int = 0
    last: int = 0  # position of the last one among all rows, from 1
    examples: int = 0
    parts: int = 0  # examples of the last row so far
    split_examples: int = 0  # from conversations with several examples
    tokens: int = 0  # after truncation
    longest: int = 0  # tokens of the longest example, before truncation
    held_out: frozenset[bytes] = frozenset()  # hashes of the held-out examples, to find duplicates of them
    flagged: Flagged = field(default_factory=Flagged)
    systems: Counter[str | None] = field(default_factory=Counter)  # examples with each of the first MOST_SYSTEMS

    @property
    def system(self) -> str | None:
        return most_frequent([self.systems])

    def add(self, encoded: EncodedSample, max_length: int) -> None:
        example = encoded.example
        position = example.source_index + 1
        if (position, encoded.part + 1) <= (self.last, self.parts):
            return
        self.rows += position > self.last
        self.last, self.parts = position, encoded.part + 1
        self.examples += 1
        self.split_examples += encoded.parts > 1
        self.tokens += len(example.input_ids)
        self.longest = max(self.longest, encoded.length)
        chat = encoded.sample.chat if isinstance(encoded.sample, Prompt) else encoded.sample
        system = chat.system if isinstance(chat, Conversation) else None
        self.systems[system if system in self.systems or len(self.systems) < MOST_SYSTEMS else None] += 1
        for name, is_so in (
            ("split_rows", encoded.parts > 1 and encoded.part == 0),
            ("truncated", encoded.length > max_length),
            ("without_weight", example.weight == 0),
            ("cut_away", not encoded.is_learned),
            ("duplicates", bool(self.held_out) and example.hash in self.held_out),
        ):
            if is_so:
                self.flagged.add(name, encoded.location)


def most_frequent(systems: Iterable[Counter[str | None]]) -> str | None:
    """Returns the system message of more than half of the examples; None if there is none."""
    total = sum(systems, Counter[str | None]())
    return next((text for text, count in total.items() if 2 * count > total.total()), None)


def count_messages(samples: Iterable[object]) -> dict[str, int]:
    """Counts the messages of each role in the conversations, and their tools, tool calls, reasoning and images."""
    counts = Counter[str]()
    for chat in (sample for sample in samples if isinstance(sample, Conversation)):
        counts.update(message["role"] for message in chat.messages)
        counts["tool calls"] += sum(len(message.get("tool_calls", [])) for message in chat.messages)
        counts["with reasoning"] += sum(REASONING in message for message in chat.messages)
        counts["not to be trained"] += len(chat.untrained)
        counts["tools"] += len(chat.tools or [])
        counts["images"] += len(images_of(chat.messages))
    return {name: count for name, count in counts.items() if count}


Located: TypeAlias = Sequence[tuple[AnySample, str]]  # samples and the locations of their rows


def _of_chat(chat: Conversation) -> Iterator[str]:
    if any(message["role"] == "user" and not text_of(message).strip() for message in chat.messages):
        yield "empty_question"
    if any(chat.messages[index]["content"].strip().lower() in MISSING for index in chat.trained_replies):
        yield "missing_answer"
    if 0 in chat.trained_replies:
        yield "no_prompt"


def _of_labels(samples: Located, labels: Labels) -> Iterator[tuple[str, str]]:
    rows = []
    for sample, location in samples:
        if isinstance(sample, Labelled):
            values = sample.label if isinstance(sample.label, list) else [sample.label]
            rows.append((sample, location, list(map(str, values))))
    counts = Counter(name for *_, names in rows for name in names)
    frequent: dict[str, str] = {}  # spelling without spaces and case -> the most frequent name
    for name, _ in counts.most_common():
        frequent.setdefault(_spelling(name), name)
    first: dict[tuple[str, str | None, str], list[str]] = {}
    for sample, location, names in rows:
        labelled = f"{location} ({', '.join(map(repr, names))})"
        if labels.task != REGRESSION and any(frequent[_spelling(name)] != name for name in names):
            yield "similar_labels", labelled
        if sorted(first.setdefault((sample.text, sample.second, repr(sample.messages)), names)) != sorted(names):
            yield "two_labels", labelled
        if labels.problem_type == SINGLE and RARE * counts[names[0]] < max(counts.values()):
            yield "imbalance", labelled


def sample_hash(sample: AnySample | Mapping[str, Any]) -> bytes:
    """Returns 8 bytes that depend only on the content, not on columns, tokenizer or truncation."""

    def plain(value: Any) -> Any:
        if isinstance(value, Image):
            return value.sha256
        if is_dataclass(value):
            return {f.name: getattr(value, f.name) for f in fields(value) if f.compare}
        return sorted(value) if isinstance(value, frozenset) else str(value)

    return hashlib.sha256(json.dumps(sample, sort_keys=True, default=plain).encode()).digest()[:8]


def trained_hash(sample: AnySample) -> bytes:
    """Returns `sample_hash`, or for reinforcement learning a hash of the prompt, however its row is written."""
    return _prompt_hash(sample.chat) if isinstance(sample, Prompt) else sample_hash(sample)


def was_trained(sample: AnySample, hashes: Collection[bytes]) -> bool:
    """Returns whether a row, or its prompt alone, is among the rows that `trained_hash` describes."""
    chats = (part for part in tokenized_parts(sample) if isinstance(part, Conversation | Pair))
    return sample_hash(sample) in hashes or any(_prompt_hash(chat) in hashes for chat in chats)


def _prompt_hash(chat: Conversation | Pair) -> bytes:
    chat = to_conversation(chat)
    return sample_hash(Conversation(chat.messages[: last_reply(chat)], tools=chat.tools))


def _spelling(name: str) -> str:
    return "".join(name.split()).casefold()
