import pytest

from tailora.data.schemas import detect_schema
from tailora.errors import DataError


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
def test_a_shape_is_known_by_its_keys(keys, shape, ignored) -> None:
    mapped = detect_schema([row(*keys)])
    assert (mapped.schema.name, mapped.ignored) == (shape, ignored)
    assert mapped.columns.keys() | set(ignored) == set(keys)


def test_the_shape_of_most_rows_wins() -> None:
    assert detect_schema([row("text"), row("prompt", "completion"), row("text")]).schema.name == "text"


def test_a_mapping_renames_and_decides_the_shape() -> None:
    mapped = detect_schema([row("messages", "question", "answer")], {"prompt": "question", "completion": "answer"})
    assert mapped.schema.name == "prompt/completion"
    assert mapped.values({"question": "q", "answer": "a"}) == {"prompt": "q", "completion": "a"}


def test_one_key_can_be_mapped_and_the_other_found() -> None:
    mapped = detect_schema([row("prompt", "response")], {"completion": "response"})
    assert mapped.columns == {"prompt": "prompt", "completion": "response"}


def test_a_row_without_a_needed_key_is_refused_with_its_keys() -> None:
    mapped = detect_schema([row("question", "completion")], {"prompt": "question"})
    with pytest.raises(
        DataError, match=r"no question and no completion \(read as prompt/completion\); the row has text"
    ):
        mapped.values(row("text"))


def test_unknown_keys_are_listed_with_the_shapes_and_a_hint() -> None:
    with pytest.raises(DataError) as caught:
        detect_schema([row("Question", "id"), row("Answer")])
    text = str(caught.value)
    assert "the rows have the keys Answer, Question, id, which fit no known schema" in text
    assert "messages (messages); sharegpt (conversations); prompt/completion (prompt, completion)" in text
    assert "Perhaps: --field prompt=Question --field completion=Answer" in text
    assert text.count("choices (") == 1
    with pytest.raises(DataError, match="Perhaps: --field prompt=ctx --field choices=endings --field answer=label"):
        detect_schema([row("ctx", "endings", "label")])


def test_keys_that_resemble_nothing_get_the_general_hint() -> None:
    with pytest.raises(DataError, match="for instance: --field prompt=question"):
        detect_schema([row("x1", "x2")])


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ({"promt": "question"}, r"no schema has the key 'promt'; did you mean prompt"),
        ({"prompt": "qestion"}, r"no column 'qestion'; did you mean question\?; there are answer, question"),
        ({"promt": "qestion"}, "2 problems"),
        ({"prompt": "question"}, r"which fit no known schema with --field prompt=question"),
    ],
)
def test_a_mistyped_mapping_names_the_nearest(field, said) -> None:
    with pytest.raises(DataError, match=said):
        detect_schema([row("question", "answer")], field)
