import json
from datetime import datetime
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_rows import PAIRS, chat_row, prepare, stream, texts_of

from tailora.data import row_checks
from tailora.data.chat_template import ChatTokenizer, DataSettings
from tailora.data.dataset import IGNORED, Examples, warnings_of
from tailora.data.labels import Labels
from tailora.data.prepare import PreparedData, check_vocabulary, read_eval_data
from tailora.data.readers import Source
from tailora.data.row_checks import RowCounts, sample_hash
from tailora.data.samples import Conversation, Pair, Text
from tailora.data.schemas import SEQUENCE_CLASSIFICATION
from tailora.errors import DataError


def test_a_part_is_held_out_and_all_is_reported(bytes_tokenizer, jsonl) -> None:
    tokenizer = bytes_tokenizer()
    path = jsonl([{**row, "id": 1} for row in PAIRS])
    prepared = prepare(path, tokenizer, validation_split=0.1)
    report = prepared.report
    assert (len(prepared.train), len(prepared.eval)) == (report.train, report.eval) == (36, 4)
    assert (report.shape, report.mapping) == ("prompt/completion", {"prompt": "prompt", "completion": "completion"})
    assert (report.rows, report.ignored, report.source, report.chat_template) == (40, ["id"], path, False)
    assert report.tokens == len(prepared.train.input_ids) + len(prepared.eval.input_ids)
    assert report.supervised_tokens == prepared.train.supervised.sum() + prepared.eval.supervised.sum()
    assert report.longest == max(prepared.train.lengths.max(), prepared.eval.lengths.max())
    assert sum(each["examples"] for each in report.lengths) == 40
    assert json.loads(json.dumps(report.to_dict()))["supervised_share"] == report.supervised_tokens / report.tokens


REPLIES = [{"chosen": chat_row("a", text)["messages"], "rejected": chat_row("a", "no")["messages"]} for text in "bcde"]


@pytest.mark.parametrize(
    "rows", [PAIRS, [chat_row("hi", str(i)) for i in range(8)], REPLIES], ids=["pair", "chat", "dpo"]
)
def test_rows_of_training_are_known_again_in_an_evaluation(
    rows: Any, bytes_tokenizer, chatml, jsonl, tmp_path: Path
) -> None:
    """Also in the held-out part of a folder, cut at another length."""
    tokenizer = bytes_tokenizer(chatml)
    prepared = prepare(jsonl(rows), tokenizer, validation_split=0.25)
    assert len(prepared.trained_rows) == len(prepared.train)
    other = tmp_path / "other"
    other.mkdir()
    (other / "validation.json").write_text(json.dumps([{**row, "id": 7} for row in rows[::-1]]))
    (other / "train.json").write_text('[{"text": "not evaluated"}]')
    settings = DataSettings(max_length=60, for_evaluation=True)
    for trained_rows, number in ((prepared.trained_rows, len(prepared.train)), ([], 0), (None, None)):
        report, _ = read_eval_data(str(other), ChatTokenizer.of(tokenizer, settings), trained_rows=trained_rows)
        assert report.trained_on == number


