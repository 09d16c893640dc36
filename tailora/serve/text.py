"""The tokens of an answer become text: piece by piece, up to a stop string, with log-probabilities and tool calls."""

import json
from collections.abc import Sequence
from typing import Any

from tailora.serve.engine_interface import Token
from tailora.serve.schemas import (
    ChatLogprobs,
    CompletionLogprobs,
    FunctionCall,
    TokenLogprob,
    TopLogprob,
)

PROMPT_TOKENS = 6  # of the prompt that are decoded with an answer: some tokenizers drop the space of the first token
UNFINISHED = "\ufffd"  # what the bytes of a character are decoded to until its last byte is there
LOWEST_LOGPROB = -9999.0  # in place of minus infinity, which JSON does not have; OpenAI's number

# ---- Tokens to text


class Detokenizer:
    """Turns tokens into text as they come. A character of several tokens appears with its last one."""

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids[-PROMPT_TOKENS:])  # decoded together, since a token's text depends on those before
        self._start, self._shown = 0, len(self._ids)  # tokens from _start on are decoded, those before _shown are shown

    def add(self, token_id: int) -> str:
        """Returns the text that is certain now, and was not before."""
        self._ids.append(token_id)
        text = self._new_text()
        if not text or text.endswith(UNFINISHED):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return text

    def rest(self) -> str:
        """Returns the text of the last tokens, which may be parts of a character."""
        return self._new_text()

    def _new_text(self) -> str:
        before = self._decode(self._ids[self._start : self._shown])
        return self._decode(self._ids[self._start :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


class StopStrings:
    """Lets a text through up to the first stop string. What may be the beginning of one waits for what follows."""

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self._stop_strings = stop_strings
        self._waiting = ""

    def add(self, text: str) -> tuple[str, bool]:
        """Returns the text to show, and whether a stop string follows it."""
        text = self._waiting + text
        ends = [end for stop_string in self._stop_strings if (end := text.find(stop_string)) >= 0]
        if ends:
            self._waiting = ""
            return text[: min(ends)], True
        length = max((_overlap(text, stop_string) for stop_string in self._stop_strings), default=0)
        shown, self._waiting = text[: len(text) - length], text[len(text) - length :]
        return shown, False

    def rest(self) -> str:
        return self._waiting


def _overlap(text: str, stop_string: str) -> int:
    """Returns the length of the longest end of the text with which the stop string begins."""
    longest = min(len(text), len(stop_string) - 1)
    return next((length for length in range(longest, 0, -1) if stop_string.startswith(text[-length:])), 0)


# ---- Log-probabilities


def token_text(tokenizer: Any, token_id: int) -> str:
    return str(tokenizer.decode([token_id]))


def chat_logprobs(tokenizer: Any, tokens: Sequence[Token], top: int) -> ChatLogprobs:
    """top: how many of the likeliest tokens each entry has."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        text = token_text(tokenizer, token_id)
        is_part = UNFINISHED in text  # the tokenizer does not tell the bytes of a part of a character
        return {
            "token": text,
            "logprob": max(logprob, LOWEST_LOGPROB),
            "bytes": None if is_part else list(text.encode("utf-8")),
        }

    content = [
        TokenLogprob(
            **entry(token.id, token.logprob), top_logprobs=[TopLogprob(**entry(*pair)) for pair in token.top[:top]]
        )
        for token in tokens
    ]
    return ChatLogprobs(content=content)


def completion_logprobs(
    tokenizer: Any, tokens: Sequence[Token], top: int, *, offset: int, as_ids: bool
) -> CompletionLogprobs:
    """offset: where the text of these tokens begins in the answer.    as_ids: name tokens token_id:ID."""

    def name(token_id: int) -> str:
        return f"token_id:{token_id}" if as_ids else token_text(tokenizer, token_id)

    def by_name(token: Token) -> dict[str, float]:
        logprobs: dict[str, float] = {}
        for token_id, logprob in token.top[:top]:
            logprobs.setdefault(name(token_id), max(logprob, LOWEST_LOGPROB))  # of several with one text the likeliest
        return logprobs

    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token_text(tokenizer, token.id))
    return CompletionLogprobs(
        tokens=[name(token.id) for token in tokens],
        token_logprobs=[max(token.logprob, LOWEST_LOGPROB) for token in tokens],
        top_logprobs=[by_name(token) for token in tokens],
        text_offset=offsets,
    )


# ---- Tool calls

HERMES = {  # of Qwen and SmolLM; for tokenizers whose files do not say how their calls are written
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"content": "text"},
    },
}


def response_template(tokenizer: Any) -> dict[str, Any] | None:
    """Returns how the model writes tool calls, in transformers' form; None if this is not known."""
    template: dict[str, Any] | None = getattr(tokenizer, "response_template", None)
    if template is not None:
        return template
    text = str(tokenizer.chat_template or "")
    is_hermes = "<tool_call>" in text and "<|im_start|>" in text and "<function=" not in text
    return HERMES if is_hermes else None


def parse_tool_calls(
    tokenizer: Any, text: str, prompt: str, tools: list[dict[str, Any]]
) -> tuple[str | None, str | None, list[FunctionCall]]:
    """Returns content, reasoning and calls of an answer; the text itself as the content if it calls nothing.

    A call that is not written as the model's template has it stays text.
    """
    plain: tuple[str | None, str | None, list[FunctionCall]] = (text, None, [])
    template = response_template(tokenizer)
    if template is None:
        return plain
    try:
        message = tokenizer.parse_response(text, template, prefix=prompt, tools=tools)
        calls = [_function_call(call["function"]) for call in message.get("tool_calls") or []]
    except (ValueError, LookupError, TypeError):
        return plain
    if not calls:
        return plain
    reasoning = message.get("reasoning_content") or message.get("thinking")
    return message.get("content") or None, reasoning, calls


def _function_call(function: dict[str, Any]) -> FunctionCall:
    arguments = function["arguments"]
    return FunctionCall(
        name=function["name"],
        arguments=arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False),
    )
