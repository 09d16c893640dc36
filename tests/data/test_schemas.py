"""Schemas are detected by their keys, and rows become samples."""

import json

import pytest

from tailora.data.readers import Row, RowProblem
from tailora.data.schemas import Choices, Conversation, Feedback, Pair, Text, convert_row, detect_schema
from tailora.errors import DataError

# ---- Detection


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
    problem = convert_row(Row("rows.csv", 1, fields), detect_schema([fields], task="preference"))
    assert "where true (a wanted completion) or false is needed" in problem.cause


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
        DataError, match=r"no question and no completion \(read as prompt/completion\); the row has text"
    ):
        mapping.values(row("text"))


def test_unknown_keys_are_listed_with_the_known_schemas_and_a_hint() -> None:
    with pytest.raises(DataError) as caught:
        detect_schema([row("Question", "id"), row("Answer")])
    text = str(caught.value)
    assert "the rows have the keys Answer, Question, id, which fit no known schema" in text
    assert "messages (messages); sharegpt (conversations); prompt/completion (prompt, completion)" in text
    assert "Perhaps: --field prompt=Question --field completion=Answer" in text
    assert text.count("choices (") == 1
    with pytest.raises(DataError, match="Perhaps: --field prompt=ctx --field choices=endings --field answer=label"):
        detect_schema([row("ctx", "endings", "label")])
    with pytest.raises(DataError, match="Perhaps: --field prompt=first --field completion=answer"):
        detect_schema([row("first", "answer")], {"prompt": "first"})


@pytest.mark.parametrize(
    ("task", "columns", "example"),
    [
        ("auto", ["x1", "x2"], "prompt=COLUMN --field completion=COLUMN"),
        ("seq2seq", ["x1", "answer"], "prompt=x1 --field completion=answer"),
        ("preference", ["better", "x"], "chosen=better --field rejected=x"),
        ("sequence-classification", ["body", "queue"], "text=body --field label=queue"),
        ("sequence-classification", ["text", "queue"], "label=queue"),
        ("sequence-classification", ["body", "id", "queue"], "text=body --field label=COLUMN"),
        ("regression", ["x1", "score"], "text=x1 --field label=score"),
        ("token-classification", ["words", "x"], "tokens=words --field tags=x"),
    ],
)
def test_keys_that_resemble_nothing_get_an_example_of_the_task(task: str, columns: list[str], example: str) -> None:
    with pytest.raises(DataError, match=f"Name the columns, for instance: --field {example}$"):
        detect_schema([row(*columns)], task=task)


def test_labels_are_not_needed_for_a_prediction() -> None:
    task = "sequence-classification"
    assert detect_schema([row("text")], task=task, has_labels=False).columns == {"text": "text"}
    with pytest.raises(DataError, match=r"Name the columns, for instance: --field text=x1$"):
        detect_schema([row("x1")], task=task, has_labels=False)
    with pytest.raises(DataError, match="text, label"):
        detect_schema([row("text")], task=task)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"promt": "question"}, r"no schema has the key 'promt'; did you mean prompt"),
        ({"prompt": "qestion"}, r"no column 'qestion'; did you mean question\?$"),
        ({"prompt": "text"}, "no column 'text'; there are answer, question$"),
        ({"zzz": "question"}, "no schema has the key 'zzz'; there are answer, "),
        ({"promt": "qestion"}, "2 problems"),
        ({"prompt": "question"}, r"which fit no known schema with --field prompt=question"),
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


