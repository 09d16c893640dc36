"""Whatever a file of data or a chat template holds, it can be learned from or is refused with a TailoraError.

Any other exception fails, and so do more than 20 s or too much memory for one input (tests/limits.py).
"""

import csv
import io
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from limits import limited
from tiny import CHATML, chat_tokenizer
from transformers import PreTrainedTokenizerFast

from tailora.data.chat_template import DataSettings
from tailora.data.labels import LABEL_TASKS, read_labels
from tailora.data.messages import SHAREGPT_ROLES
from tailora.data.prepare import prepare
from tailora.data.schemas import KNOWN_KEYS
from tailora.errors import DataError, TailoraError

# ---- JSON values, and right rows of every schema

SETTINGS = DataSettings(max_length=16, validation_split=0)
Path_ = tuple[str | int, ...]
OTHER_KEYS = ["role", "content", "from", "value", "label", "weight", "train", "tool_calls", "function", "arguments"]
KEYS = st.sampled_from([*KNOWN_KEYS, *OTHER_KEYS, "id", "é"])
TEXTS = st.text(max_size=8) | st.sampled_from(
    ["\ud800", "\0", "<|im_end|>", "\ufeff", " ", "A", "0", "assistant", "gpt"]
)
ANY_TEXTS = TEXTS | st.text(st.characters(exclude_categories=[]), max_size=5)
SCALARS = st.none() | st.booleans() | st.integers() | st.just(10**300) | st.floats() | ANY_TEXTS
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS | ANY_TEXTS, inner, max_size=4),
    max_leaves=8,
)
CHAT = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant", "content": "b"}]
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
WITH_CALLS = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": None, "tool_calls": [CALL, {"name": "f", "arguments": {}}], "train": False},
    {"role": "tool", "tool_call_id": "1", "name": "f", "content": "b"},
    {"role": "assistant", "content": "c", "thinking": "d", "weight": 1},
]
TOOLS = (  # a template that writes all of it
    "{{ tools | tojson }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.thinking }}{{ m.content }}"
    "{{ m.tool_calls | tojson if m.tool_calls }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RIGHT_ROWS: list[dict[str, Any]] = [
    {"messages": WITH_CALLS, "tools": [TOOL], "weight": 2.5},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": json.dumps(CALL)}]},
    {"messages": CHAT},
    {"messages": PARTS},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "c"}]},
    {
        "conversations": [{"from": sender, "value": "a"} for sender in SHAREGPT_ROLES if sender != "function_call"],
        "system": "s",
    },
    {"prompt": "a", "completion": "b"},
    {"prompt": CHAT[:2], "completion": CHAT[2:]},
    {"instruction": "a", "input": "c", "output": "b"},
    {"prompt": "a", "choices": ["b", "c"], "answer": "A"},
    {"question": "a", "choices": {"text": ["b", "c"], "label": ["1", "2"]}, "answer": "2"},
    {"question": CHAT[:2], "choices": ["b", 3], "label": 1},
    {"text": "a b c"},
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"chosen": CHAT, "rejected": CHAT},
]


def paths_in(value: Any) -> Iterator[Path_]:
    """The paths of all values in a JSON value."""
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (key,)
        yield from ((key, *path) for path in paths_in(inner))


def replaced(value: Any, path: Path_, change: Callable[[Any, Any], None]) -> Any:
    copy = json.loads(json.dumps(value))
    parent = copy
    for key in path[:-1]:
        parent = parent[key]
    change(parent, path[-1])
    return copy


@st.composite
def mutated_rows(draw: st.DrawFn) -> Any:
    """A right row, with one or two values replaced, deleted or added."""
    row = draw(st.sampled_from(RIGHT_ROWS))
    for _ in range(draw(st.integers(1, 2))):
        if not (paths := list(paths_in(row))):
            break
        new, kind = draw(JSON), draw(st.sampled_from(["replace", "replace", "delete", "add"]))

        def change(parent: Any, key: Any, new: Any = new, kind: str = kind) -> None:
            if kind == "delete":
                del parent[key]
            elif kind == "add" and isinstance(parent, dict):
                parent[draw(KEYS)] = new
            else:
                parent[key] = new

        row = replaced(row, draw(st.sampled_from(paths)), change)
    return row


