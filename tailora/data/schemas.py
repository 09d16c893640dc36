"""From a row to a sample: one small function per shape. Each raises DataError with the cause alone."""

import string
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from tailora.data.readers import Fault, Row
from tailora.errors import DataError, listing, nearest

# ---- The shapes that rows come in, recognised by their keys, and what a row becomes.
#
# shape               needs                   may have     becomes
# messages            messages                             Conversation
# sharegpt            conversations           system       Conversation
# prompt/completion   prompt, completion                   Pair, or Conversation when the two are lists of messages
# alpaca              instruction, output     input        Pair
# choices             prompt, choices, answer              Choices: a Pair, or Conversation, for every choice
# text                text                                 Text
#
# In choices, prompt may be called question, and answer label.


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


# ----


ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function": "tool",
}
# These change what should be learned or said, so leaving them out in silence would train on something else.
UNSUPPORTED = ("tool_calls", "function_call", "weight")


def convert(row: Row, mapped: Mapped) -> Sample | Choices | Fault:
    try:
        return CONVERTERS[mapped.shape.name](mapped.values(row.fields))
    except DataError as error:
        return Fault(row.file, row.number, str(error))


def from_messages(values: dict[str, Any]) -> Conversation:
    return _with_reply(Conversation(_messages(values["messages"], "messages")))


def from_sharegpt(values: dict[str, Any]) -> Conversation:
    turns = _list(values["conversations"], "conversations")
    messages = [_sharegpt_turn(turn, f"conversations[{place}]") for place, turn in enumerate(turns)]
    if values.get("system"):
        messages.insert(0, {"role": "system", "content": _text(values["system"], "system")})
    return _with_reply(Conversation(messages))


def from_prompt(values: dict[str, Any]) -> Sample:
    prompt, completion = values["prompt"], values["completion"]
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return _with_completion(Pair(_text(prompt, "prompt"), _text(completion, "completion")))
    before = _as_messages(prompt, "prompt", "user")
    after = _as_messages(completion, "completion", "assistant")
    return _with_reply(Conversation(before + after, first=len(before)))


def from_alpaca(values: dict[str, Any]) -> Pair:
    parts = [_text(values["instruction"], "instruction"), _text(values.get("input") or "", "input")]
    # Base models see prompt and answer as one text, so the prompt brings the blank line between them.
    prompt = "".join(f"{part}\n\n" for part in parts if part.strip())
    return _with_completion(Pair(prompt, _text(values["output"], "output")))


def from_text(values: dict[str, Any]) -> Text:
    text = _text(values["text"], "text")
    if not text.strip():
        raise DataError("nothing to learn: the text is empty")
    return Text(text)


def from_choices(values: dict[str, Any]) -> Choices:
    prompt = values["prompt"] if "prompt" in values else values["question"]
    texts, labels = _choices(values["choices"])
    place = _answer(values["answer"] if "answer" in values else values["label"], texts, labels)
    # Base models see prompt and choice as one text: a space parts them, as in lm-evaluation-harness.
    space = "" if isinstance(prompt, str) and prompt[-1:].isspace() else " "
    options = (from_prompt({"prompt": prompt, "completion": space + text}) for text in texts)
    return Choices(tuple(each for each in options if not isinstance(each, Text)), place)


CONVERTERS: dict[str, Callable[[dict[str, Any]], Sample | Choices]] = {
    "messages": from_messages,
    "sharegpt": from_sharegpt,
    "prompt/completion": from_prompt,
    "alpaca": from_alpaca,
    "choices": from_choices,
    "text": from_text,
}


def _choices(value: Any) -> tuple[list[str], list[str]]:
    """Texts, and their labels where the row names them, as {"text": [...], "label": [...]} does."""
    labels: Any = []
    if isinstance(value, dict) and value.keys() == {"text", "label"}:
        value, labels = value["text"], value["label"]
        if not isinstance(labels, list) or not isinstance(value, list) or len(labels) != len(value):
            raise DataError("choices has not one label for every text")
    if not isinstance(value, list) or len(value) < 2:
        raise DataError(f"choices is {_shown(value)} where a list of two or more texts is needed")
    texts = [_text(str(text) if type(text) in (int, float) else text, f"choices[{n}]") for n, text in enumerate(value)]
    if empty := [f"choices[{place}]" for place, text in enumerate(texts) if not text.strip()]:
        raise DataError(f"{', '.join(empty)} is empty")
    return [text.strip() for text in texts], [str(label) for label in labels]


