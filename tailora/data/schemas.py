"""The schemas of rows, recognized by their keys, and the conversion of a row to a sample.

    schema              required keys           optional         becomes
    messages            messages                tools            Conversation
    sharegpt            conversations           system, tools    Conversation
    prompt/completion   prompt, completion      tools            Pair, or Conversation if one of the two is a list of
                                                                 messages or there are tools
    alpaca              instruction, output     input            Pair
    choices             prompt, choices, answer                  Choices: a Pair or Conversation per choice
    text                text                                     Text
    preference          chosen, rejected        prompt, tools    Preference
    feedback            prompt, completion, label   tools        Feedback
    text/label          text, label                              Labelled; also text_a and text_b, or messages
    tokens/tags         tokens, tags                             Tagged
    prompts             messages or prompt      tools            Prompt, with the other columns for reward functions

Every row except a prompt may have a weight that multiplies its loss in training. Rows of the first four schemas may
have images, in their messages or in a column images or image.

For choices, prompt can also be called question, and answer can be called label. Rows are read as feedback if at least
half of their labels are true or false, or with --task preference.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from tailora.data.messages import (
    REASONING,
    MarkedMessage,
    as_messages,
    listed,
    marked_messages,
    number_of,
    parsed_list,
    read_messages,
    read_tools,
    short_repr,
    text_value,
)
from tailora.data.readers import Row, RowProblem, data_error
from tailora.data.samples import (
    AnySample,
    Choices,
    Conversation,
    Feedback,
    Labelled,
    Pair,
    Preference,
    Prompt,
    Tagged,
    Text,
)
from tailora.errors import DataError, listing, nearest

# ---- From a row to a sample: one function per schema. They raise DataError with the cause; callers add file and row.


def from_messages(values: dict[str, Any]) -> Conversation:
    return _conversation(marked_messages(values["messages"], "messages"), values)


def from_sharegpt(values: dict[str, Any]) -> Conversation:
    messages = marked_messages(values["conversations"], "conversations")
    if (system := values.get("system")) not in (None, ""):
        messages.insert(0, ({"role": "system", "content": text_value(system, "system")}, None))
    return _conversation(messages, values)


def from_prompt(values: dict[str, Any]) -> Conversation | Pair:
    prompt, completion = values["prompt"], values["completion"]
    if not isinstance(prompt, list) and not isinstance(completion, list) and not read_tools(values):
        return from_texts(values)
    before = as_messages(prompt, "prompt", "user")
    after = as_messages(completion, "completion", "assistant")
    return _conversation(before + after, values, first=len(before))


def from_alpaca(values: dict[str, Any]) -> Pair:
    parts = [text_value(values["instruction"], "instruction")]
    if values.get("input") is not None:
        parts.append(text_value(values["input"], "input"))
    # Base models read prompt and answer as one text, so the prompt ends with a blank line.
    prompt = "".join(f"{part}\n\n" for part in parts if part.strip())
    return _pair(prompt, text_value(values["output"], "output"))


def from_text(values: dict[str, Any]) -> Text:
    text = text_value(values["text"], "text")
    if not text.strip():
        raise DataError("text is empty, so there is nothing to learn")
    return Text(text)


def from_choices(values: dict[str, Any]) -> Choices:
    prompt = values["prompt"] if "prompt" in values else values["question"]
    texts, labels = _choices(values["choices"])
    answer = _answer_index(values["answer"] if "answer" in values else values["label"], texts, labels)
    # Base models read prompt and choice as one text; add a space between them, as lm-evaluation-harness does.
    space = "" if isinstance(prompt, str) and prompt[-1:].isspace() else " "
    return Choices(tuple(from_prompt({"prompt": prompt, "completion": space + text}) for text in texts), answer)


def from_preference(values: dict[str, Any]) -> Preference:
    chosen, rejected = values["chosen"], values["rejected"]
    prompt = values.get("prompt")
    # As in TRL, a text prompt next to lists of messages only repeats the beginning of both lists.
    is_implicit = prompt is None or (isinstance(prompt, str) and isinstance(chosen, list))
    if is_implicit:
        shared, *rests = _shared_prompt(chosen, rejected)
        if shared or prompt is None:
            prompt, (chosen, rejected) = shared, rests
    sides = {}
    for name, completion in (("chosen", chosen), ("rejected", rejected)):
        try:
            sides[name] = from_prompt({**values, "prompt": prompt, "completion": completion})
        except DataError as error:
            raise DataError(str(error).replace("completion", name)) from None
    if sides["chosen"] == sides["rejected"]:
        raise DataError("chosen and rejected are the same, so there is nothing to learn")
    return Preference(**sides)


def choices_from_preference(values: dict[str, Any]) -> Choices:
    """For evaluation."""
    pair = from_preference(values)
    return Choices((pair.chosen, pair.rejected), 0)


DESIRABLE = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}  # CSV has text; 1 == True


def from_feedback(values: dict[str, Any]) -> Feedback:
    label = values["label"]
    key = label.strip().lower() if isinstance(label, str) else label
    if isinstance(label, list | dict) or key not in DESIRABLE:
        raise DataError(
            f"label: expected true (desirable) or false, got {short_repr(label)}; to train on all completions without "
            "labels, use --task causal-lm"
        )
    return Feedback(from_prompt(values), DESIRABLE[key])


def from_labelled(values: dict[str, Any]) -> Labelled:
    label = values.get("label")
    if "label" in values and label is None:
        raise DataError("label is empty")
    if "messages" in values:
        return Labelled(messages=read_messages(values["messages"], "messages"), label=label)
    texts = {key: text_value(values[key], key) for key in ("text", "text_a", "text_b") if key in values}
    if empty := [key for key, text in texts.items() if not text.strip()]:
        raise DataError(f"{' and '.join(empty)} is empty")
    first, second = [*texts.values(), None][:2]
    return Labelled(str(first), second, label=label)


def from_texts(values: dict[str, Any]) -> Pair:
    return _pair(*(text_value(values[key], key) for key in PAIR))


def from_tagged(values: dict[str, Any]) -> Tagged:
    tokens, tags = values["tokens"], values.get("tags")
    if not isinstance(tokens, list) or not tokens:
        raise DataError(f"tokens: expected a list of words, got {short_repr(tokens)}")
    words = [text_value(token, f"tokens[{index}]") for index, token in enumerate(tokens)]
    if "tags" not in values:
        return Tagged(words)
    if not isinstance(tags, list) or not tags:
        raise DataError(f"tags: expected a list with one tag per token, got {short_repr(tags)}")
    if len(tags) != len(words):
        raise DataError(f"tags: expected one per token, got {len(tags)} tags for {len(words)} tokens")
    if wrong := [tag for tag in tags if type(tag) not in (str, int) or tag == ""]:
        raise DataError(f"tags: expected text or integers, got {short_repr(wrong[0])}")
    return Tagged(words, tags)


def from_prompt_alone(key: str, values: dict[str, Any]) -> Prompt:
    """key: of the prompt. All other values are columns for reward functions."""
    value, tools = values[key], read_tools(values)
    messages = [message for message, _ in as_messages(value, key, "user")]
    if messages[-1]["role"] == "assistant":
        raise DataError(f"{key}: expected a prompt, but it ends with a reply; put the reply into a different column")
    unanswered = [*messages, {"role": "assistant", "content": ""}]
    is_text = isinstance(value, str) and not tools
    chat = Pair(value, "") if is_text else Conversation(unanswered, tools=tools)
    return Prompt(chat, value, {name: other for name, other in values.items() if name != key})


def _shared_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Returns the shared beginning (messages, or text up to a space between words) and the rest of each.

    Raises DataError if they share no prompt or have different types.
    """
    if not (isinstance(chosen, str | list) and type(chosen) is type(rejected)):
        raise DataError(
            "chosen and rejected: expected two texts or two lists of messages, got "
            f"{short_repr(chosen)} and {short_repr(rejected)}"
        )
    pairs, shortest = zip(chosen, rejected, strict=False), min(len(chosen), len(rejected))
    end = next((index for index, (left, right) in enumerate(pairs) if left != right), shortest)
    if isinstance(chosen, list):
        end = max(min(end, shortest - 1), 0)  # the last message is not part of the prompt
    else:
        text: str = chosen[:end]
        end = max((match.end() for match in re.finditer(r"\s+", text)), default=0)
        if end and text[end - 1] == " ":
            end -= 1  # in most tokenizers, a word's token includes the space before it
    if not end and isinstance(chosen, str):
        raise DataError('chosen and rejected do not begin with the same prompt; add a "prompt" key')
    return chosen[:end], chosen[end:], rejected[end:]


