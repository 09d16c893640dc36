from typing import Any

import pytest

from tailora.data.demo import conversations, is_refused


def chat(*lines: tuple[str, str]) -> dict[str, Any]:
    """One block a line, as `dataset.json` has it; `lines` are (sender, text)."""
    return {"messages": [[{"sender": sender, "text": text, "timestamp": ""}] for sender, text in lines]}


GOOD = [("ann", "hi"), ("bob", "hello"), ("ann", "fine day"), ("bob", "it is")]


def test_turns_alternate_from_the_first_speaker_and_end_with_the_assistant() -> None:
    (found,) = conversations({"id": chat(*GOOD, ("ann", "one more"), ("bob", "and more"))})
    assert [(message["role"], message["content"]) for message in found] == [
        ("user", "hi"),
        ("assistant", "hello"),
        ("user", "fine day"),
        ("assistant", "it is"),
    ]


def test_what_one_sender_wrote_in_a_row_is_one_turn() -> None:
    lines = [("ann", "hi"), ("ann", "  anyone\nthere? "), ("bob", " "), ("ann", "hm"), *GOOD[1:]]
    (found,) = conversations({"id": chat(*lines)})
    assert found[0]["content"] == "hi anyone there? hm"


@pytest.mark.parametrize(
    "lines",
    [
        GOOD[:3],
        [("ann", text) for _, text in GOOD],
        [*GOOD, ("cat", "me too")],
        [*GOOD, ("ann", "oh SHIT")],
        [*GOOD, ("ann", "x" * 501)],
    ],
    ids=["three turns", "one sender", "three senders", "profane later on", "a wall of text"],
)
def test_a_chat_that_does_not_fit_is_dropped_whole(lines: list[tuple[str, str]]) -> None:
    assert list(conversations({"id": chat(*lines)})) == []


def test_equal_openings_are_kept_once() -> None:
    assert len(list(conversations({"1": chat(*GOOD), "2": chat(*GOOD, ("ann", "bye"))}))) == 1


def test_the_order_is_of_the_ids_not_of_the_file() -> None:
    dataset = {str(number): chat(("ann", str(number)), *GOOD[1:]) for number in range(20)}
    found = list(conversations(dataset))
    assert found == list(conversations(dict(reversed(dataset.items()))))
    assert [messages[0]["content"] for messages in found] != sorted(dataset)


@pytest.mark.parametrize(
    "text",
    [
        "what the HELL",
        "mail me: jo.doe@example.org",
        "see http://example.test/page",
        "www.example",
        "try example.com",
        "call (801) 555-0199",
        "801.555.0199",
        "8015550199",
    ],
)
def test_profane_and_private_texts_are_refused(text: str) -> None:
    assert is_refused(text)


@pytest.mark.parametrize(
    "text",
    [
        "hello class, assess the cocktail",
        "from 2014-2016 in Essex",
        "3.14159 is pi",
        "D'awww.. so cute",
        "one @ a time",
    ],
)
def test_innocent_texts_are_not(text: str) -> None:
    assert not is_refused(text)