# ---- The property


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@cache
def tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    made = chat_tokenizer(["hello how are you", "user assistant"], eos_token="<|im_end|>")
    made.chat_template = template
    return made


def check(path: Path, content: bytes, template: str | None = CHATML) -> str:
    """Returns the reason if the data is refused, else "". It fails for other errors, and if the file is not named."""
    path.write_bytes(content)
    of, reason = tokenizer(template), ""
    with limited():
        try:
            prepare(str(path), of, SETTINGS)
        except DataError as error:
            reason = str(error)
    assert not reason or str(path) in reason
    assert len(reason) < 10_000
    return reason


def jsonl(*rows: Any) -> bytes:
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


@pytest.mark.slow
@pytest.mark.parametrize("template", [None, CHATML, TOOLS])
@given(row=mutated_rows(), others=st.lists(st.sampled_from(RIGHT_ROWS), max_size=2))
@example(row={"conversations": [{"from": ["gpt"], "value": "a"}]}, others=[])
@example(row={"conversations": [{"from": {}, "value": "a"}]}, others=[])
@example(row={"messages": [{"role": [[[]]], "content": "a"}]}, others=[])
@example(row={"question": "a", "choices": {"text": ["b", "c"], "label": [[], {}]}, "answer": 0}, others=[])
def test_mutated_rows(folder: Path, template: str | None, row: Any, others: list[Any]) -> None:
    check(folder / "rows.jsonl", jsonl(row, *others), template)


def test_the_rows_with_calls_are_right(folder: Path) -> None:
    for row in RIGHT_ROWS[:2]:
        assert "truncation to max_length 16 removes" in check(
            folder / "rows.jsonl", jsonl(row), TOOLS
        )  # not their form


@pytest.mark.slow
@given(values=st.lists(JSON, min_size=1, max_size=3))
def test_any_json(folder: Path, values: list[Any]) -> None:
    check(folder / "rows.jsonl", jsonl(*values))
    check(folder / "rows.json", json.dumps(values).encode())


@pytest.mark.slow
@given(content=st.binary(max_size=60), row=st.sampled_from(RIGHT_ROWS), at=st.integers(0, 100))
def test_any_bytes_in_a_file_of_json(folder: Path, content: bytes, row: Any, at: int) -> None:
    right = jsonl(row)
    for name in ("rows.jsonl", "rows.json"):
        check(folder / name, content)
        check(folder / name, right[:at] + content + right[at:])


@pytest.mark.slow
@given(
    content=st.binary(max_size=60),
    rows=st.lists(st.lists(TEXTS.filter(lambda text: text != "\ud800"), min_size=2, max_size=3), max_size=3),
    delimiter=st.sampled_from(",;\t|"),
    at=st.integers(0, 100),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "cp1252"]),
)
def test_any_bytes_in_a_table(
    folder: Path, content: bytes, rows: list[list[str]], delimiter: str, at: int, encoding: str
) -> None:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows([["prompt", "completion"], *rows])
    right = text.getvalue().encode(encoding, errors="ignore")
    for name in ("rows.csv", "rows.tsv"):
        check(folder / name, content)
        check(folder / name, right)
        check(folder / name, right[:at] + content + right[at:])


LABELS_OF_ROWS = (
    SCALARS | st.sampled_from(["--5", "-", "[", '["x"]', "[]", "1e400", " A", "O"]) | st.lists(SCALARS, max_size=2)
)