# ---- Values of a row: checked, or DataError


def _pair(prompt: str, completion: str) -> Pair:
    if not completion.strip():
        raise DataError("completion is empty, so there is nothing to learn")
    return Pair(prompt, completion)


def _conversation(read: list[MarkedMessage], values: dict[str, Any], first: int = 0) -> Conversation:
    """values: of the row, possibly with tools."""
    messages = [message for message, _ in read]
    untrained = frozenset(index for index, (_, is_trained) in enumerate(read) if is_trained is False)
    conversation = Conversation(messages, first, untrained, read_tools(values))
    trained = [messages[index] for index in conversation.trained_replies]
    if not any(message["content"].strip() or message.keys() & {"tool_calls", REASONING} for message in trained):
        kind = "a trained" if untrained else "an"
        advice = "" if conversation.replies else "; to train on prompts without replies, use --task grpo and a --reward"
        raise DataError(f"expected {kind} assistant message with content, got none{advice}")
    return conversation


def _choices(value: Any) -> tuple[list[str], list[str]]:
    """Returns the texts, and their labels if the row has {"text": [...], "label": [...]}."""
    labels: Any = []
    if isinstance(value, dict) and value.keys() == {"text", "label"}:
        value, labels = value["text"], value["label"]
        if not isinstance(labels, list) or not isinstance(value, list) or len(labels) != len(value):
            raise DataError("choices: expected one label per text")
    if not isinstance(value, list) or len(value) < 2:
        raise DataError(f"choices: expected a list of two or more texts, got {short_repr(value)}")
    texts = [
        text_value(str(text) if type(text) in (int, float) else text, f"choices[{n}]") for n, text in enumerate(value)
    ]
    if empty := [f"choices[{index}]" for index, text in enumerate(texts) if not text.strip()]:
        raise DataError(f"{', '.join(empty)} is empty")
    if wrong := [label for label in labels if type(label) not in (int, str)]:
        raise DataError(f"choices: expected text or integers as labels, got {short_repr(wrong[0])}")
    return [text.strip() for text in texts], [str(label) for label in labels]


