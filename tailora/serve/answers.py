"""Turns the engine's tokens into answers: text, log-probabilities, tool calls and response bodies.

A `Generation` contains all answers to all prompts of one request. The engine calls back in its own thread; everything
else here runs in the event loop's thread.
"""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tailora.engine.interface import Engine, Finish, Request, Token
from tailora.errors import AdapterError
from tailora.serve import schemas
from tailora.serve.metrics import Metrics
from tailora.serve.registry import AdapterHandle
from tailora.serve.schemas import FinishReason, RequestError, new_id

Json = dict[str, Any]
CHUNK = "chat.completion.chunk"  # the "object" of a streamed chat event
PROMPT_TOKENS = 6  # last tokens of the prompt, decoded with the answer: some tokenizers drop the first token's space
UNFINISHED = "\ufffd"  # an incomplete character decodes to this


@dataclass(frozen=True, slots=True)
class Piece:
    """The new part of one answer. Some text of its tokens may follow in a later piece."""

    index: int
    text: str
    tokens: Sequence[Token]
    finish_reason: FinishReason | None = None  # of the last piece
    offsets: Sequence[int] = ()  # where the text of each token begins in the answer


class Answer:
    """One answer while it is generated. It grows with every event of the engine."""

    def __init__(
        self, index: int, tokenizer: Any, request: Request, stop_strings: Sequence[str], end_ids: frozenset[int]
    ) -> None:
        self.index, self.request = index, request
        self.text = ""
        self.tokens: list[Token] = []
        self.offsets: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._hidden_ids = frozenset[int]() if request.params.ignore_eos else end_ids
        self._detokenizer = Detokenizer(tokenizer, request.prompt_ids)
        self._stop_strings = StopStrings(stop_strings)

    def add(self, event: Token | Finish) -> Piece:
        """Returns the new part. The answer ends at a stop string. Raises RequestError for a failed one."""
        tokens = [event] if isinstance(event, Token) else []
        offsets = [len(self.text) + len(self._stop_strings.waiting)] * len(tokens)
        reason: FinishReason | None = None
        if isinstance(event, Token):
            text = "" if event.id in self._hidden_ids else self._detokenizer.add(event.id)
        elif event.reason == "cancelled":
            raise RequestError(503, "the server is shutting down")
        elif event.reason == "error":
            raise RequestError(500, f"generation failed: {event.message}")
        else:
            text, reason = self._detokenizer.rest(), event.reason
        text, is_stopped = self._stop_strings.add(text)
        if reason and not is_stopped:
            text += self._stop_strings.waiting
        self.finish_reason = "stop" if is_stopped else reason
        self.text += text
        self.tokens += tokens
        self.offsets += offsets
        return Piece(self.index, text, tokens, self.finish_reason, offsets)


