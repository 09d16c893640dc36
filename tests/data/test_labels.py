"""Labels of rows: their names, and the tokens and targets of rows that have them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import chat_tokenizer, word_tokenizer

from tailora.data.chat_template import ChatTokenizer, DataSettings
from tailora.data.dataset import IGNORED
from tailora.data.labels import Labels, read_labels
from tailora.data.prepare import prepare
from tailora.data.samples import Labelled, Tagged
from tailora.data.tokenize import EncodedSample, encode_samples, first_tokens
from tailora.errors import DataError

SENTENCE = ["Yesterday", "Alice", "met", "Bob", "in", "Saint-Petersburg", "."]
TEXTS = ["a fine film", "a dull film", " ".join(SENTENCE)]
CLASSES, TAGS = "sequence-classification", "token-classification"


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def rows_with(labels: Sequence[Any]) -> list[dict[str, Any]]:
    return [{"text": f"text {number}", "label": label} for number, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("labels", "names", "several"),
    [
        (["good", "bad", "good"], ("bad", "good"), False),
        ([10, 9, 2], ("2", "9", "10"), False),
        ([True, False], ("false", "true"), False),
        ([1.0, 0.0], ("0", "1"), False),
        ([["b", "a"], [], "c"], ("a", "b", "c"), True),
        (['["b", "a"]', "[]", "[3]"], ("3", "a", "b"), True),  # as CSV has lists
        (["[b]", "a"], ("[b]", "a"), False),
        (["--5", "-5", 10**400, "4"], ("-5", "4", str(10**400), "--5"), False),
    ],
)
def test_names_of_classes_are_in_order(
    labels: list[Any], names: tuple[str, ...], several: bool, tmp_path: Path
) -> None:
    source = write(tmp_path / "rows.jsonl", rows_with(labels))
    assert read_labels([source], None, CLASSES) == Labels(CLASSES, names, several)


def test_as_many_lists_as_names_are_no_lists_of_labels(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", rows_with(["a", "b", ["a"], ["b"]]))
    with pytest.raises(DataError, match=r"rows\.jsonl:3: expected a single label as in the other rows, got a list"):
        read_labels([source], None, CLASSES)


def test_the_tag_outside_is_first(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [{"tokens": ["a", "b", "c"], "tags": ["I-X", "B-X", "O"]}])
    assert read_labels([source], None, TAGS).names == ("O", "B-X", "I-X")


@pytest.mark.parametrize(
    ("task", "row", "cause"),
    [
        (CLASSES, {"text": "a", "label": None}, "label is empty"),
        (CLASSES, {"text": "a", "label": 0.5}, "--task regression"),
        (CLASSES, {"text": " ", "label": "x"}, "text is empty"),
        (CLASSES, {"text": "a"}, "missing label"),
        (CLASSES, {"text": "a", "label": ["x"]}, "expected a single label as in the other rows, got a list"),
        (CLASSES, {"text": "a", "label": "['x', 'y']"}, "label: expected JSON text, got "),
        (CLASSES, {"text": "a", "label": "\ud800"}, "label contains half of a surrogate pair"),
        (TAGS, {"tokens": ["a", "b"], "tags": ["O", "\ud800"]}, "label contains half of a surrogate pair"),
        (TAGS, {"tokens": ["a"], "tags": []}, "tags: expected a list with one tag per token, got []"),
        (TAGS, {"tokens": ["a", "b"], "tags": ["O"]}, "got 1 tags for 2 tokens"),
        (TAGS, {"tokens": [], "tags": []}, "tokens: expected a list of words, got []"),
    ],
)
def test_wrong_rows_are_named_with_their_cause(task: str, row: dict[str, Any], cause: str, tmp_path: Path) -> None:
    good = {"tokens": ["a", "b"], "tags": ["O", "X"]} if task == TAGS else {"text": "b", "label": "x"}
    source = write(tmp_path / "rows.jsonl", [good, good, row])
    with pytest.raises(DataError, match=r"rows\.jsonl.*3") as error:
        read_labels([source], None, task)
    assert cause in str(error.value)


def test_bad_rows_are_left_out_on_request(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [*rows_with(["x", "y", ["z"], None]), {"text": " ", "label": "a"}])
    assert read_labels([source], None, CLASSES, skip_bad_rows=True).names == ("x", "y")


@pytest.mark.parametrize(
    ("labels", "cause"),
    [(["x", "x"], "expected at least two different labels"), (list(range(1001)), "1,001 different")],
)
def test_labels_that_are_no_classes_are_refused(labels: list[Any], cause: str, tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", rows_with(labels))
    with pytest.raises(DataError, match=cause):
        read_labels([source], None, CLASSES)


@pytest.mark.parametrize(
    ("labels", "value", "target"),
    [
        (Labels(CLASSES, ("a", "b")), "b", [1]),
        (Labels(CLASSES, ("0", "1")), 1.0, [1]),
        (Labels(CLASSES, ("a", "b", "c"), several=True), ["c", "a"], [1, 0, 1]),
        (Labels(CLASSES, ("a", "b", "c"), several=True), "b", [0, 1, 0]),
        (Labels("regression", ("value",)), "-2.5", [-2.5]),
    ],
)
def test_targets(labels: Labels, value: Any, target: list[float]) -> None:
    np.testing.assert_array_equal(labels.target(value), target)


@pytest.mark.parametrize("value", [1e308, "-1e16", 10**400, "--5", "nan", True, [1]])
def test_a_number_that_cannot_be_learned_is_refused(value: Any) -> None:
    with pytest.raises(DataError, match=r"label(: expected a number, got | .* overflows. Divide all labels)"):
        Labels("regression", ("value",)).target(value)


def test_unseen_labels_are_named_with_those_there_are(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", rows_with(["good", "bad"]))
    held_out = write(tmp_path / "held_out.jsonl", rows_with(["good", "goood"]))
    labels = read_labels([train], None, CLASSES)
    tokenizer = word_tokenizer(TEXTS)
    with pytest.raises(DataError) as error:
        prepare(train, tokenizer, DataSettings(labels=labels), eval_source=held_out)
    message = str(error.value)
    assert "held_out.jsonl" in message
    assert "2" in message
    assert "'goood'" in message
    assert "bad, good" in message


AB, O_X = Labels(CLASSES, ("x", "y")), Labels(TAGS, ("O", "X"))


def encoded(sample: Labelled | Tagged, tokenizer: Any, labels: Labels, max_length: int = 64) -> EncodedSample:
    (results,) = encode_samples(
        [sample], ChatTokenizer.of(tokenizer, DataSettings(labels=labels, max_length=max_length))
    )
    if isinstance(results, DataError):
        raise results
    (result,) = results
    return result


def test_two_texts_are_segments_of_one_sequence() -> None:
    tokenizer = word_tokenizer(TEXTS)
    example = encoded(Labelled("a fine film", "a dull film", label="x"), tokenizer, AB).example
    expected = tokenizer("a fine film", "a dull film", return_token_type_ids=True)
    assert example.input_ids.tolist() == expected["input_ids"]
    assert example.second_start == expected["token_type_ids"].index(1)


def test_a_conversation_is_rendered_by_the_chat_template() -> None:
    tokenizer = chat_tokenizer(TEXTS)
    sample = Labelled(messages=[{"role": "user", "content": "a fine film"}], label="x")
    expected = tokenizer.apply_chat_template(sample.messages, tokenize=False)
    assert tokenizer.decode(encoded(sample, tokenizer, AB).example.input_ids) == expected
    with pytest.raises(DataError, match="messages need a chat template"):
        encoded(sample, word_tokenizer(TEXTS), AB)


def test_the_first_token_of_each_word_has_its_tag() -> None:
    tokenizer = word_tokenizer(TEXTS)
    expected = tokenizer(SENTENCE, is_split_into_words=True)
    ids, firsts, length = first_tokens(SENTENCE, ChatTokenizer.of(tokenizer))
    assert ids.tolist() == expected["input_ids"]
    assert length == len(ids)
    assert firsts == [expected.word_ids().index(word) for word in range(len(SENTENCE))]


def test_a_byte_level_token_with_a_space_belongs_to_the_word_after_it() -> None:
    tokenizer = chat_tokenizer(TEXTS)
    ids, firsts, _ = first_tokens(SENTENCE, ChatTokenizer.of(tokenizer))
    pieces = [tokenizer.decode(ids[first:end]) for first, end in zip(firsts, [*firsts[1:], len(ids)], strict=True)]
    assert [piece.strip() for piece in pieces] == SENTENCE


def test_words_beyond_the_cut_have_no_tag() -> None:
    tokenizer, sample = word_tokenizer(TEXTS), Tagged(SENTENCE, ["O", "X", *["O"] * 5])
    result = encoded(sample, tokenizer, O_X, max_length=4)
    assert result.length > 4
    labels = result.example.labels.tolist()
    assert (labels[0], labels[-1]) == (IGNORED, IGNORED)  # of [CLS] and [SEP]
    assert result.is_learned
    assert not encoded(sample, tokenizer, O_X, max_length=2).is_learned  # [CLS] and [SEP]