def _answer_index(value: Any, texts: list[str], labels: list[str]) -> int:
    """Returns the index of the choice that the answer names by label, index from 0, letter or text.

    Raises DataError if there is no such choice or the answer is ambiguous.
    """
    answer = str(value).strip() if type(value) in (int, str) else ""
    if answer in labels:
        return labels.index(answer)
    names = [[str(index) for index in range(len(texts))]]
    names += [list(string.ascii_uppercase[: len(texts)]), texts] if isinstance(value, str) else []
    meanings = {values.index(answer) for values in names if answer in values}
    if len(meanings) == 1:
        return meanings.pop()
    problem = "could be several choices" if meanings else "matches no choice"
    possible = f"a label ({', '.join(labels)})" if labels else f"an index from 0 to {len(texts) - 1} as a number"
    raise DataError(f"answer {short_repr(value)} {problem}; use {possible}, a letter or the text of a choice")


# ---- The schema of a source


AUTO, CAUSAL_LM, PREFERENCE = "auto", "causal-lm", "preference"  # tasks
SEQUENCE_CLASSIFICATION, REGRESSION = "sequence-classification", "regression"
TOKEN_CLASSIFICATION, SEQ2SEQ, GRPO = "token-classification", "seq2seq", "grpo"
LABEL_KEYS = ("label", "tags")  # keys of the prediction targets
FOUND_FROM_ROWS = (CAUSAL_LM, PREFERENCE)
FEEDBACK = "feedback"  # a schema whose examples also need the replies of other rows


@dataclass(frozen=True, slots=True)
class Schema:
    name: str
    convert: Callable[[dict[str, Any]], AnySample]  # values by key -> sample; raises DataError with the cause
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    task: str = CAUSAL_LM
    fits: Callable[[Mapping[str, Any]], bool] = lambda _: True  # whether a row speaks for it if no task is given

    @property
    def uses_chat_template(self) -> bool:
        """Whether rows are rendered with the chat template; others are tokenized unchanged."""
        return "messages" in self.required or (self.task in (*FOUND_FROM_ROWS, GRPO) and self.name != TEXT)

    @property
    def keys(self) -> tuple[str, ...]:
        return (*self.required, *self.optional, *([] if self.task == GRPO else [WEIGHT]))


def _has_truth_value(row: Mapping[str, Any]) -> bool:
    label = row.get("label")
    return label in (True, False) or (isinstance(label, str) and label.strip().lower() in ("true", "false"))  # or 1, 0