@given(labels=st.lists(LABELS_OF_ROWS, min_size=2, max_size=5), task=st.sampled_from(LABEL_TASKS))
@example(labels=["--5", 10**400, "4"], task="sequence-classification")
@example(labels=["\ud800", "b"], task="sequence-classification")
@example(labels=[1e308, -1e308], task="regression")
def test_any_labels(folder: Path, labels: list[Any], task: str) -> None:
    """What is accepted can be saved, and trained on in float32."""
    path = folder / "labels.jsonl"
    keys = ("tokens", "tags") if task == "token-classification" else ("text", "label")
    rows = [
        ({keys[0]: ["a"], keys[1]: [label]} if "tokens" in keys else {keys[0]: "a", keys[1]: label}) for label in labels
    ]
    path.write_bytes(jsonl(*rows))
    with limited(), suppress(DataError):
        names = read_labels([str(path)], None, task)
        json.dumps(names.to_dict(), ensure_ascii=False).encode()
        data = prepare(str(path), tokenizer(None), replace(SETTINGS, labels=names, task=task))
        if data.train.targets is not None:
            assert np.isfinite(np.square(data.train.targets, dtype=np.float32)).all()
        assert sum(data.report.labels.values()) >= (
            len(rows) if names.problem_type == "single_label_classification" else 0
        )


@pytest.mark.parametrize("depth", [100, 500, 900, 990, 1100, 100_000])
@pytest.mark.parametrize("start", ["[", '{"a":', '{"messages":[', '{"text":'])
def test_deep_values(folder: Path, depth: int, start: str) -> None:
    end = {"[": "]", '{"a":': "}", '{"messages":[': "]}", '{"text":': "}"}[start]
    deep = start * depth + "1" + end * depth
    for row in (deep, f'{{"text": {deep}}}', f'{{"messages": {deep}}}', f'{{"conversations": [{deep}]}}'):
        assert check(folder / "rows.jsonl", row.encode())
        check(folder / "rows.json", row.encode())


# ---- Chat templates

PIECES = [
    *("{% for m in messages %}", "{% endfor %}", "{% if add_generation_prompt %}", "{% if loop.last %}", "{% endif %}"),
    *("{% generation %}", "{% endgeneration %}", "{{ m.content }}", "{{ m['role'] }}", "{{ m.content[0] }}"),
    *("a", " ", "\n", "<|im_start|>", "<|im_end|>", "{{ eos_token }}", "{{ messages[0].content }}", "{%", "}}"),
    *("{{ messages[9].content.x }}", "{{ 1 / 0 }}", "{{ m.content + 1 }}", "{{ raise_exception('no') }}"),
    *("{{ m.none.none }}", "{{ {}['a'] }}", "{{ '' * m }}", "{{ m.content | upper }}", "{{ m | tojson }}"),
    *("{{ m.content.index('x') }}", "{{ range(10**7) | list }}", "{{ 10 ** 400 * 1.5 }}", "{{ [] | first }}"),
    *("{{ [].pop() }}", "{{ ''.format_map(3) }}", "{{ messages.append(1) }}", "{% include 'x' %}"),
    *("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ m.update({}) }}", "{{ '\ud800' }}"),
]


@given(
    pieces=st.lists(st.sampled_from(PIECES), max_size=8),
    in_loop=st.booleans(),
    row=st.sampled_from([row for row in RIGHT_ROWS if "text" not in row]),
)
def test_any_chat_template(folder: Path, pieces: list[str], in_loop: bool, row: dict[str, Any]) -> None:
    middle = "".join(pieces)
    template = f"{{% for m in messages %}}{middle}{{% endfor %}}" if in_loop else middle
    made = tokenizer.__wrapped__(None)
    made.chat_template = template
    path = folder / "rows.jsonl"
    path.write_bytes(jsonl(row))
    with limited(), suppress(TailoraError):
        prepare(str(path), made, SETTINGS)


@pytest.mark.parametrize("piece", PIECES)
@pytest.mark.parametrize("form", ["%s", "{%% for m in messages %%}%s{{ m.content }}{%% endfor %%}"])
def test_every_piece_of_a_chat_template(folder: Path, piece: str, form: str) -> None:
    test_any_chat_template.hypothesis.inner_test(folder, [form % piece], False, RIGHT_ROWS[0])  # type: ignore[attr-defined]
