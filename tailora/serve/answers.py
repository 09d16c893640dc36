"""The answers to a request: prompts go to the engine, and its tokens come back as pieces of text.

A `Generation` is what one client asked for: every answer to every prompt. The engine calls back in its own thread;
all else here runs in the thread of the event loop.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from tailora.errors import AdapterError
from tailora.serve.engine_interface import Engine, EventHandler, Finish, Request, SamplingParams, Token
from tailora.serve.text import Detokenizer, StopStrings


class Handle(Protocol):
    """Keeps an adapter in memory: AdapterHandle of serve/registry.py."""

    @property
    def key(self) -> str | None: ...

    def release(self) -> None: ...


class CancelledError(Exception):
    """The answers end early: the client is gone, or the server stops."""


class EngineError(Exception):
    """The engine could not compute an answer."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What is new of one answer.

    index: of the answer.    tokens: with their log-probabilities; the text of some may come in a later piece.
    finish_reason: None until the last piece.
    """

    index: int
    text: str
    tokens: tuple[Token, ...]
    finish_reason: str | None = None


class Answer:
    """One answer while it is written."""

    def __init__(
        self, index: int, tokenizer: Any, request: Request, stop_strings: Sequence[str], end_ids: frozenset[int]
    ) -> None:
        self.request = request
        self.token_ids: list[int] = []
        self.has_ended = False
        self._index, self._end_ids = index, end_ids
        self._detokenizer = Detokenizer(tokenizer, request.prompt_ids)
        self._stop_strings = StopStrings(stop_strings)

    def add(self, token: Token) -> Piece:
        """Ends the answer if a stop string is in it now."""
        self.token_ids.append(token.id)
        if token.id in self._end_ids and not self.request.params.ignore_eos:
            return Piece(self._index, "", (token,))
        text, self.has_ended = self._stop_strings.add(self._detokenizer.add(token.id))
        return Piece(self._index, text, (token,), "stop" if self.has_ended else None)

    def finish(self, finish: Finish) -> Piece:
        """Raises CancelledError or EngineError for an answer that is not whole."""
        if finish.reason == "cancelled":
            raise CancelledError
        if finish.reason == "error":
            raise EngineError(finish.message)
        self.has_ended = True
        text, is_stopped = self._stop_strings.add(self._detokenizer.rest())
        if not is_stopped:
            text += self._stop_strings.rest()
        return Piece(self._index, text, (), "stop" if is_stopped else finish.reason)


class Generation:
    """All answers to one request, in the order of the prompts.

    handle: of the adapter; it is released when the engine has ended the last answer.
    on_end: called once for each answer that the engine has ended.    model: its name in the metrics.
    """

    def __init__(
        self, engine: Engine, answers: Sequence[Answer], handle: Handle, on_end: Callable[[], None], model: str
    ) -> None:
        self.answers, self.model = answers, model
        self._engine, self._handle, self._on_end = engine, handle, on_end
        self._events: asyncio.Queue[tuple[Answer, Token | Finish]] = asyncio.Queue()
        self._in_engine = len(answers)

    def start(self) -> None:
        """Gives the engine all answers. Raises EngineError if it takes no more."""
        loop = asyncio.get_running_loop()

        def handler(answer: Answer) -> EventHandler:
            def handle(event: Token | Finish) -> None:
                loop.call_soon_threadsafe(self._receive, answer, event)

            return handle

        for number, answer in enumerate(self.answers):
            try:
                self._engine.submit(answer.request, handler(answer))
            except (AdapterError, RuntimeError) as error:
                for other in self.answers[number:]:
                    self._receive(other, Finish("cancelled"))
                self.cancel()
                raise EngineError(str(error)) from error

    def _receive(self, answer: Answer, event: Token | Finish) -> None:
        self._events.put_nowait((answer, event))
        if isinstance(event, Finish):
            self._in_engine -= 1
            self._on_end()
            if not self._in_engine:
                self._handle.release()

    def cancel(self) -> None:
        """Ends what the engine still computes. Can be called again."""
        for answer in self.answers:
            self._engine.cancel(answer.request.id)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Yields the pieces of all answers as they come. Raises CancelledError or EngineError."""
        while not all(answer.has_ended for answer in self.answers):
            answer, event = await self._events.get()
            if answer.has_ended:
                continue  # what the engine computed before it knew of a stop string
            yield answer.add(event) if isinstance(event, Token) else answer.finish(event)

    @property
    def completion_tokens(self) -> int:
        return sum(len(answer.token_ids) for answer in self.answers)


def make_answers(
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    adapter: str | None,
    params: SamplingParams,
    *,
    n: int,
    stop_strings: Sequence[str],
    end_ids: frozenset[int],
) -> list[Answer]:
    """Returns n answers for each prompt, with consecutive seeds."""
    name = new_id("request")
    answers = []
    for number, prompt_ids in enumerate(prompts):
        for sample in range(n):
            index = number * n + sample
            seed = (params.seed + sample) % 2**63
            request = Request(f"{name}-{index}", tuple(prompt_ids), adapter, replace(params, seed=seed))
            answers.append(Answer(index, tokenizer, request, stop_strings, end_ids))
    return answers


def new_id(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(12)}"