PAIR = ("prompt", "completion")
WEIGHT = "weight"  # an optional key of every schema except prompts
IMAGE_COLUMNS = ("images", "image")  # several or one
TEXT = "text"  # the schema of documents of any length
# If several fit, the first wins: `messages` has more information than the `prompt` that often accompanies it, and two
# replies have more than one.
SCHEMAS = (
    Schema("preference", from_preference, ("chosen", "rejected"), ("prompt", "tools"), task=PREFERENCE),
    Schema(FEEDBACK, from_feedback, (*PAIR, "label"), ("tools",), task=PREFERENCE, fits=_has_truth_value),
    Schema("messages", from_messages, ("messages",), ("tools", *IMAGE_COLUMNS)),
    Schema("sharegpt", from_sharegpt, ("conversations",), ("system", "tools", *IMAGE_COLUMNS)),
    Schema("prompt/completion", from_prompt, PAIR, ("tools", *IMAGE_COLUMNS)),
    Schema("alpaca", from_alpaca, ("instruction", "output"), ("input", *IMAGE_COLUMNS)),
    *(
        Schema("choices", from_choices, (prompt, "choices", answer))
        for prompt in ("prompt", "question")
        for answer in ("answer", "label")
    ),
    Schema(TEXT, from_text, ("text",)),
    *(
        Schema(f"{'/'.join(keys)}/label", from_labelled, (*keys, "label"), task=task)
        for task in (SEQUENCE_CLASSIFICATION, REGRESSION)
        for keys in (("messages",), ("text_a", "text_b"), ("text",))
    ),
    Schema("prompt/completion", from_texts, PAIR, task=SEQ2SEQ),
    Schema("alpaca", from_alpaca, ("instruction", "output"), ("input",), task=SEQ2SEQ),
    Schema("tokens/tags", from_tagged, ("tokens", "tags"), task=TOKEN_CLASSIFICATION),
    Schema("prompts", partial(from_prompt_alone, "messages"), ("messages",), ("tools",), task=GRPO),
    Schema("prompts", partial(from_prompt_alone, "prompt"), ("prompt",), ("tools",), task=GRPO),
)
KNOWN_KEYS = tuple(dict.fromkeys(key for schema in SCHEMAS for key in schema.keys))
SYNONYMS = {  # for hints in errors only: no column is renamed without --field
    "messages": ("chat", "dialogue", "dialog", "conversation", "turns"),
    "prompt": ("question", "query", "input", "source", "user", "problem", "instruction", "ctx"),
    "completion": ("answer", "response", "output", "target", "reply", "assistant", "solution"),
    "chosen": ("preferred", "winner", "accepted", "better", "positive", "response_chosen"),
    "rejected": ("dispreferred", "loser", "worse", "negative", "response_rejected"),
    "choices": ("options", "endings", "candidates", "alternatives"),
    "answer": ("label", "answerkey", "answer_idx", "answer_index", "gold", "correct", "correct_answer", "target"),
    "text": ("content", "document", "body", "article", "passage", "sentence"),
    "text_a": ("sentence1", "premise", "question1", "question"),
    "text_b": ("sentence2", "hypothesis", "question2", "sentence"),
    "label": ("labels", "class", "category", "sentiment", "rating", "score", "target"),
    "tokens": ("words",),
    "tags": ("ner_tags", "pos_tags", "labels", "ner"),
}


