"""Schemas are detected by their keys, and rows become samples."""

import json
import re
from collections.abc import Iterable
from typing import Any

import pytest

from tailora.data import schemas
from tailora.data.readers import Row
from tailora.data.samples import Choices, Conversation, Feedback, Pair, Text
from tailora.data.schemas import ColumnMapping, convert_row
from tailora.errors import DataError

# ---- Detection


def detect_schema(rows: Iterable[dict[str, Any]], *args: Any, **options: Any) -> ColumnMapping:
    items = [Row("rows.csv", number, fields) for number, fields in enumerate(rows, 1)]
    return schemas.detect_schema("rows.csv", items, *args, **options)


def row(*keys: str) -> dict[str, str]:
    return dict.fromkeys(keys, "x")


@pytest.mark.parametrize(
    ("keys", "shape", "ignored"),
    [
        (("messages",), "messages", ()),
        (("prompt", "messages", "id"), "messages", ("id", "prompt")),
        (("conversations", "system"), "sharegpt", ()),
        (("prompt", "completion"), "prompt/completion", ()),
        (("instruction", "input", "output", "source"), "alpaca", ("source",)),
        (("instruction", "output"), "alpaca", ()),
        (("text", "url"), "text", ("url",)),
        (("question", "choices", "answer", "subject"), "choices", ("subject",)),
        (("prompt", "choices", "label"), "choices", ()),
        (("prompt", "completion", "choices", "answer"), "prompt/completion", ("answer", "choices")),
    ],
)
def test_a_schema_is_detected_by_its_keys(keys, shape, ignored) -> None:
    mapping = detect_schema([row(*keys)])
    assert (mapping.schema.name, mapping.ignored) == (shape, ignored)
    assert mapping.columns.keys() | set(ignored) == set(keys)


def test_the_schema_of_most_rows_wins() -> None:
    assert detect_schema([row("text"), row("prompt", "completion"), row("text")]).schema.name == "text"


@pytest.mark.parametrize(
    ("wanted", "unwanted", "task"),
    [
        (True, False, "auto"),
        ("true", "False", "auto"),  # as the text of CSV
        (" TRUE", "false", "auto"),
        (1, 0, "preference"),
        (1.0, 0.0, "preference"),
        ("1", "0", "preference"),
    ],
)
def test_labels_say_which_replies_are_wanted(wanted: object, unwanted: object, task: str) -> None:
    rows = [{"prompt": "a", "completion": "b", "label": label} for label in (wanted, unwanted)]
    samples = [convert_row(Row("rows.csv", 1, fields), detect_schema(rows, task=task)) for fields in rows]
    assert samples == [Feedback(Pair("a", "b"), True), Feedback(Pair("a", "b"), False)]


@pytest.mark.parametrize("label", [2, None, "yes", [True], {"a": 1}, float("nan")])
def test_a_label_that_is_neither_true_nor_false_is_refused(label) -> None:
    fields = {"prompt": "a", "completion": "b", "label": label}
    with pytest.raises(DataError, match=r"expected true \(desirable\) or false, got "):
        convert_row(Row("rows.csv", 1, fields), detect_schema([fields], task="preference"))


@pytest.mark.parametrize(
    ("labels", "shape"),
    [
        ([True, False, None], "feedback"),  # with one label missing, unwanted replies would be learned like the others
        ([True, 3], "feedback"),
        ([True, False, 3, 4, 5], "prompt/completion"),
        ([True, True, ...], "feedback"),
        ([True, True, ..., ..., ...], "prompt/completion"),
        ([1, 0, 1], "feedback"),
        ([1, 2, 3], "prompt/completion"),
    ],
)
def test_most_labels_decide_what_all_rows_are_read_as(labels: list[object], shape: str) -> None:
    """`...` is a row without the key."""
    rows = [{"prompt": "a", "completion": "b"} | ({} if label is ... else {"label": label}) for label in labels]
    assert detect_schema(rows).schema.name == shape