def test_a_single_text_is_known_again_although_it_is_split(bytes_tokenizer, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("word " * 100)
    prepared = prepare(str(tmp_path / "text.txt"), bytes_tokenizer(), max_length=50)
    assert len(prepared.trained_rows) == 1


def test_dates_in_messages_are_hashed() -> None:
    """They come from Parquet files."""
    first, second = (Conversation(({"role": "user", "content": "a", "at": datetime(2026, 1, n)},)) for n in (1, 2))
    assert sample_hash(first) != sample_hash(second)


def test_the_same_data_and_seed_give_the_same_hash_and_split(bytes_tokenizer, jsonl) -> None:
    path, tokenizer = jsonl(PAIRS), bytes_tokenizer()
    first, again, other = (prepare(path, tokenizer, seed=seed) for seed in (0, 0, 1))
    assert first.report == again.report
    assert np.array_equal(first.eval.source_indices, again.eval.source_indices)
    assert first.report.sha256 != other.report.sha256


def test_copies_stay_on_one_side_and_are_counted(bytes_tokenizer, jsonl) -> None:
    prepared = prepare(jsonl(PAIRS[:5] * 4), bytes_tokenizer(), validation_split=0.2)
    report = prepared.report
    assert (report.flagged["repeated"], report.flagged["eval_copies"], report.flagged["duplicates"]) == (12, 3, 0)
    assert warnings_of(report.to_dict())["repeated"].startswith("12 training rows are copies of earlier ones: rows")
    copies = [place.rpartition(":")[2] for place in report.rows_of["repeated"] + report.rows_of["eval_copies"]]
    assert sorted(map(int, copies)) == list(range(6, 21))
    assert not set(prepared.train.hashes()) & set(prepared.eval.hashes())


def test_copies_among_the_held_out_examples_are_evaluated_once(bytes_tokenizer, jsonl) -> None:
    held = jsonl([PAIRS[0], PAIRS[1], PAIRS[0], PAIRS[0], PAIRS[2], PAIRS[1], PAIRS[0]], "held.jsonl")
    prepared = prepare(jsonl(PAIRS[3:]), bytes_tokenizer(), eval_source=held)
    assert (prepared.report.eval, prepared.report.flagged["eval_copies"]) == (3, 4)
    assert prepared.eval.source_indices.tolist() == [0, 1, 4]
    assert prepared.eval_samples == [Pair(**row) for row in PAIRS[:3]]
    assert warnings_of(prepared.report.to_dict())["copies"].startswith(
        "4 held-out rows are duplicates and are evaluated"
    )


def test_a_split_that_fails_names_the_rows_that_were_too_long(bytes_tokenizer, jsonl) -> None:
    rows = [PAIRS[0], *({"prompt": f"hello {number} " * 40, "completion": "you"} for number in range(5))]
    with pytest.raises(DataError, match=r"^need two distinct examples .*, got 1 example \(5 longer rows were skipped"):
        prepare(jsonl(rows), bytes_tokenizer(), max_length=16)


def test_a_separate_eval_source_is_used_whole_and_leaks_are_counted(bytes_tokenizer, jsonl) -> None:
    held = jsonl([*PAIRS[:2], {"prompt": "new", "completion": "one"}], "held.jsonl")
    prepared = prepare(jsonl(PAIRS), bytes_tokenizer(), eval_source=held)
    assert (prepared.report.train, prepared.report.eval, prepared.report.flagged["duplicates"]) == (40, 3, 2)
    assert prepared.report.rows_of["duplicates"] == [f"{held}:1", f"{held}:2"]
    assert prepared.eval_samples[-1] == Pair("new", "one")
    assert prepared.report.eval_source == held


def test_a_folder_gives_both_its_splits(bytes_tokenizer, jsonl, tmp_path: Path) -> None:
    jsonl(PAIRS[:3], "train.jsonl")
    jsonl(PAIRS[3:5], "valid.jsonl")
    prepared = prepare(str(tmp_path), bytes_tokenizer(), eval_source=str(tmp_path))
    assert (prepared.report.train, prepared.report.eval) == (3, 2)


def test_columns_can_be_mapped(bytes_tokenizer, jsonl) -> None:
    rows = [{"question": row["prompt"], "answer": row["completion"]} for row in PAIRS]
    mapping = {"prompt": "question", "completion": "answer"}
    prepared = prepare(jsonl(rows), bytes_tokenizer(), field=mapping)
    assert prepared.report.mapping == mapping
    assert prepared.report.sha256 == prepare(jsonl(PAIRS), bytes_tokenizer()).report.sha256


def test_truncation_is_counted_and_examples_without_trained_tokens_are_dropped(
    bytes_tokenizer, jsonl, tmp_path: Path
) -> None:
    rows = [
        {"prompt": "hello", "completion": " you"},
        {"prompt": "hello", "completion": " you" * 40},
        {"prompt": "hello " * 40, "completion": " you"},
    ]
    prepared = prepare(jsonl(rows), bytes_tokenizer(), max_length=16, validation_split=0)
    assert (prepared.report.flagged["truncated"], prepared.report.flagged["cut_away"]) == (2, 1)
    path = tmp_path / "rows.jsonl"
    assert prepared.report.rows_of == {"truncated": [f"{path}:2", f"{path}:3"], "cut_away": [f"{path}:3"]}
    assert warnings_of(prepared.report.to_dict())["truncated"].endswith("than --max-length: rows.jsonl:2, rows.jsonl:3")
    assert (len(prepared.eval), prepared.eval_samples) == (0, [])
    assert prepared.train.source_indices.tolist() == [0, 1]
    assert prepared.train.lengths.max() == 16 < prepared.report.longest


LAST_LOWER = (  # a template that rewrites all messages but the last
    "{% for m in messages %}<|im_start|>{{ m.content if loop.last else m.content | upper }}<|im_end|>{% endfor %}"
)


def test_a_conversation_that_needs_several_examples_is_reported_and_stays_on_one_side(bytes_tokenizer, jsonl) -> None:
    rows = [chat_row(f"A{n}", f"b{n}", f"C{n}", f"d{n}") for n in range(5)] + [chat_row("X", "y")] * 2
    path, tokenizer = jsonl(rows), bytes_tokenizer(LAST_LOWER)
    for seed in range(5):
        prepared = prepare(path, tokenizer, validation_split=0.4, seed=seed)
        report = prepared.report
        assert (report.rows, report.train + report.eval + report.flagged["eval_copies"]) == (7, 12)
        assert prepared.report.eval > 2
        assert not set(prepared.train.source_indices) & set(prepared.eval.source_indices)
        for sample, example in zip(prepared.eval_samples, prepared.eval, strict=True):
            assert tokenizer.decode(example.input_ids).endswith(f"{sample.messages[-1]['content']}<|im_end|>")
    report = prepared.report.to_dict()
    assert (report["split_rows"], report["split_examples"]) == (5, 10)
    assert warnings_of(report)["split"].startswith("5 conversations became 10 examples, because the template")
    counts = RowCounts()
    for _ in range(2):
        assert len(list(stream(path, tokenizer, counts))) == 12
        assert (counts.rows, counts.flagged.numbers["split_rows"], counts.split_examples) == (7, 5, 10)


def test_a_compared_reply_of_several_messages_is_not_divided(bytes_tokenizer, jsonl) -> None:
    sides = {name: chat_row("A", f"{name} 1", "C", f"{name} 2")["messages"] for name in ("chosen", "rejected")}
    with pytest.raises(DataError, match=r'only one message of a compared reply .* mark the others with "train": false'):
        prepare(jsonl([sides]), bytes_tokenizer(LAST_LOWER), validation_split=0)


def with_system(system: str, row: dict[str, list[dict[str, str]]], key: str = "messages") -> dict[str, Any]:
    return {key: [{"role": "system", "content": system}, *row["messages"]]}


def test_the_system_message_of_most_rows_is_reported(bytes_tokenizer, jsonl, chatml) -> None:
    def system_of(*systems: str, **settings: Any) -> str | None:
        rows = [chat_row(f"hello {number}", " you") for number in range(len(systems))]
        path = jsonl([with_system(text, row) if text else row for text, row in zip(systems, rows, strict=True)])
        tokenizer, counts = bytes_tokenizer(chatml), RowCounts()
        list(stream(path, tokenizer, counts, **settings))
        system = prepare(path, tokenizer, validation_split=0, **settings).report.system
        assert counts.system == system
        return system

    assert system_of("A", "A", "B") == "A"
    assert system_of("A", "A", "", "B") is None  # half of them are not most
    assert system_of("A", "", "") is None
    assert system_of("A", "", "", system="C") == "C"
    assert prepare(jsonl(PAIRS), bytes_tokenizer(), validation_split=0).report.system is None


def test_the_system_message_of_preferences_is_reported(bytes_tokenizer, jsonl, chatml) -> None:
    prompt = with_system("A", chat_row("hello"), "prompt")
    good, bad = ([{"role": "assistant", "content": text}] for text in (" you", " me"))
    replies = [{**prompt, "chosen": good, "rejected": bad}]
    judged = [{**prompt, "completion": text, "label": text is good} for text in (good, bad)]
    for rows in (replies, judged):
        assert prepare(jsonl(rows), bytes_tokenizer(chatml), validation_split=0).report.system == "A"


def test_many_different_system_messages_do_not_fill_the_memory(
    bytes_tokenizer, jsonl, chatml, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_checks, "MOST_SYSTEMS", 3)
    texts = ["A", *map(str, range(6)), *["A"] * 8]
    rows = [with_system(text, chat_row(f"hello {number}", " you")) for number, text in enumerate(texts)]
    counts = RowCounts()
    list(stream(jsonl(rows), bytes_tokenizer(chatml), counts))
    assert counts.system == "A"
    assert len(counts.systems) <= 4


def test_tools_that_become_text_are_reported(bytes_tokenizer, jsonl, chatml) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    rows = [{**chat_row("A", "b"), "tools": [tool]}, chat_row("X", "y")]
    report = prepare(jsonl(rows), bytes_tokenizer(chatml), validation_split=0).report
    assert report.flagged["tools_as_text"] == 1
    assert "the tools are written as text" in warnings_of(report.to_dict())["tools"]


LABELS = Labels(SEQUENCE_CLASSIFICATION, ("x", "y"))


@pytest.mark.parametrize("seed", range(5, 10))
def test_a_part_of_every_class_is_held_out(seed: int, bytes_tokenizer, jsonl) -> None:
    path = jsonl([{"text": f"text {number}", "label": "y" if number % 4 else "x"} for number in range(40)])
    report = prepare(path, bytes_tokenizer(), validation_split=0.2, seed=seed, task=LABELS.task, labels=LABELS).report
    assert (report.labels, report.eval_labels) == ({"x": 8, "y": 24}, {"x": 2, "y": 6})


@pytest.mark.parametrize(
    ("keys", "labels", "is_rendered"),
    [
        ({"text": "a{} text of words"}, None, False),
        ({"text": "a{} text of words"}, LABELS, False),
        ({"messages": [{"role": "user", "content": "a{}"}]}, LABELS, True),
        ({"prompt": "a{}", "completion": "b"}, None, True),
    ],
    ids=["texts", "labels of texts", "labels of chats", "pairs"],
)
def test_the_report_says_whether_a_chat_template_renders_the_rows(
    keys: dict[str, Any], labels: Labels | None, is_rendered: bool, bytes_tokenizer, jsonl
) -> None:
    rows = [json.loads(json.dumps({**keys, "label": name}).replace("{}", name)) for name in "xy"]
    tokenizer = bytes_tokenizer("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}")
    task = {} if labels is None else {"task": labels.task, "labels": labels}
    assert prepare(jsonl(rows), tokenizer, validation_split=0, **task).report.chat_template == is_rendered


def read_stream(*args: Any, streaming: bool = True, **options: Any) -> None:
    assert streaming
    list(stream(*args, **options))


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("", {}, r"rows.jsonl: expected at least one row, got none"),
        ("", {"streaming": True}, r"rows.jsonl: expected at least one row"),
        ("\n\n", {}, r"rows.jsonl: expected at least one row"),
        (
            "nonsense\n[]\n",
            {},
            r"2 problems:\n  - .*rows.jsonl:1: not JSON.*\n  - .*rows.jsonl:2: expected a JSON object",
        ),
        ('{"x": 1}', {}, r"the keys of the rows \(x\) match no known schema"),
        ('{"text": "a b"}\nnonsense\n', {}, r"^.*rows.jsonl:2: not JSON: Expecting value at column 1$"),
        ('{"text": "a b"}\n{"text": ""}\n', {}, r"rows.jsonl:2: text is empty, so there is nothing to learn"),
        ('{"text": "a b"}\n{"txt": ""}\n', {}, r"rows.jsonl:2: missing text \(schema text\); the row has txt"),
        ('{"text": "a b"}', {"field": {"text": "txt"}}, r"no column 'txt'; did you mean text\?"),
        (json.dumps(chat_row("a", "b")), {}, r"rows.jsonl:1: messages need a chat template"),
        ('{"text": "one two three"}', {"max_length": 1}, r"max_length 1 removes all .*longest row has \d+ tokens"),
        ('{"text": "one two three"}', {"max_length": 1, "streaming": True}, "max_length 1 removes all trained tokens"),
    ],
)
def test_unusable_data_is_refused_with_the_reason(bytes_tokenizer, tmp_path: Path, content, options, message) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    read = read_stream if "streaming" in options else prepare
    with pytest.raises(DataError, match=message):
        read(str(path), bytes_tokenizer(), **options)