@dataclass(frozen=True, slots=True)
class ColumnMapping:
    """The columns of one source. `columns`: key of the schema -> column."""

    schema: Schema
    columns: dict[str, str]
    ignored: tuple[str, ...]

    def values(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Returns key of the schema -> the row's value; of a prompt also the other columns.

        Raises DataError if the row lacks a required one.
        """
        required = [column for key, column in self.columns.items() if key in self.schema.required]
        if missing := [column for column in required if column not in fields]:
            present = listed(fields) or "no keys"
            raise DataError(f"missing {' and '.join(missing)} (schema {self.schema.name}); the row has {present}")
        values = {key: parsed_list(fields[column], key) for key, column in self.columns.items() if column in fields}
        others = {column: fields[column] for column in self.ignored if column in fields}
        return others | values if self.schema.task == GRPO else values


def detect_schema(
    source: str,
    items: Sequence[Row | RowProblem],
    field: Mapping[str, str] | None = None,
    task: str = AUTO,
    *,
    has_labels: bool = True,
) -> ColumnMapping:
    """Returns the schema that fits most rows of a source, after renaming by `field` (key of the schema -> column).

    task: only schemas of this task.
    has_labels: False for prediction, where rows have no labels or tags.
    Raises DataError if there is no row, or with the keys of the rows, the known schemas, and how to map the keys.
    """
    rows = [item.fields for item in items if isinstance(item, Row)]
    if not rows:
        problems = [item for item in items if isinstance(item, RowProblem)]
        raise data_error(problems or [RowProblem(source, 0, "expected at least one row, got none")])
    field = dict(field or {})
    schemas = [schema for schema in SCHEMAS if schema.task in (FOUND_FROM_ROWS if task == AUTO else (task,))]
    if not has_labels:
        field = {key: column for key, column in field.items() if key not in LABEL_KEYS}
        without_labels = [tuple(key for key in schema.required if key not in LABEL_KEYS) for schema in schemas]
        schemas = [replace(schema, required=keys) for schema, keys in zip(schemas, without_labels, strict=True)]
    renamed = {column: key for key, column in field.items()}
    with_keys: dict[frozenset[str], list[Schema]] = {}  # keys of a row -> the schemas that fit
    counts, against = Counter[Schema](), Counter[Schema]()
    for row in rows:
        columns_of_row = frozenset(row)
        if columns_of_row not in with_keys:
            keys = {renamed.get(column, column) for column in row}
            with_keys[columns_of_row] = [
                schema for schema in schemas if keys.issuperset(schema.required) and {*schema.keys}.issuperset(field)
            ]
        renamed_row = dict(row) | {key: row[column] for key, column in field.items() if column in row}
        counts.update(with_keys[columns_of_row])
        against.update(s for s in with_keys[columns_of_row] if task == AUTO and not s.fits(renamed_row))
    columns = sorted({column for keys in with_keys for column in keys})  # the order of a set changes between runs
    wrong_fields = [
        f"--field {key}={column}: {what} {name!r}{nearest(name, known) or f'; expected one of {listed(sorted(known))}'}"
        for key, column in field.items()
        for what, name, known in (
            ("no schema has the key", key, KNOWN_KEYS),
            ("the data has no column", column, columns),
        )
        if name not in known
    ]
    if wrong_fields:
        raise DataError(f"data {source}: {listing(wrong_fields)}")
    # A single wrong or missing value must not change the schema of all rows; it is an error of its row.
    counts = Counter({schema: count for schema, count in counts.items() if 2 * against[schema] <= count})
    best = max(schemas, key=lambda schema: counts[schema])
    with_more_keys = (schema for schema in schemas if set(schema.required) > set(best.required))
    best = next((schema for schema in with_more_keys if 0 < counts[best] <= 2 * counts[schema]), best)
    if not counts[best]:
        raise DataError(f"data {source}: {_unknown_schema(columns, field, schemas, task)}")
    used = {key: field.get(key, key) for key in best.keys if field.get(key, key) in columns}
    return ColumnMapping(best, used, tuple(column for column in columns if column not in used.values()))


def _unknown_schema(columns: list[str], field: Mapping[str, str], schemas: Sequence[Schema], task: str) -> str:
    required: dict[str, str] = {}
    for schema in schemas:
        required.setdefault(schema.name, "messages or prompt" if task == GRPO else ", ".join(schema.required))
    known = "; ".join(f"{name} ({keys})" for name, keys in required.items())
    known += "; prompts for rewards (prompt or messages; with --task grpo)" if task == AUTO else ""
    flags = "".join(f" --field {key}={column}" for key, column in field.items())
    lower = {column.lower(): column for column in columns}

    def guess(key: str) -> str | None:
        names = (key, *SYNONYMS.get(key, ()))
        return field.get(key) or next((lower[name] for name in names if name in lower), None)

    with_labels = [s for s in SCHEMAS if task == AUTO and s.task in (SEQUENCE_CLASSIFICATION, TOKEN_CLASSIFICATION)]
    for schema in sorted([*schemas, *with_labels], key=lambda schema: len(schema.required), reverse=True):
        guessed = {key: guess(key) for key in schema.required}
        if all(guessed.values()) and len(set(guessed.values())) == len(guessed):
            hint = "Maybe use:" if schema in schemas else f"For rows with labels, use --task {schema.task}"
            hint += "".join(f" --field {key}={column}" for key, column in guessed.items() if key != column)
            break
    else:
        hint = "Name the column of each key with --field KEY=COLUMN"
    return (
        f"the keys of the rows ({listed(columns) or 'none'}) match no known schema"
        f"{'' if task == AUTO else f' of --task {task}'}{flags and f' with{flags}'}.\nKnown: {known}.\n{hint}"
    )


def weight_of(row: Row, mapping: ColumnMapping) -> float:
    """Returns the row's weight, by default 1. Raises DataError unless it is a number >= 0, in CSV as text."""
    value = row.fields.get(mapping.columns[WEIGHT]) if WEIGHT in mapping.columns else None
    if value is None or value == "":
        return 1.0
    weight = number_of(value)
    if not 0 <= weight < math.inf:
        raise DataError(
            f"weight: expected a number >= 0 that multiplies the row's loss, got {short_repr(value)}; rename the "
            "column if it has a different meaning"
        )
    return weight


def convert_row(row: Row, mapping: ColumnMapping) -> AnySample:
    """Raises DataError with the cause."""
    return mapping.schema.convert(mapping.values(row.fields))