def test_a_mapping_renames_and_decides_the_schema() -> None:
    mapping = detect_schema([row("messages", "question", "answer")], {"prompt": "question", "completion": "answer"})
    assert mapping.schema.name == "prompt/completion"
    assert mapping.values({"question": "q", "answer": "a"}) == {"prompt": "q", "completion": "a"}
    mapping = detect_schema([row("prompt", "response")], {"completion": "response"})
    assert mapping.columns == {"prompt": "prompt", "completion": "response"}


def test_a_row_without_a_needed_key_is_refused_with_its_keys() -> None:
    mapping = detect_schema([row("question", "completion")], {"prompt": "question"})
    with pytest.raises(
        DataError, match=r"missing question and completion \(schema prompt/completion\); the row has text"
    ):
        mapping.values(row("text"))


def test_unknown_keys_are_listed_with_the_known_schemas_and_a_hint() -> None:
    with pytest.raises(DataError) as caught:
        detect_schema([row("Question", "id"), row("Answer")])
    text = str(caught.value)
    assert "the keys of the rows (Answer, Question, id) match no known schema" in text
    assert "messages (messages); sharegpt (conversations); prompt/completion (prompt, completion)" in text
    assert "Maybe use: --field prompt=Question --field completion=Answer" in text
    assert text.count("choices (") == 1
    assert "; prompts for rewards (prompt or messages; with --task grpo).\n" in text
    with pytest.raises(DataError, match="Maybe use: --field prompt=ctx --field choices=endings --field answer=label"):
        detect_schema([row("ctx", "endings", "label")])
    with pytest.raises(DataError, match="Maybe use: --field prompt=first --field completion=answer"):
        detect_schema([row("first", "answer")], {"prompt": "first"})


@pytest.mark.parametrize("task", ["auto", "preference", "token-classification"])
def test_keys_that_resemble_nothing_are_to_be_named(task: str) -> None:
    with pytest.raises(DataError, match=r"Name the column of each key with --field KEY=COLUMN$"):
        detect_schema([row("x1", "x2")], task=task)


def test_labels_are_not_needed_for_a_prediction() -> None:
    task = "sequence-classification"
    assert detect_schema([row("text")], task=task, has_labels=False).columns == {"text": "text"}
    with pytest.raises(DataError, match=r"KEY=COLUMN$"):
        detect_schema([row("x1")], task=task, has_labels=False)
    with pytest.raises(DataError, match="text, label"):
        detect_schema([row("text")], task=task)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"promt": "question"}, r"no schema has the key 'promt'; did you mean prompt"),
        ({"prompt": "qestion"}, r"no column 'qestion'; did you mean question\?$"),
        ({"prompt": "text"}, "no column 'text'; expected one of answer, question$"),
        ({"zzz": "question"}, "no schema has the key 'zzz'; expected one of answer, "),
        ({"promt": "qestion"}, "2 problems"),
        ({"prompt": "question"}, r"match no known schema with --field prompt=question"),
    ],
)
def test_a_mistyped_mapping_names_the_nearest(field, message) -> None:
    with pytest.raises(DataError, match=message):
        detect_schema([row("question", "answer")], field)


# ---- Conversion

USER, REPLY = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}

TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}


