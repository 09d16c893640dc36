"""From tokens to text, up to a stop string, the log-probabilities of a completion, and how long an adapter is kept."""

import asyncio
from typing import Any
from unittest.mock import MagicMock

import pytest
import tokenizers
from tiny import chat_tokenizer
from tokenizers import decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

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

    def encode(self, text: str, **_: Any) -> list[int]:
        return [PIECES.index(text)]

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
    piece = Piece(0, "a d", tokens, offsets=[7, 8])
    found = completion_logprobs(Tokenizer(), piece, 3)
    assert found == {
        "tokens": ["a", " d"],
        "token_logprobs": [-0.5, -1.0],
        "top_logprobs": [{"a": -0.5, " d": -2.0}, {" d": -1.0, "a": -3.0}],  # the likeliest of those with one text
        "text_offset": [7, 8],
    }
    assert completion_logprobs(Tokenizer(), Piece(0, "", ()), 2)["text_offset"] == []


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2: a letter may begin with a space, other characters are bytes, and a text has no space at its start."""
    letters, space = "adehlortw,", "\u2581"
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), space, *letters, *(space + one for one in letters)]
    merges = [(space, letter) for letter in letters]
    vocabulary = {name: number for number, name in enumerate(names)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
    undo = [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(undo)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_tokens_keep_their_space_and_begin_where_their_text_does() -> None:
    """Also tokens of incomplete characters, and text that may be the beginning of a stop string."""
    metaspace = llama_tokenizer()
    text = "hello there \u65e5 world, hello \U0001f642"
    ids = metaspace.encode(text, add_special_tokens=False)
    answer = Answer(0, metaspace, Request("a", ids[:2], None, SamplingParams(99, 0.0)), ["there!"], frozenset())
    pieces = [answer.add(Token(token_id, -0.5, ())) for token_id in ids]
    pieces.append(answer.add(Finish("length")))
    found = completion_logprobs(metaspace, answer, 0)
    assert found["text_offset"] == [offset for piece in pieces for offset in piece.offsets]
    whole = [(name, at) for name, at in zip(found["tokens"], found["text_offset"], strict=True) if "\ufffd" not in name]
    assert len(whole) > 10
    assert all(answer.text[at:].startswith(name) for name, at in whole)
    assert any(name.startswith(" ") for name, _ in whole)
    assert found["text_offset"] == sorted(found["text_offset"])


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
    cancelled: list[str] = []

    class Engine:
        def submit(self, request: Request, handle: Any) -> None:
            assert request.id == str(len(handles))
            handles.append(handle)

        def cancel(self, request_id: str) -> None:
            cancelled.append(request_id)

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
        pieces = [(piece.finish_reason, [*cancelled]) async for piece in generation.pieces()]
        assert pieces == [(None, []), ("length", ["1"]), (None, ["1"]), ("length", ["1", "0"])]  # not only at the end

    asyncio.run(run())
    assert events == ["end", "next", "end", "close", "next"]