def test_every_problem_of_every_kind_is_named_at_once(bytes_tokenizer, tmp_path: Path, chatml) -> None:
    template = "{% if messages | length > 2 %}{{ raise_exception('too long') }}{% endif %}" + chatml
    rows = [json.dumps(chat_row(*contents)) for contents in (("a", "b"), ("a",), ("a", "b", "c", "d"))]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([rows[0], "nonsense", *rows[1:], *["more nonsense"] * 30]))
    with pytest.raises(DataError) as caught:
        prepare(str(path), bytes_tokenizer(template))
    text = str(caught.value)
    assert text.startswith("33 problems:")
    assert f"{path}:2: not JSON" in text
    assert f"{path}:3: expected an assistant message" in text
    assert f"{path}:4: the chat template rejects this conversation: too long" in text
    assert text.endswith("and 13 more")


def test_bad_rows_are_skipped_on_request_and_kept_with_their_reasons(bytes_tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"prompt": "a", "completion": "b"}\nnonsense\n{"prompt": "c"}\n{"prompt": "d", "completion": "e"}\n'
    )
    with pytest.raises(DataError, match="2 problems"):
        prepare(str(path), bytes_tokenizer(), validation_split=0)
    prepared = prepare(str(path), bytes_tokenizer(), validation_split=0, skip_bad_rows=True)
    assert prepared.train.source_indices.tolist() == [0, 3]
    assert prepared.report.rows == 2
    assert [(problem.number, problem.content) for problem in prepared.skipped] == [
        (2, "nonsense\n"),
        (3, {"prompt": "c"}),
    ]
    assert prepared.skipped[0].cause.startswith("not JSON")
    assert warnings_of(prepared.report.to_dict())["skipped"] == "2 rows cannot be used: rows.jsonl:2, rows.jsonl:3"
    path.write_text("nonsense\n")
    with pytest.raises(DataError, match=r"rows.jsonl:1: not JSON"):
        prepare(str(path), bytes_tokenizer(), skip_bad_rows=True)
    path.write_text('{"text": "a b c"}\n{"text": "d e f"}\n')  # a file that can be used does not excuse one that cannot
    (tmp_path / "more.csv").write_text("text,text\na,b\n")
    with pytest.raises(DataError, match="duplicate columns text in the header"):
        prepare(str(tmp_path), bytes_tokenizer(), skip_bad_rows=True)