def called(name: str, arguments: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def calling(*calls: dict[str, object]) -> dict[str, object]:
    return {"role": "assistant", "content": "", "tool_calls": list(calls)}


CALL = {"id": "1", **called("f", '{"a": 1}')}


def chat_reply(text: str) -> Conversation:
    return Conversation([USER, {"role": "assistant", "content": text}], first=1)


def converted(fields: dict[str, object]) -> object:
    return convert_row(Row("rows.jsonl", 7, fields), detect_schema([fields]))


def chat(*messages: object, **columns: object) -> dict[str, object]:
    return {"messages": [USER, *messages], **columns}


def reply(**keys: object) -> dict[str, object]:
    return {**REPLY, **keys}


def shared(sender: str, value: str, **keys: object) -> dict[str, object]:
    return {"from": sender, "value": value, **keys}


BE = {"role": "system", "content": "be"}
G = {"name": "g", "parameters": {}}
PARTS = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
OLD_CALL = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
CALL_ALONE = {"role": "assistant", "content": None, "tool_calls": [CALL]}  # content may be null beside calls
BARE_CALLS = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": 1}}, {"name": "g"}]}
RESULT = {"name": "f", "content": "1"}
SHARED_CALL = shared("function_call", '{"name": "f", "arguments": {"a": 1}}')


@pytest.mark.parametrize(
    ("fields", "sample"),
    [
        (chat(REPLY), Conversation([USER, REPLY])),
        ({"messages": [{**USER, "content": PARTS}, REPLY]}, Conversation([USER, REPLY])),
        (chat(reply(reasoning_content="hm", tool_calls=None)), Conversation([USER, reply(reasoning_content="hm")])),
        (chat(CALL_ALONE), Conversation([USER, calling(CALL)])),
        (chat(BARE_CALLS), Conversation([USER, calling(called("f", {"a": 1}), called("g", {}))])),
        (chat(OLD_CALL), Conversation([USER, calling(called("f", "{}"))])),
        (
            chat(calling(CALL), {"role": "function", **RESULT}, REPLY),
            Conversation([USER, calling(CALL), {"role": "tool", **RESULT}, REPLY]),
        ),
        (
            chat(REPLY, tools=[TOOL, G]),
            Conversation([USER, REPLY], tools=[TOOL, {"type": "function", "function": G}]),
        ),
        (chat(REPLY, tools=json.dumps([TOOL])), Conversation([USER, REPLY], tools=[TOOL])),
        (chat(REPLY, tools=[]), Conversation([USER, REPLY])),
        (
            {"messages": [{**USER, "train": False}, reply(train=False), USER, reply(weight=1)]},
            Conversation([USER, REPLY, USER, REPLY], untrained=frozenset({0, 1})),
        ),
        (
            {"conversations": [shared("human", "hi"), shared("gpt", "hello")], "system": "be"},
            Conversation([BE, USER, REPLY]),
        ),
        ({"conversations": [shared("user", "hi"), shared("assistant", "hello")]}, Conversation([USER, REPLY])),
        (
            {"conversations": [{**USER, "id": 7}, reply(thinking="hm")]},
            Conversation([{**USER, "id": 7}, reply(reasoning_content="hm")]),
        ),
        (
            {
                "conversations": [
                    *(shared("human", "hi"), SHARED_CALL, shared("observation", "1"), shared("gpt", "hello", weight=0))
                ],
                "tools": json.dumps([TOOL]),
            },
            Conversation(
                [USER, calling(called("f", {"a": 1})), {"role": "tool", "content": "1"}, REPLY],
                untrained=frozenset({3}),
                tools=[TOOL],
            ),
        ),
        ({"prompt": "hi", "completion": "hello", "tools": [TOOL]}, Conversation([USER, REPLY], first=1, tools=[TOOL])),
        ({"prompt": "hi", "completion": " there"}, Pair("hi", " there")),
        ({"prompt": [USER], "completion": [REPLY]}, Conversation([USER, REPLY], first=1)),
        ({"prompt": [USER, REPLY, USER], "completion": "hello"}, Conversation([USER, REPLY, USER, REPLY], first=3)),
        ({"instruction": "add", "input": "1, 2", "output": "3"}, Pair("add\n\n1, 2\n\n", "3")),
        ({"instruction": "add", "input": None, "output": "3"}, Pair("add\n\n", "3")),
        ({"text": "a\n"}, Text("a\n")),
        (
            {"question": "hi", "choices": ["a", " b\n", 3], "answer": 2},
            Choices((Pair("hi", " a"), Pair("hi", " b"), Pair("hi", " 3")), 2),
        ),
        ({"prompt": "hi ", "choices": ["a", "b"], "label": "1"}, Choices((Pair("hi ", "a"), Pair("hi ", "b")), 1)),
        (
            {"prompt": [USER], "choices": ["hello", "b"], "answer": 0},
            Choices((chat_reply(" hello"), chat_reply(" b")), 0),
        ),
    ],
)
def test_a_row_becomes_a_sample(fields, sample) -> None:
    assert converted(fields) == sample


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [USER, REPLY]},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        {"prompt": [USER], "completion": [REPLY]},
        {"chosen": [USER, REPLY], "rejected": [USER, {**REPLY, "content": "x"}]},
        {"question": "a", "choices": ["b", "c"], "answer": 0},
    ],
)
def test_lists_are_read_from_the_text_of_csv_cells(fields) -> None:
    cells = {key: json.dumps(value, indent=1) if isinstance(value, list) else value for key, value in fields.items()}
    assert converted(cells) == converted(fields)


