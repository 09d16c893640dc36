"""From tokens to text, up to a stop string, the log-probabilities of a completion, and how long an adapter is kept."""

import asyncio
from typing import Any
from unittest.mock import MagicMock

import pytest
from tiny import chat_tokenizer

from tailora.engine.interface import Finish, Request, SamplingParams, Token
from tailora.serve.answers import (
    Answer,
    Detokenizer,
    Generation,
    Piece,
    StopStrings,
    completion_logprobs,
    parse_tool_calls,
)
from tailora.serve.registry import AdapterHandle

PIECES = ["a", "b\xe6", "\x97\xa5c", "\xf0\x9f", "\x99\x82", " d", "a"]  # as Latin-1: bytes of a\u65e5c and a smiley


class Tokenizer:
    """A token is a few bytes, also those of half a character."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return b"".join(PIECES[token_id].encode("latin-1") for token_id in ids).decode(errors="replace")


def test_a_character_of_several_tokens_appears_with_its_last_one() -> None:
    detokenizer = Detokenizer(Tokenizer(), [5, 0])
    shown = [detokenizer.add(token_id) for token_id in (0, 1, 2, 3, 4, 5, 3)]
    assert shown == ["a", "", "b\u65e5c", "", "\U0001f642", " d", ""]
    assert detokenizer.rest() == "\ufffd"  # the answer ends within a character


@pytest.mark.parametrize(
    ("stop", "pieces", "expected"),
    [
        (["d", "bc"], ["abcd"], ("a", True)),  # the first in the text, not in the list
        (["bc", "d"], ["abcd"], ("a", True)),
        (["abc"], ["xab", "abc"], ("xab", True)),
        (["abc"], ["xab", "d"], ("xabd", False)),
        (["abc"], ["a", "b", "d"], ("abd", False)),
        (["aab"], ["aaa", "b"], ("a", True)),
        (["b", "bcd"], ["a", "bcd"], ("a", True)),
        ([], ["a", "b"], ("ab", False)),
    ],
)
def test_text_is_shown_up_to_the_first_stop_string(
    stop: list[str], pieces: list[str], expected: tuple[str, bool]
) -> None:
    strings, shown, is_stopped = StopStrings(stop), "", False
    for piece in pieces:
        text, is_stopped = strings.add(piece)
        shown += text
    assert (shown, is_stopped) == expected


def test_log_probabilities_of_a_piece_of_a_completion() -> None:
    tokens = [Token(0, -0.5, ((0, -0.5), (6, -0.7), (5, -2.0))), Token(5, -1.0, ((5, -1.0), (0, -3.0), (6, -4.0)))]
    found = completion_logprobs(Tokenizer(), tokens, 3, offset=7, as_ids=False)
    assert found == {
        "tokens": ["a", " d"],
        "token_logprobs": [-0.5, -1.0],
        "top_logprobs": [{"a": -0.5, " d": -2.0}, {" d": -1.0, "a": -3.0}],  # the likeliest of those with one text
        "text_offset": [7, 8],
    }
    found = completion_logprobs(Tokenizer(), tokens, 2, offset=0, as_ids=True)
    assert found["top_logprobs"][0] == {"token_id:0": -0.5, "token_id:6": -0.7}
    assert completion_logprobs(Tokenizer(), [], 2, offset=7, as_ids=False)["text_offset"] == []


def test_text_around_a_tool_call_is_kept() -> None:
    tokenizer = chat_tokenizer(["a"])
    tokenizer.chat_template = "<|im_start|><tool_call>"
    call = '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'
    message = parse_tool_calls(tokenizer, Piece(0, f"Let me see.\n{call}\nWait.", ()), "", [])
    assert message.content == "Let me see.\nWait."
    assert [made["function"]["name"] for made in message.tool_calls or []] == ["weather"]
    nested = Piece(0, f"<tool_call>{'[' * 3000}</tool_call>", ())
    assert parse_tool_calls(tokenizer, nested, "", []).content == nested.text


def test_an_adapter_is_kept_until_the_last_of_its_answers_has_ended() -> None:
    handles: list[Any] = []
    events: list[str] = []

    class Engine:
        def submit(self, request: Request, handle: Any) -> None:
            assert request.id == str(len(handles))
            handles.append(handle)

        def cancel(self, request_id: str) -> None:
            pass

    async def run() -> None:
        requests = [Request(str(number), (0,), None, SamplingParams(2)) for number in range(2)]
        answers = [Answer(number, Tokenizer(), request, [], frozenset()) for number, request in enumerate(requests)]
        engine: Any = Engine()
        handle = AdapterHandle("x", lambda: events.append("close"))
        generation = Generation(engine, answers, "x", 1, MagicMock(), handle, lambda: events.append("end"))
        generation.start()
        for number in (1, 0):
            handles[number](Token(0))
            handles[number](Finish("length"))
            await asyncio.sleep(0.01)
            events.append("next")
        assert [piece.finish_reason async for piece in generation.pieces()] == [None, "length"] * 2

    asyncio.run(run())
    assert events == ["end", "next", "end", "close", "next"]