SUSPICIOUS = ("empty_question", "no_prompt", "missing_answer", "similar_labels", "imbalance", "two_labels")


def suspicious(prepared: PreparedData) -> dict[str, list[str]]:
    rows_of = prepared.report.rows_of
    return {name: [place.rpartition(":")[2] for place in rows_of[name]] for name in SUSPICIOUS if name in rows_of}


def test_rows_that_look_like_mistakes_are_named(bytes_tokenizer, jsonl, chatml) -> None:
    start = {"role": "assistant", "content": "welcome"}
    rows = [
        chat_row("a", "b"),
        chat_row(" ", "b"),
        {"messages": [start, *chat_row("c", "d")["messages"]]},
        chat_row("e", "N/A "),
        {"messages": [{"role": "system", "content": "s"}, *chat_row("f", "g", "\n", "NaN")["messages"]]},
        {"messages": [{**start, "train": False}, *chat_row("h", "i")["messages"]]},
    ]
    prepared = prepare(jsonl(rows), bytes_tokenizer(chatml), validation_split=0.3)
    assert suspicious(prepared) == {"empty_question": ["2", "5"], "no_prompt": ["3"], "missing_answer": ["4", "5"]}
    shown = warnings_of(prepared.report.to_dict())
    assert shown["no question"] == "2 rows have an empty question: rows.jsonl:2, rows.jsonl:5"
    pairs = [{"prompt": "", "completion": "nan"}, {"prompt": "a", "completion": "nanny"}]
    assert suspicious(prepare(jsonl(pairs), bytes_tokenizer(), validation_split=0)) == {
        "empty_question": ["1"],
        "missing_answer": ["1"],
    }