@pytest.mark.parametrize("key", ["chosen", "completion"])
def test_messages_in_another_notation_than_json_are_not_learned_as_text(key: str) -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c"} if key == "chosen" else {"prompt": "a", "completion": "b"}
    with pytest.raises(DataError, match=rf"^{key}: expected JSON text, got "):
        converted({**row, key: str([USER, REPLY])})
    converted({**row, key: "[1] and ['role']"})


OBJECT = "expected an object with role and content, or with from and value, got "


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"messages": []}, "messages: expected a list of messages, got []"),
        ({"messages": "hi"}, "messages: expected a list of messages, got 'hi'"),
        (chat("hi"), f"messages[1]: {OBJECT}'hi'"),
        (chat({"content": "x"}), f"messages[1]: {OBJECT}{{'content': 'x'}}"),
        (chat(reply(role="asistant")), "messages[1]: unknown role 'asistant'; did you mean assistant"),
        (chat(reply(role={})), "messages[1]: unknown role {}; known roles are"),
        (chat({"role": "assistant"}), "messages[1].content: expected text, got None"),
        (chat(reply(tool_calls=[1])), "messages[1].tool_calls[0]: expected a function with name and arguments, got 1"),
        (chat(reply(tool_calls={"name": "f"})), "tool_calls: expected a list of calls, got {'name': 'f'}"),
        (chat(calling({"name": "f", "arguments": "{"})), "tool_calls[0].arguments: expected JSON text, got "),
        (chat(calling({"name": "f", "arguments": "[1]"})), "arguments: expected an object or its JSON text, got '[1]'"),
        (
            chat({**USER, "tool_calls": [CALL]}, REPLY),
            "[1]: only assistant messages can have tool calls, got",
        ),
        (chat(REPLY, tools={"f": 1}), "tools: expected a list of functions or its JSON text, got {'f': 1}"),
        (chat(REPLY, tools="f"), "tools: expected JSON text, got 'f' (Expecting value"),
        (chat(REPLY, tools=[{"f": 1}]), "tools[0]: expected a function with name and parameters, got {'f': 1}"),
        (chat(reply(weight=0.5)), "messages[1]: expected 0 or 1 for the weight of a message, got 0.5"),
        (chat(reply(train=0)), "messages[1]: expected true or false for train, got 0"),
        (chat(reply(train=True, weight=0)), "messages[1]: train and weight contradict"),
        (chat({**USER, "train": True}, REPLY), "messages[1]: only assistant messages can be trained"),
        (chat(reply(train=False)), "expected a trained assistant message with content, got none"),
        (chat(reply(reasoning_content=["hm"])), "messages[1].reasoning_content: expected text, got ['hm']"),
        (chat({**USER, "content": [{"type": "audio"}]}, REPLY), "[1].content[0]: only text and images are supported"),
        (chat(), "expected an assistant message with content, got none; to train on prompts without replies, use"),
        (chat(reply(content=" ")), "expected an assistant message with content"),
        ({"prompt": [USER, REPLY], "completion": [USER]}, "expected an assistant message with content"),
        ({"chosen": [USER, REPLY], "rejected": [USER, REPLY]}, "chosen and rejected are the same, so there is nothing"),
        ({"conversations": [{"from": "function_call", "value": "f()"}]}, "[0].value: expected JSON text, got 'f()'"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "[0].from: unknown sender 'alien'; use one of"),
        ({"conversations": [{"from": ["gpt"], "value": "a"}]}, "[0].from: unknown sender ['gpt']; use one of"),
        ({"conversations": [{"from": "gpt", "value": "a"}], "system": {}}, "system: expected text, got {}"),
        ({"prompt": "a", "completion": " \n"}, "completion is empty, so there is nothing to learn"),
        ({"prompt": "a", "completion": 42}, "completion: expected text, got 42"),
        ({"instruction": "a", "output": ""}, "completion is empty, so there is nothing to learn"),
        ({"instruction": "a", "output": "b", "input": 0}, "input: expected text, got 0"),
        ({"text": ""}, "text is empty, so there is nothing to learn"),
        ({"text": "\ud83d"}, "text contains half of a surrogate pair"),
        ({"text": ["x" * 99]}, "text: expected text, got ['" + "x" * 55 + "..."),
        (
            {"question": "a", "choices": {"text": ["b", "c"], "label": [1.5, None]}, "answer": 0},
            "choices: expected text or integers as labels, got 1.5",
        ),
    ],
)
def test_a_row_that_cannot_be_trained_on_is_refused_with_the_cause(fields, cause) -> None:
    with pytest.raises(DataError, match=re.escape(cause)):
        converted(fields)