def _answer(value: Any, texts: list[str], labels: list[str]) -> int:
    """The place that the answer means: by its label, its index from 0, its letter or its text.

    Raises DataError where it means none, or could mean two.
    """
    said = str(value).strip() if type(value) in (int, str) else ""
    if said in labels:
        return labels.index(said)
    indices = list(map(str, range(len(texts))))
    readings = {"an index": indices}
    if isinstance(value, str):
        readings |= {"the letter": list(string.ascii_uppercase[: len(texts)]), "the text": texts}
    found = {name: known.index(said) for name, known in readings.items() if said in known}
    if len(set(found.values())) == 1:
        return next(iter(found.values()))
    if found:
        meant = " and ".join(found)
        raise DataError(f"answer {_shown(value)} is {meant} of different choices; write the index, from 0, as a number")
    names = f"a label ({', '.join(labels)})" if labels else f"an index from 0 to {indices[-1]}, a letter"
    raise DataError(f"answer {_shown(value)} is none of the choices; write {names} or the text of a choice")


def _with_completion(pair: Pair) -> Pair:
    if not pair.completion.strip():
        raise DataError("nothing to learn: the completion is empty")
    return pair


def _with_reply(conversation: Conversation) -> Conversation:
    learned = [message for message in conversation.messages[conversation.first :] if message["role"] == "assistant"]
    if not any(message["content"].strip() for message in learned):
        raise DataError("nothing to learn: no assistant message with content")
    return conversation


def _as_messages(value: Any, name: str, role: str) -> list[dict[str, str]]:
    return _messages(value, name) if isinstance(value, list) else [{"role": role, "content": _text(value, name)}]


def _messages(value: Any, name: str) -> list[dict[str, str]]:
    return [_message(message, f"{name}[{place}]") for place, message in enumerate(_list(value, name))]


def _message(message: Any, name: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise DataError(f"{name} is {_shown(message)} where an object with role and content is needed")
    role = message.get("role")
    if role not in ROLES:
        raise DataError(
            f"{name}: role {_shown(role)} is unknown{nearest(str(role), ROLES)}; roles are {', '.join(ROLES)}"
        )
    for key in UNSUPPORTED:
        if message.get(key) not in (None, [], {}, 1):
            raise DataError(f"{name}: {key} cannot be learned from yet; remove it or the row")
    # Other text, such as reasoning_content, is the template's business.
    extra = {key: _text(value, f"{name}.{key}") for key, value in message.items() if isinstance(value, str)}
    return {**extra, "role": role, "content": _content(message.get("content"), f"{name}.content")}


def _sharegpt_turn(turn: Any, name: str) -> dict[str, str]:
    if isinstance(turn, dict) and "role" in turn:
        return _message(turn, name)
    if not isinstance(turn, dict) or "from" not in turn:
        raise DataError(f"{name} is {_shown(turn)} where an object with from and value is needed")
    speaker = turn["from"]
    if speaker not in SHAREGPT_ROLES:
        raise DataError(f"{name}: from {_shown(speaker)} is unknown; known are {', '.join(SHAREGPT_ROLES)}")
    return {"role": SHAREGPT_ROLES[speaker], "content": _text(turn.get("value"), f"{name}.value")}


def _content(value: Any, name: str) -> str:
    """Text, or a list of text parts {"type": "text", "text": ...}."""
    if not isinstance(value, list):
        return _text(value, name)
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise DataError(f"{name} holds {_shown(part)}; only text parts can be learned from")
    return "".join(_text(part.get("text"), name) for part in value)


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{name} is {_shown(value)} where a list of messages is needed")
    return value


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name} is {_shown(value)} where text is needed")
    if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise DataError(f"{name} holds half of a surrogate pair (a broken \\ud... escape), which no tokenizer reads")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