def test_labels_that_look_like_mistakes_are_named(bytes_tokenizer, jsonl) -> None:
    labels = ["spam"] * 39 + ["Spam ", "ham", "ham", "egg"]
    rows = [{"text": f"text {number}", "label": label} for number, label in enumerate(labels)]
    rows += [{"text": "text 0", "label": "ham"}, {"text": "text 1", "label": "spam"}]
    rows += [{"text": "last", "label": "bean"}] * 2  # 20 times rarer than spam, and no more
    names = Labels(SEQUENCE_CLASSIFICATION, ("Spam ", "bean", "egg", "ham", "spam"))
    found = suspicious(prepare(jsonl(rows), bytes_tokenizer(), validation_split=0, labels=names))
    assert found == {
        "similar_labels": ["40 ('Spam ')"],
        "imbalance": ["40 ('Spam ')", "43 ('egg')"],
        "two_labels": ["44 ('ham')"],
    }
    several = [{"text": "a", "label": ["x", "y"]}, {"text": "b", "label": ["X"]}, {"text": "a", "label": ["y", "x"]}]
    names = Labels(SEQUENCE_CLASSIFICATION, ("X", "x", "y"), several=True)
    found = suspicious(prepare(jsonl(several), bytes_tokenizer(), validation_split=0, labels=names))
    assert found == {"similar_labels": ["2 ('X')"]}
    numbers = [{"text": "a", "label": 1}, *({"text": f"b{number}", "label": 0} for number in range(30))]
    names = Labels("regression", ("value",))
    assert not suspicious(prepare(jsonl(numbers), bytes_tokenizer(), validation_split=0, labels=names))
    twice = [{"text": "a", "label": 1.5}, {"text": "a", "label": 2}]
    found = suspicious(prepare(jsonl(twice), bytes_tokenizer(), validation_split=0, labels=names))
    assert found == {"two_labels": ["2 ('2')"]}