@pytest.mark.parametrize(
    ("choices", "answer", "place"),
    [
        (["a", "b", "c"], 2, 2),
        (["a", "b", "c"], "2", 2),
        (["a", "b", "c"], "b", 1),
        (["a", "b", "c"], "C", 2),  # a letter
        (["x ", "y"], "y", 1),
        (["12", "13"], "13", 1),
        (["0", "1"], "1", 1),  # text and index agree
        ({"text": ["x", "y"], "label": ["1", "2"]}, "1", 0),
        ({"text": ["x", "y"], "label": ["1", "2"]}, 2, 1),
        ({"text": ["x", "y"], "label": ["A", "B"]}, "y", 1),
    ],
)
def test_an_answer_is_a_label_an_index_a_letter_or_the_text(choices, answer, place) -> None:
    found = converted({"question": "?", "choices": choices, "answer": answer})
    assert isinstance(found, Choices), found
    assert found.answer == place


@pytest.mark.parametrize(
    ("choices", "answer", "cause"),
    [
        (["a", "b"], 2, "answer 2 matches no choice; use an index from 0 to 1 as a number, a letter or the text"),
        (["a", "b"], -1, "answer -1 matches no choice"),
        (["a", "b"], True, "answer True matches no choice"),
        (["a", "b"], None, "answer None matches no choice"),
        (["a", "b"], [0], "answer [0] matches no choice"),
        (["1", "2"], "1", "answer '1' could be several choices; use an index from 0 to 1 as a number"),
        (["B", "A"], "A", "answer 'A' could be several choices"),
        ({"text": ["x", "y"], "label": ["A", "B"]}, "C", "use a label (A, B), a letter or the text of a choice"),
        ({"text": ["x", "y"], "label": ["A"]}, "A", "choices: expected one label per text"),
        (["a"], 0, "choices: expected a list of two or more texts, got ['a']"),
        ("a,b", 0, "choices: expected a list of two or more texts, got 'a,b'"),
        (["a", " "], 0, "choices[1] is empty"),
        (["a", None], 0, "choices[1]: expected text, got None"),
    ],
)
def test_an_unknown_or_ambiguous_answer_is_refused(choices, answer, cause) -> None:
    with pytest.raises(DataError, match=re.escape(cause)):
        converted({"question": "?", "choices": choices, "answer": answer})