@pytest.mark.parametrize(
    ("fields", "sample"),
    [
        ({"messages": [USER, REPLY]}, Conversation([USER, REPLY])),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
                    REPLY,
                ]
            },
            Conversation([USER, REPLY]),
        ),
        (
            {"messages": [USER, {**REPLY, "reasoning_content": "hm", "tool_calls": None}]},
            Conversation([USER, {**REPLY, "reasoning_content": "hm"}]),
        ),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}], "system": "be"},
            Conversation([{"role": "system", "content": "be"}, USER, REPLY]),
        ),
        ({"conversations": [USER, REPLY]}, Conversation([USER, REPLY])),
        (  # content may be null beside calls
            {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
            Conversation([USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}]),
        ),
        (  # without the object around the function, and with arguments that are an object or absent
            {
                "messages": [
                    USER,
                    {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": 1}}, {"name": "g"}]},
                ]
            },
            Conversation([USER, calling(called("f", {"a": 1}), called("g", {}))]),
        ),
        (  # OpenAI's older form
            {
                "messages": [
                    USER,
                    {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
                ]
            },
            Conversation([USER, calling(called("f", "{}"))]),
        ),
        (
            {"messages": [USER, calling(CALL), {"role": "function", "name": "f", "content": "1"}, REPLY]},
            Conversation([USER, calling(CALL), {"role": "tool", "name": "f", "content": "1"}, REPLY]),
        ),
        (
            {"messages": [USER, REPLY], "tools": [TOOL, {"name": "g", "parameters": {}}]},
            Conversation(
                [USER, REPLY], tools=[TOOL, {"type": "function", "function": {"name": "g", "parameters": {}}}]
            ),
        ),
        ({"messages": [USER, REPLY], "tools": json.dumps([TOOL])}, Conversation([USER, REPLY], tools=[TOOL])),
        ({"messages": [USER, REPLY], "tools": []}, Conversation([USER, REPLY])),
        ({"prompt": "hi", "completion": "hello", "tools": [TOOL]}, Conversation([USER, REPLY], first=1, tools=[TOOL])),
        (
            {
                "conversations": [
                    {"from": "human", "value": "hi"},
                    {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
                    {"from": "observation", "value": "1"},
                    {"from": "gpt", "value": "hello", "weight": 0},
                ],
                "tools": json.dumps([TOOL]),
            },
            Conversation(
                [USER, calling(called("f", {"a": 1})), {"role": "tool", "content": "1"}, REPLY],
                untrained=frozenset({3}),
                tools=[TOOL],
            ),
        ),
        (
            {"messages": [{**USER, "train": False}, {**REPLY, "train": False}, USER, {**REPLY, "weight": 1}]},
            Conversation([USER, REPLY, USER, REPLY], untrained=frozenset({0, 1})),
        ),
        (
            {"conversations": [{**USER, "id": 7}, {**REPLY, "thinking": "hm"}], "system": "be"},
            Conversation(
                [{"role": "system", "content": "be"}, {**USER, "id": 7}, {**REPLY, "reasoning_content": "hm"}]
            ),
        ),
        (
            {"conversations": [{"from": "user", "value": "hi"}, {"from": "assistant", "value": "hello"}]},
            Conversation([USER, REPLY]),
        ),
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
    assert not isinstance(converted(fields), RowProblem)


@pytest.mark.parametrize("key", ["chosen", "completion"])
def test_messages_in_another_notation_than_json_are_not_learned_as_text(key: str) -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c"} if key == "chosen" else {"prompt": "a", "completion": "b"}
    problem = converted({**row, key: str([USER, REPLY])})
    assert isinstance(problem, RowProblem)
    assert problem.cause.startswith(f"{key} is no JSON text: Expecting property name")
    assert not isinstance(converted({**row, key: "[1] and ['role']"}), RowProblem)


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"messages": []}, "messages is [] where a list of messages is needed"),
        ({"messages": "hi"}, "messages is 'hi' where a list of messages is needed"),
        ({"messages": ["hi"]}, "messages[0] is 'hi' where an object with role and content, or from"),
        (
            {"messages": [{"role": "asistant", "content": "x"}]},
            "messages[0]: role 'asistant' is unknown; did you mean assistant",
        ),
        ({"messages": [{"content": "x"}]}, "messages[0] is {'content': 'x'} where an object with role"),
        ({"messages": [USER, {"role": "assistant"}]}, "messages[1].content is None where text is needed"),
        (
            {"messages": [USER, {**REPLY, "tool_calls": [1]}]},
            "messages[1].tool_calls[0] is 1 where a function with name",
        ),
        (
            {"messages": [USER, {**REPLY, "tool_calls": {"name": "f"}}]},
            "tool_calls is {'name': 'f'} where a list of calls",
        ),
        (
            {"messages": [USER, calling({"name": "f", "arguments": "{"})]},
            "tool_calls[0].arguments is no JSON text: Expec",
        ),
        (
            {"messages": [USER, calling({"name": "f", "arguments": "[1]"})]},
            "arguments is '[1]' where an object, or its",
        ),
        ({"messages": [{**USER, "tool_calls": [CALL]}, REPLY]}, "messages[0]: only the assistant calls tools, and the"),
        (
            {"messages": [USER, {"role": "tool", "content": "1", "tool_calls": [CALL]}, REPLY]},
            "messages[1]: only the assistant calls tools, and the role is tool",
        ),
        (
            {"messages": [USER, REPLY], "tools": {"f": 1}},
            "tools is {'f': 1} where a list of functions, or its JSON text",
        ),
        ({"messages": [USER, REPLY], "tools": "f"}, "tools is no JSON text: Expecting value"),
        ({"messages": [USER, REPLY], "tools": [{"f": 1}]}, "tools[0] is {'f': 1} where a function with name"),
        ({"messages": [USER, {**REPLY, "weight": 0.5}]}, "messages[1]: weight is 0.5 where a message has 0 or 1"),
        ({"messages": [USER, {**REPLY, "train": 0}]}, "messages[1]: train is 0 where a message has true or false"),
        ({"messages": [USER, {**REPLY, "train": True, "weight": 0}]}, "messages[1]: train and weight contradict"),
        ({"messages": [{**USER, "train": True}, REPLY]}, "messages[0]: only replies of the assistant are trained"),
        ({"messages": [USER, {**REPLY, "train": False}]}, "no assistant message with content that is to be trained"),
        (
            {"messages": [USER, {**REPLY, "reasoning_content": ["hm"]}]},
            "messages[1].reasoning_content is ['hm'] where text",
        ),
        ({"conversations": [{"from": "function_call", "value": "f()"}]}, "conversations[0].value is no JSON text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, REPLY]},
            "only text parts can be learned from",
        ),
        ({"messages": [USER]}, "nothing to learn: no assistant message with content"),
        ({"chosen": [USER, REPLY], "rejected": [USER, REPLY]}, "nothing to learn: chosen and rejected are the same"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "nothing to learn: no assistant message"),
        ({"prompt": [USER, REPLY], "completion": [USER]}, "nothing to learn: no assistant message"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "conversations[0]: from 'alien' is unknown; values are"),
        (
            {"conversations": [{"value": "x"}]},
            "conversations[0] is {'value': 'x'} where an object with role and content, or",
        ),
        ({"prompt": "a", "completion": " \n"}, "nothing to learn: the completion is empty"),
        ({"prompt": "a", "completion": 42}, "completion is 42 where text is needed"),
        ({"instruction": "a", "output": ""}, "nothing to learn: the completion is empty"),
        ({"text": ""}, "nothing to learn: the text is empty"),
        ({"text": "\ud83d"}, "text holds half of a surrogate pair"),
        ({"conversations": [{"from": ["gpt"], "value": "a"}]}, "conversations[0]: from ['gpt'] is unknown; values are"),
        ({"conversations": [{"from": "gpt", "value": "a"}], "system": {}}, "system is {} where text is needed"),
        ({"instruction": "a", "output": "b", "input": 0}, "input is 0 where text is needed"),
        ({"messages": [{"role": {}, "content": "a"}]}, "messages[0]: role {} is unknown; roles are"),
        (
            {"question": "a", "choices": {"text": ["b", "c"], "label": [1.5, None]}, "answer": 0},
            "choices has the label 1.5 where text or a whole number is needed",
        ),
        ({"text": ["x" * 99]}, "text is ['" + "x" * 55 + "... where text is needed"),
    ],
)
def test_a_row_that_cannot_be_trained_on_is_reported_with_file_and_number(fields, cause) -> None:
    problem = converted(fields)
    assert isinstance(problem, RowProblem)
    assert (problem.file, problem.number) == ("rows.jsonl", 7)
    assert cause in problem.cause


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
        (["a", "b"], 2, "answer 2 is none of the choices; write an index from 0 to 1, a letter or the text"),
        (["a", "b"], -1, "answer -1 is none of the choices"),
        (["a", "b"], True, "answer True is none of the choices"),
        (["a", "b"], None, "answer None is none of the choices"),
        (["a", "b"], [0], "answer [0] is none of the choices"),
        (["1", "2"], "1", "answer '1' is an index and the text of different choices; write the index, from 0, as"),
        (["B", "A"], "A", "answer 'A' is the letter and the text of different choices"),
        ({"text": ["x", "y"], "label": ["A", "B"]}, "C", "write a label (A, B) or the text of a choice"),
        ({"text": ["x", "y"], "label": ["A"]}, "A", "choices has not one label for every text"),
        (["a"], 0, "choices is ['a'] where a list of two or more texts is needed"),
        ("a,b", 0, "choices is 'a,b' where a list"),
        (["a", " "], 0, "choices[1] is empty"),
        (["a", None], 0, "choices[1] is None where text is needed"),
    ],
)
def test_an_unknown_or_ambiguous_answer_is_refused(choices, answer, cause) -> None:
    found = converted({"question": "?", "choices": choices, "answer": answer})
    assert isinstance(found, RowProblem), found
    assert cause in found.cause