def test_a_tokenizer_that_just_fits_the_embedding_is_accepted(bytes_tokenizer) -> None:
    tokenizer = bytes_tokenizer()
    size = len(tokenizer)
    check_vocabulary(tokenizer, size)
    with pytest.raises(
        DataError,
        match=rf"has id {size - 1}, but the embedding has only {size - 1} .*resize_token_embeddings\({size}\)",
    ):
        check_vocabulary(tokenizer, size - 1)


def test_a_stream_gives_the_same_examples_in_order(bytes_tokenizer, jsonl) -> None:
    tokenizer, path = bytes_tokenizer(), jsonl(PAIRS * 40)  # more than one chunk
    streamed = list(stream(path, tokenizer))
    prepared = prepare(path, tokenizer, validation_split=0)
    assert [example.source_index for example in streamed] == prepared.train.source_indices.tolist() == list(range(1600))
    assert np.array_equal(np.concatenate([example.input_ids for example in streamed]), prepared.train.input_ids)
    assert np.array_equal(np.concatenate([example.labels for example in streamed]), prepared.train.labels)


def test_cut_rows_of_a_stream_count_once_however_often_it_is_read(bytes_tokenizer, jsonl) -> None:
    pairs = [("a", "b"), ("a", "b " * 40), ("a " * 40, "b")]
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in pairs]
    read, counts = partial(stream, jsonl(rows), bytes_tokenizer(), max_length=16), RowCounts()
    assert [example.source_index for example in islice(read(counts=counts), 1)] == [0]
    assert (counts.rows, counts.flagged.numbers["truncated"], counts.flagged.numbers["cut_away"]) == (1, 0, 0)
    for max_length, truncated in ((82, 0), (81, 1)):
        every = RowCounts()
        list(stream(jsonl(rows), bytes_tokenizer(), max_length=max_length, counts=every))
        assert (every.longest, every.flagged.numbers["truncated"]) == (82, truncated)
    for _ in range(2):
        assert [example.source_index for example in read(counts=counts)] == [0, 1]
        assert (counts.rows, counts.flagged.numbers["truncated"], counts.flagged.numbers["cut_away"]) == (3, 2, 1)
        assert counts.tokens == 2 * 16 + 3


