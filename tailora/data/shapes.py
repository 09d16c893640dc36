"""The shapes that rows come in, recognised by their keys, and what a row becomes.

shape               needs                   may have     becomes
messages            messages                             Conversation
sharegpt            conversations           system       Conversation
prompt/completion   prompt, completion                   Pair, or Conversation when the two are lists of messages
alpaca              instruction, output     input        Pair
choices             prompt, choices, answer              Choices: a Pair, or Conversation, for every choice
text                text                                 Text

In choices, prompt may be called question, and answer label.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from tailora.errors import DataError, listing, nearest

Messages: TypeAlias = list[dict[str, str]]  # role and content


@dataclass(frozen=True, slots=True)
class Conversation:
    """Chat messages; the assistant's are learned, from the message `first` on."""

    messages: Messages
    first: int = 0


@dataclass(frozen=True, slots=True)
class Pair:
    """The completion is learned. One user turn and its reply where the model has a chat template."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Text:
    """All of it is learned."""

    text: str


Sample: TypeAlias = Conversation | Pair | Text


@dataclass(frozen=True, slots=True)
class Choices:
    """A question with several replies to it, of which one is right. That one is what training learns."""

    options: tuple[Conversation | Pair, ...]
    answer: int  # place of the right one


@dataclass(frozen=True, slots=True)
class Shape:
    name: str
    needs: tuple[str, ...]
    may: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        return self.needs + self.may


# Where several fit, the first wins: `messages` says more than the `prompt` that often stands beside it.
SHAPES = (
    Shape("messages", ("messages",)),
    Shape("sharegpt", ("conversations",), ("system",)),
    Shape("prompt/completion", ("prompt", "completion")),
    Shape("alpaca", ("instruction", "output"), ("input",)),
    *(Shape("choices", (asked, "choices", right)) for asked in ("prompt", "question") for right in ("answer", "label")),
    Shape("text", ("text",)),
)
KNOWN = tuple(dict.fromkeys(key for shape in SHAPES for key in shape.keys))

# Only for the hint in the error: what others call the keys. Nothing is renamed without being asked.
OFTEN_CALLED = {
    "messages": ("chat", "dialogue", "dialog", "conversation", "turns"),
    "prompt": ("question", "query", "input", "source", "user", "problem", "instruction", "ctx"),
    "completion": ("answer", "response", "output", "target", "reply", "assistant", "solution", "chosen"),
    "choices": ("options", "endings", "candidates", "alternatives"),
    "answer": ("label", "answerkey", "answer_idx", "answer_index", "gold", "correct", "correct_answer", "target"),
    "text": ("content", "document", "body", "article", "passage"),
}


@dataclass(frozen=True, slots=True)
class Mapped:
    """How the columns of one source are read."""

    shape: Shape
    columns: dict[str, str]  # the shape's key -> column
    ignored: tuple[str, ...]

    def values(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The shape's keys with the row's values. Raises DataError when the row lacks one."""
        missing = [column for key, column in self.columns.items() if key in self.shape.needs and column not in fields]
        if missing:
            present = ", ".join(fields) or "no keys"
            raise DataError(f"no {' and no '.join(missing)} (read as {self.shape.name}); the row has {present}")
        return {key: fields[column] for key, column in self.columns.items() if column in fields}


def recognise(rows: Iterable[Mapping[str, Any]], field: Mapping[str, str] | None = None) -> Mapped:
    """The shape that most rows have the keys of, after renaming by `field` (the shape's key -> column).

    Raises DataError that lists the keys present, the shapes known, and how to map one to the other.
    """
    field = dict(field or {})
    key_sets = Counter(frozenset(row) for row in rows)
    # sets of strings change their order from run to run
    columns = sorted({column for keys in key_sets for column in keys})
    _check_mapping(field, columns)
    renamed = {column: key for key, column in field.items()}
    counts = {
        shape: sum(n for keys, n in key_sets.items() if _fits(shape, {renamed.get(key, key) for key in keys}, field))
        for shape in SHAPES
    }
    best = max(SHAPES, key=lambda shape: counts[shape])
    if not counts[best]:
        raise DataError(_unknown(columns, field))
    used = {key: field.get(key, key) for key in best.keys if field.get(key, key) in columns}
    return Mapped(best, used, tuple(column for column in columns if column not in used.values()))


def _fits(shape: Shape, keys: set[str], field: Mapping[str, str]) -> bool:
    return keys.issuperset(shape.needs) and set(shape.keys).issuperset(field)


def _check_mapping(field: Mapping[str, str], columns: list[str]) -> None:
    problems = [
        f"--field {key}={column}: no shape has the key {key!r}{nearest(key, KNOWN)}"
        for key, column in field.items()
        if key not in KNOWN
    ]
    present = ", ".join(columns)
    problems += [
        f"--field {key}={column}: the data has no column {column!r}{nearest(column, columns)}; there are {present}"
        for key, column in field.items()
        if column not in columns
    ]
    if problems:
        raise DataError(listing(problems))


def _unknown(columns: list[str], field: Mapping[str, str]) -> str:
    known = {shape.name: shape for shape in reversed(SHAPES)}  # the first of each name
    shapes = "; ".join(f"{name} ({', '.join(shape.needs)})" for name, shape in reversed(known.items()))
    asked = "".join(f" --field {key}={column}" for key, column in field.items())
    present = ", ".join(columns) or "(none)"
    return (
        f"the rows have the keys {present}, which fit no known shape{asked and f' with{asked}'}.\n"
        f"Known: {shapes}.\n{_hint(columns)}"
    )


def _hint(columns: list[str]) -> str:
    lower = {column.lower(): column for column in columns}
    for shape in SHAPES:
        guess = {key: _called(key, lower) for key in shape.needs}
        if all(guess.values()) and len(set(guess.values())) == len(guess):
            return "Perhaps: " + " ".join(f"--field {key}={column}" for key, column in guess.items() if key != column)
    return "Name the columns, for instance: --field prompt=question --field completion=answer"


def _called(key: str, lower: Mapping[str, str]) -> str | None:
    return next((lower[name] for name in (key, *OFTEN_CALLED.get(key, ())) if name in lower), None)