class Generation:
    """All answers to one request, in the order of the prompts.

    model: name in the metrics.
    prompt_tokens: total of all prompts.
    handle: keeps the adapter in memory; closed after the last answer.
    on_end: called once for each answer when the engine ends it.
    """

    def __init__(
        self,
        engine: Engine,
        answers: Sequence[Answer],
        model: str,
        prompt_tokens: int,
        metrics: Metrics,
        handle: AdapterHandle,
        on_end: Callable[[], None],
    ) -> None:
        self.answers, self.model, self.prompt_tokens = answers, model, prompt_tokens
        self._engine, self._metrics, self._handle, self._on_end = engine, metrics, handle, on_end
        self._events: asyncio.Queue[tuple[Answer, Token | Finish]] = asyncio.Queue()
        self._in_engine = len(answers)

    def start(self) -> None:
        """Submits all answers to the engine. Raises RequestError if it rejects them."""
        in_event_loop: Callable[..., object] = asyncio.get_running_loop().call_soon_threadsafe
        for number, answer in enumerate(self.answers):
            try:
                self._engine.submit(answer.request, partial(in_event_loop, self._receive, answer))
            except (AdapterError, RuntimeError) as error:
                for other in self.answers[number:]:
                    self._receive(other, Finish("cancelled"))
                self.cancel()
                raise RequestError(503, f"the engine is not accepting requests: {error}") from error

    def _receive(self, answer: Answer, event: Token | Finish) -> None:
        self._events.put_nowait((answer, event))
        if isinstance(event, Finish):
            self._in_engine -= 1
            self._on_end()
            if not self._in_engine:
                self._handle.close()

    def cancel(self) -> None:
        """Cancels unfinished answers. May be called repeatedly."""
        for answer in self.answers:
            self._engine.cancel(answer.request.id)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yields the pieces of all answers as they come. Cancels them if the reader stops. Raises RequestError."""
        began, is_first = time.perf_counter(), True
        try:
            while any(answer.finish_reason is None for answer in self.answers):
                answer, event = await self._events.get()
                if answer.finish_reason is not None:
                    continue  # the engine computed this before it was cancelled after a stop string
                piece = answer.add(event)
                if is_first:
                    self._metrics.first_token.labels(self.model).observe(time.perf_counter() - began)
                is_first = False
                self._metrics.tokens.labels(self.model).inc(len(piece.tokens))
                if piece.finish_reason is not None:
                    self._engine.cancel(answer.request.id)  # it ignores stop strings
                yield piece
        finally:
            self.cancel()

    async def complete(self) -> Sequence[Answer]:
        """Returns the answers once all are complete. Raises RequestError."""
        async for _ in self.pieces():
            pass
        return self.answers

    def usage(self) -> schemas.Usage:
        tokens = sum(len(answer.tokens) for answer in self.answers)
        return schemas.Usage(
            prompt_tokens=self.prompt_tokens, completion_tokens=tokens, total_tokens=self.prompt_tokens + tokens
        )


# ---- Text, up to a stop string


class Detokenizer:
    """Turns tokens into text as they arrive. A character of several tokens appears with its last one."""

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int]) -> None:
        self._decode = partial(tokenizer.decode, skip_special_tokens=True)
        self._ids = list(prompt_ids[-PROMPT_TOKENS:])  # decoded together, since a token's text depends on those before
        self._start, self._shown = 0, len(self._ids)  # tokens from _start on are decoded, those before _shown are shown

    def add(self, token_id: int) -> str:
        """Returns the new text that later tokens cannot change."""
        self._ids.append(token_id)
        text = self.rest()
        if not text or text.endswith(UNFINISHED):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return text

    def rest(self) -> str:
        """Returns the text of the last tokens, which may end with an incomplete character."""
        before = self._decode(self._ids[self._start : self._shown])
        return str(self._decode(self._ids[self._start :]))[len(before) :]


class StopStrings:
    """Passes on text up to the first stop string. waiting: the text that may be the beginning of one."""

    def __init__(self, stop_strings: Sequence[str]) -> None:
        self._stop_strings = stop_strings
        self._longest = max(map(len, stop_strings), default=0)
        self.waiting = ""

    def add(self, text: str) -> tuple[str, bool]:
        """Returns the text to show, and whether a stop string follows it."""
        text = self.waiting + text
        ends = [end for stop_string in self._stop_strings if (end := text.find(stop_string)) >= 0]
        if ends:
            return text[: min(ends)], True
        starts = range(max(0, len(text) - self._longest), len(text))  # of the text to hold back
        start = next((n for n in starts if any(stop.startswith(text[n:]) for stop in self._stop_strings)), len(text))
        self.waiting = text[start:]
        return text[:start], False


# ---- Log-probabilities


def text_of_token(tokenizer: Any) -> Callable[[int], str]:
    """Returns a function from a token to its text, with the space that some tokenizers drop at the beginning."""
    letter = tokenizer.encode("a", add_special_tokens=False)[-1:]
    begin = len(tokenizer.decode(letter))
    return lambda token_id: str(tokenizer.decode([*letter, token_id]))[begin:]


def completion_logprobs(tokenizer: Any, part: Answer | Piece, top: int) -> Json:
    """Returns the log-probabilities in OpenAI's older form."""
    tokens, name = part.tokens, text_of_token(tokenizer)

    def by_name(token: Token) -> dict[str, float]:
        logprobs: dict[str, float] = {}
        for token_id, logprob in token.top[:top]:
            logprobs.setdefault(name(token_id), logprob)  # of tokens with the same text, keep the most likely
        return logprobs

    return {
        "tokens": [name(token.id) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [by_name(token) for token in tokens],
        "text_offset": [*part.offsets],
    }


# ---- Tool calls

HERMES = {  # the format of Qwen and SmolLM, for tokenizers without a response template
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
        "content": {"content": "text", "repeats": True, "join": "\n"},  # before and after the calls
    },
}


def response_template(tokenizer: Any) -> Json | None:
    """Returns the format of the model's tool calls as a transformers response template; None if unknown."""
    text = str(tokenizer.chat_template or "")
    is_hermes = "<tool_call>" in text and "<|im_start|>" in text and "<function=" not in text
    template: Json | None = getattr(tokenizer, "response_template", None)
    return HERMES if template is None and is_hermes else template


def parse_tool_calls(
    tokenizer: Any, answer: Answer | Piece, prompt: str, tools: list[Json]
) -> schemas.AssistantMessage:
    """Splits an answer into content, reasoning and tool calls; it is all content if the template cannot parse them."""
    text, template = answer.text, response_template(tokenizer)
    if template is not HERMES:  # the tokenizer's own, which may be about special tokens
        text = str(tokenizer.decode([token.id for token in answer.tokens], skip_special_tokens=False))
    try:
        parsed = tokenizer.parse_response(text, template, prefix=prompt, tools=tools)
        calls = []
        for function in (call["function"] for call in parsed.get("tool_calls") or []):
            arguments = function["arguments"]
            arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            function = {"name": function["name"], "arguments": arguments}
            calls.append({"id": new_id("call"), "type": "function", "function": function})
    except (ValueError, LookupError, TypeError, RecursionError):
        calls = []
    if not calls:
        return schemas.AssistantMessage(content=answer.text)
    reasoning = parsed.get("reasoning_content") or parsed.get("thinking")
    return schemas.AssistantMessage(
        content=(parsed.get("content") or "").strip() or None, reasoning_content=reasoning, tool_calls=calls
    )