def test_a_stream_stops_at_a_bad_row(bytes_tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a b"}\nnonsense\n')
    examples = stream(str(path), bytes_tokenizer())
    assert next(examples).source_index == 0
    with pytest.raises(DataError, match=r"rows.jsonl:2: not JSON"):
        next(examples)


def test_the_system_message_is_in_examples_samples_and_the_stream(bytes_tokenizer, jsonl, chatml) -> None:
    rows = [{"question": f"hello {n}", "choices": ["you", "me"], "answer": 0} for n in range(4)]
    for path in (jsonl(rows, "choices.jsonl"), jsonl([chat_row(f"hello {n}", "you") for n in range(4)], "chats.jsonl")):
        tokenizer, options = bytes_tokenizer(chatml), {"system": "be"}
        prepared = prepare(path, tokenizer, validation_split=0.25, **options)
        start = "<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nhello"
        examples = [*prepared.train, *prepared.eval, *stream(path, tokenizer, **options)]
        assert all(tokenizer.decode(example.input_ids.tolist()).startswith(start) for example in examples)
        assert len(examples) == 8
        (sample,) = prepared.eval_samples
        assert sample.messages[0] == {"role": "system", "content": "be"}


TEXT = {"text": "a b"}
FEEDBACK_ROWS = [{"prompt": f"{n}", "completion": f"b {n}", "label": n % 2 == 0} for n in range(3)]


@pytest.mark.parametrize("read", [prepare, read_stream])
@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([TEXT], {"system": "be"}, "--system only applies to conversations, but the data has text rows; remove it"),
        (
            [TEXT],
            {"assistant_only_loss": True},
            "--assistant-only-loss only applies to conversations, but the data",
        ),
        (
            [TEXT],
            {"completion_only_loss": True},
            "--completion-only-loss only applies to completions, but the data",
        ),
        ([chat_row("a", "b")], {"completion_only_loss": True}, "--completion-only-loss only applies to completions"),
        (
            PAIRS,
            {"documents": "concatenated"},
            "--documents concatenated only applies to plain texts, but the data",
        ),
        ([TEXT], {"completion_only_loss": True, "system": "be"}, "2 problems"),
    ],
)
def test_options_that_no_row_can_follow_are_refused(
    bytes_tokenizer, jsonl, chatml, read, rows, options, message
) -> None:
    with pytest.raises(DataError, match=message):
        read(jsonl(rows), bytes_tokenizer(chatml), **options)


@pytest.mark.parametrize("name", ["completion_only_loss", "assistant_only_loss"])
@pytest.mark.parametrize("rows", [[{"prompt": "a", "chosen": "b", "rejected": "c"}], FEEDBACK_ROWS])
def test_what_is_preferred_is_the_reply_alone(bytes_tokenizer, jsonl, chatml, rows, name) -> None:
    with pytest.raises(DataError, match=r"only applies to single replies, .*; remove it"):
        prepare(jsonl(rows), bytes_tokenizer(chatml), validation_split=0, **{name: False})


def test_a_pair_that_becomes_the_same_tokens_is_an_error(bytes_tokenizer, jsonl, chatml) -> None:
    """A chat template that strips messages leaves no difference, which no --max-length would bring back."""
    stripping = chatml.replace("message['content']", "message['content'].strip()")
    path = jsonl([{"prompt": "a", "chosen": "b", "rejected": "b "}])
    with pytest.raises(DataError, match="chosen and rejected have the same tokens, so there is nothing to learn"):
        prepare(path, bytes_tokenizer(stripping), validation_split=0)