# ---- Responses to chat and text completions, complete or streamed


def wants_usage(body: schemas.GenerationRequest) -> bool:
    return body.stream_options is not None and bool(body.stream_options.include_usage)


class ChatResponse:
    """Writes the response to a chat. With tools, each answer is sent once it is complete."""

    def __init__(self, tokenizer: Any, body: schemas.ChatRequest, prompt: str, generation: Generation) -> None:
        self.tokenizer, self.body, self.prompt, self.generation = tokenizer, body, prompt, generation
        self.head: Json = {"id": new_id("chatcmpl"), "created": int(time.time()), "model": body.model}
        may_call = bool(body.tools) and body.tool_choice != "none"
        self.has_calls = may_call and response_template(tokenizer) is not None

    def choice(self, answer: Answer) -> schemas.ChatChoice:
        message = schemas.AssistantMessage(content=answer.text)
        reason: FinishReason = answer.finish_reason or "stop"
        if self.has_calls:
            tools = [tool.model_dump(exclude_none=True) for tool in self.body.tools or ()]
            message = parse_tool_calls(self.tokenizer, answer, self.prompt, tools)
            reason = "tool_calls" if message.tool_calls else reason
        logprobs = self.logprobs(answer.tokens)
        return schemas.ChatChoice(index=answer.index, message=message, logprobs=logprobs, finish_reason=reason)

    def logprobs(self, tokens: Sequence[Token]) -> Json | None:
        if not self.body.logprobs:
            return None

        name = text_of_token(self.tokenizer)

        def entry(token_id: int, logprob: float) -> Json:
            text = name(token_id)  # the bytes of an incomplete character are unknown
            return {"token": text, "logprob": logprob, "bytes": None if UNFINISHED in text else [*text.encode("utf-8")]}

        top = self.body.top_logprobs or 0
        content = [
            {**entry(token.id, token.logprob), "top_logprobs": [entry(*pair) for pair in token.top[:top]]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    async def complete(self) -> schemas.ChatCompletion:
        choices = [self.choice(answer) for answer in await self.generation.complete()]
        return schemas.ChatCompletion(**self.head, choices=choices, usage=self.generation.usage())

    def event(self, index: int, delta: Json, reason: str | None = None, tokens: Sequence[Token] = ()) -> Json:
        logprobs = self.logprobs(tokens) if tokens else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**self.head, "object": CHUNK, "choices": [choice]}

    async def stream(self) -> AsyncGenerator[Json]:
        for answer in self.generation.answers:
            yield self.event(answer.index, {"role": "assistant", "content": ""})
        if self.has_calls:
            for answer in await self.generation.complete():
                choice = self.choice(answer)
                delta: Json = {"content": choice.message.content}
                if choice.message.reasoning_content:
                    delta["reasoning_content"] = choice.message.reasoning_content
                if calls := choice.message.tool_calls:
                    delta["tool_calls"] = [{**call, "index": number} for number, call in enumerate(calls)]
                yield self.event(answer.index, delta, None, answer.tokens)
                yield self.event(answer.index, {}, choice.finish_reason)
        else:
            async for piece in self.generation.pieces():
                if piece.text or (piece.tokens and self.body.logprobs):
                    yield self.event(piece.index, {"content": piece.text}, None, piece.tokens)
                if piece.finish_reason is not None:
                    yield self.event(piece.index, {}, piece.finish_reason)
        if wants_usage(self.body):
            yield {**self.head, "object": CHUNK, "choices": [], "usage": self.generation.usage().model_dump()}


class CompletionResponse:
    """Writes the response to a text completion."""

    def __init__(self, tokenizer: Any, body: schemas.CompletionRequest, generation: Generation) -> None:
        self.tokenizer, self.body, self.generation = tokenizer, body, generation
        self.head: Json = {"id": new_id("cmpl"), "created": int(time.time()), "model": body.model}

    def choice(self, part: Answer | Piece) -> schemas.CompletionChoice:
        logprobs = None
        if (top := self.body.logprobs) is not None:
            logprobs = completion_logprobs(self.tokenizer, part, top)
        return schemas.CompletionChoice(
            index=part.index, text=part.text, logprobs=logprobs, finish_reason=part.finish_reason
        )

    async def complete(self) -> schemas.Completion:
        choices = [self.choice(answer) for answer in await self.generation.complete()]
        return schemas.Completion(**self.head, choices=choices, usage=self.generation.usage())

    async def stream(self) -> AsyncGenerator[Json]:
        head = {**self.head, "object": "text_completion"}
        async for piece in self.generation.pieces():
            yield {**head, "choices": [self.choice(piece).model_dump()]}
        if wants_usage(self.body):
            yield {**head, "choices": [], "usage": self.generation.usage().model_dump()}