@pytest.mark.parametrize("split", [0, 0.3])
def test_one_single_reply_has_no_other_to_be_compared_with(bytes_tokenizer, jsonl, chatml, split) -> None:
    rows = FEEDBACK_ROWS[: 3 if split else 1]
    with pytest.raises(DataError, match="expected at least two rows on each side of the split"):
        prepare(jsonl(rows), bytes_tokenizer(chatml), validation_split=split)


def test_options_are_for_those_rows_of_a_mixture_that_can_follow_them(bytes_tokenizer, jsonl, chatml) -> None:
    rows = {"chats.jsonl": chat_row("a", "b"), "pairs.jsonl": PAIRS[0], "texts.jsonl": {"text": "one two"}}
    sources = [Source(jsonl([row], name)) for name, row in rows.items()]
    tokenizer = bytes_tokenizer(chatml)
    options = {"system": "be", "assistant_only_loss": True, "completion_only_loss": True, "documents": "concatenated"}
    train = prepare(sources, tokenizer, validation_split=0, **options).train
    texts = [tokenizer.decode(example.input_ids.tolist()) for example in train]
    assert ["be" in text for text in texts] == [True, True, False]


# ---- Texts


@pytest.mark.parametrize("documents", ["isolated", "concatenated"])
def test_long_texts_are_divided_and_nothing_is_cut_away(words_tokenizer, jsonl, documents: str) -> None:
    tokenizer, options = words_tokenizer(), {"documents": documents}
    rows = texts_of(3, 90, 1, 40, 2)
    prepared = prepare(jsonl(rows), tokenizer, max_length=16, validation_split=0, **options)
    report = prepared.report
    assert (report.rows, report.flagged["truncated"], report.flagged["cut_away"]) == (5, 0, 0)
    assert prepared.train.lengths.max() == 16 < report.longest
    ids = [tokenizer(row["text"])["input_ids"] + [tokenizer.eos_token_id] for row in rows]
    learned = sum(map(len, ids)) - (1 if documents == "concatenated" else len(rows))
    assert report.supervised_tokens == learned == prepared.train.supervised.sum()
    joined = [token for text in ids for token in text]
    if documents == "concatenated":
        assert (prepared.train.lengths[:-1] == 16).all()
        assert [ids[0][0], *prepared.train.labels[prepared.train.labels != IGNORED].tolist()] == joined
    streamed = list(stream(jsonl(rows), tokenizer, max_length=16, **options))
    assert Examples.of(streamed).hashes() == prepared.train.hashes()


def test_texts_are_held_out_whole(bytes_tokenizer, jsonl) -> None:
    rows = texts_of(*[30] * 10)
    prepared = prepare(jsonl(rows), bytes_tokenizer(), max_length=16, validation_split=0.2)
    sides = [{example.source_index for example in side} for side in (prepared.train, prepared.eval)]
    assert (len(sides[0]), len(sides[1]), sides[0] & sides[1]) == (8, 2, set())
    assert len(prepared.eval) == len(prepared.eval_samples) > 2
    for sample, example in zip(prepared.eval_samples, prepared.eval, strict=True):
        assert sample == Text(bytes_tokenizer().decode(example.input_ids.tolist()))


@pytest.mark.parametrize("documents", ["isolated", "concatenated"])
def test_of_a_single_text_blocks_are_held_out(bytes_tokenizer, tmp_path: Path, documents: str) -> None:
    path = tmp_path / "book.txt"
    path.write_text(texts_of(200)[0]["text"])
    options = {"documents": documents}
    prepared = prepare(str(path), bytes_tokenizer(), max_length=16, validation_split=0.2, **options)
    whole = prepare(str(path), bytes_tokenizer(), max_length=16, validation_split=0, **options)
    assert sorted(prepared.train.hashes() + prepared.eval.hashes()) == sorted(whole.train.hashes())
    assert (prepared.report.rows, prepared.report.shape) == (1, "text")
