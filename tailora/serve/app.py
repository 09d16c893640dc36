"""The HTTP server: OpenAI's API, and vLLM's calls that load and unload adapters.

Errors have OpenAI's shape. Prompts and answers are never logged. What a client may ask for is bounded by
`ServerSettings`, so that no request disturbs the others.
"""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import PlainTextResponse, Response, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tailora import __version__
from tailora.data.chat_template import ChatTokenizer, fit_to_template
from tailora.data.messages import read_messages
from tailora.data.schemas import Conversation
from tailora.errors import DataError
from tailora.serve.answers import CancelledError, EngineError, Generation, Piece, make_answers, new_id
from tailora.serve.api_errors import ERRORS, ERRORS_OF_TEXT, TYPES, RequestError, add_error_handlers, error_body
from tailora.serve.engine_interface import Engine, SamplingParams, Token
from tailora.serve.playground import add_page
from tailora.serve.registry import AdapterRegistry
from tailora.serve.schemas import (
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatRequest,
    ChunkChoice,
    Completion,
    CompletionChoice,
    CompletionRequest,
    Delta,
    GenerationRequest,
    Health,
    LoadAdapterRequest,
    Model,
    ModelList,
    ToolCall,
    ToolCallDelta,
    UnloadAdapterRequest,
    Usage,
)
from tailora.serve.text import chat_logprobs, completion_logprobs, parse_tool_calls, response_template

COMPLETION_TOKENS = 16  # of /v1/completions without max_tokens, as OpenAI's
GONE = 499  # status in the metrics of a request whose client went away, as nginx counts it
EVENTS = {"text/event-stream": {"schema": {"type": "string"}}}


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Limits and keys.

    max_queue: answers that run or wait; more are refused with 429.    max_n: answers to one prompt.
    max_prompts: in one request.    max_body: bytes of a request; more are refused with 413.
    max_tokens: longest answer; None for what the model has positions for.
    drain_seconds: that a stopping server gives its requests.
    allowed_hosts: names under which the server may be asked; "*" for any.
    api_key, admin_key: of all requests, and of loading and unloading; None asks for none.
    """

    max_queue: int = 256
    max_n: int = 16
    max_prompts: int = 64
    max_body: int = 16 * 2**20
    max_tokens: int | None = None
    drain_seconds: float = 30.0
    allowed_hosts: tuple[str, ...] = ("*",)
    api_key: str | None = None
    admin_key: str | None = None


class Metrics:
    """What GET /metrics tells."""

    def __init__(self, engine: Engine, registry: AdapterRegistry) -> None:
        self.collector = CollectorRegistry()
        options: dict[str, Any] = {"registry": self.collector}
        self.requests = Counter("tailora_requests", "requests by model and status", ["model", "status"], **options)
        by_model: dict[str, Any] = {"labelnames": ["model"], **options}
        self.prompt_tokens = Counter("tailora_prompt_tokens", "tokens of prompts", **by_model)
        self.tokens = Counter("tailora_generation_tokens", "tokens of answers", **by_model)
        self.first_token = Histogram("tailora_time_to_first_token_seconds", "time to the first token", **by_model)
        Gauge("tailora_requests_running", "answers that run", **options).set_function(lambda: engine.load[0])
        Gauge("tailora_requests_waiting", "answers that wait", **options).set_function(lambda: engine.load[1])
        Gauge("tailora_adapters", "adapters by name", **options).set_function(lambda: len(registry.list()))
        Gauge("tailora_adapters_in_memory", "adapters in memory", **options).set_function(
            lambda: sum(adapter.in_memory for adapter in registry.list())
        )

    def forget(self, model: str) -> None:
        """Drops the counts of a model, so that names that come and go do not fill the memory."""
        for metric in (self.prompt_tokens, self.tokens, self.first_token):
            with suppress(KeyError):
                metric.remove(model)
        for status in (200, GONE, *TYPES):
            with suppress(KeyError):
                self.requests.remove(model, str(status))


class Server:
    """What the routes share. max_tokens and the queue are checked here, before the engine gets a request."""

    def __init__(self, engine: Engine, registry: AdapterRegistry, tokenizer: Any, settings: ServerSettings) -> None:
        self.engine, self.registry, self.tokenizer, self.settings = engine, registry, tokenizer, settings
        self.chat_tokenizer = ChatTokenizer.of(tokenizer)
        self.metrics = Metrics(engine, registry)
        self.answers = 0  # that the engine has
        self.is_draining = False

    def check_ready(self) -> None:
        if self.is_draining:
            raise RequestError(503, "the server is stopping")
        if not self.engine.is_alive:
            raise RequestError(503, "the engine does not run")

    def chat_prompt(self, body: ChatRequest) -> str:
        if self.chat_tokenizer.template is None:
            raise RequestError(400, "this model has no chat template: use /v1/completions", "messages")
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()] if body.tool_choice != "none" else []
        param = "messages"
        try:
            messages = read_messages([message.model_dump() for message in body.messages], "messages")
            param = "tools" if tools else param
            chat = Conversation(messages, first=len(messages), tools=tools or None)  # no message is trained
            chat = fit_to_template(chat, self.chat_tokenizer)
            return self.chat_tokenizer.render(chat.messages, tools=chat.tools, add_generation_prompt=True)
        except DataError as error:
            raise RequestError(400, str(error), param) from error

    def prompt_ids(self, prompt: Any) -> list[list[int]]:
        """Returns the ids of each prompt of a completion, which may be one or several, as text or as ids."""
        prompts = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
        size = len(self.tokenizer)
        result = []
        for text_or_ids in prompts:
            ids = list(self.tokenizer(text_or_ids)["input_ids"]) if isinstance(text_or_ids, str) else [*text_or_ids]
            if not ids:
                raise RequestError(400, "a prompt has no tokens", "prompt")
            if max(ids) >= size:
                raise RequestError(400, f"token {max(ids)} does not exist; the vocabulary has {size}", "prompt")
            result.append(ids)
        return result

    def params(
        self, body: GenerationRequest, max_tokens: int | None, longest: int, logprobs: int | None
    ) -> SamplingParams:
        """Raises RequestError for more tokens than the model or the settings allow."""
        room = self.engine.max_positions - longest
        if room < 1:
            raise RequestError(
                400,
                f"the prompt has {longest} tokens; with an answer, at most {self.engine.max_positions} fit",
                "messages" if isinstance(body, ChatRequest) else "prompt",
            )
        limit = min(room, self.settings.max_tokens or room)
        if max_tokens is not None and max_tokens > limit:
            raise RequestError(
                400,
                f"max_tokens = {max_tokens} after a prompt of {longest} tokens; at most {limit} are possible",
                "max_tokens",
            )
        seed = secrets.randbelow(2**63) if body.seed is None else body.seed % 2**63
        return SamplingParams(
            max_tokens=max_tokens or limit,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=max(body.top_k or 0, 0),
            seed=seed,
            logprobs=logprobs,
            ignore_eos=bool(body.ignore_eos),
        )

    async def start(self, body: GenerationRequest, prompts: Sequence[list[int]], params: SamplingParams) -> Generation:
        """Gives the engine a request. Raises RequestError if there are too many, or the model is unknown."""
        n = body.n or 1
        if n > self.settings.max_n:
            raise RequestError(400, f"n = {n}; at most {self.settings.max_n} are allowed", "n")
        if len(prompts) > self.settings.max_prompts:
            raise RequestError(
                400, f"{len(prompts)} prompts; at most {self.settings.max_prompts} are allowed", "prompt"
            )
        count = n * len(prompts)
        if count > self.settings.max_queue:
            raise RequestError(400, f"{count} answers; at most {self.settings.max_queue} can run or wait", "n")
        if self.answers + count > self.settings.max_queue:
            raise RequestError(429, f"{self.answers} answers are running or waiting: try again later")
        self.answers += count  # before the wait for files, so that others see them
        started = 0
        try:
            handle = await run_in_threadpool(self.registry.acquire, body.model, body.lora_scale)
            stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
            answers = make_answers(
                self.tokenizer,
                prompts,
                handle.key,
                params,
                n=n,
                stop_strings=stop,
                end_ids=frozenset(self.engine.eos_token_ids),
            )
            generation = Generation(self.engine, answers, handle, self._end_answer, self.model_label(body.model))
            started = count
            generation.start()
        finally:
            self.answers -= count - started
        self.metrics.prompt_tokens.labels(generation.model).inc(sum(map(len, prompts)))
        return generation

    def model_label(self, model: str) -> str:
        """Returns the name of a model in the metrics. Mixtures have one name, so that clients cannot make new ones."""
        names = {self.registry.base_name, *(adapter.name for adapter in self.registry.list())}
        return model if model in names else "mixture"

    def _end_answer(self) -> None:
        self.answers -= 1

    def usage(self, generation: Generation, prompts: Sequence[list[int]]) -> Usage:
        prompt_tokens, completion_tokens = sum(map(len, prompts)), generation.completion_tokens
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
        )

    async def pieces(self, generation: Generation) -> AsyncIterator[Piece]:
        """Yields the pieces of all answers; cancels them if the reader stops. Raises RequestError."""
        began, is_first = time.perf_counter(), True
        try:
            async for piece in generation.pieces():
                if is_first:
                    self.metrics.first_token.labels(generation.model).observe(time.perf_counter() - began)
                is_first = False
                self.metrics.tokens.labels(generation.model).inc(len(piece.tokens))
                if piece.finish_reason is not None:
                    self.engine.cancel(generation.answers[piece.index].request.id)  # after a stop string it goes on
                yield piece
        except CancelledError as error:
            raise RequestError(503, "the server is stopping") from error
        except EngineError as error:
            raise RequestError(500, f"the model could not answer: {error}") from error
        finally:
            generation.cancel()


# ---- Answers of both kinds, whole and streamed


@dataclass
class WholeAnswer:
    text: str = ""
    tokens: tuple[Token, ...] = ()
    finish_reason: str = "stop"


async def whole_answers(server: Server, generation: Generation) -> list[WholeAnswer]:
    answers = [WholeAnswer() for _ in generation.answers]
    async for piece in server.pieces(generation):
        answer = answers[piece.index]
        answer.text += piece.text
        answer.tokens += piece.tokens
        answer.finish_reason = piece.finish_reason or answer.finish_reason
    return answers


async def unless_disconnected(request: Request, task: Awaitable[Any]) -> Any:
    """Returns what the task returns, and cancels it when the client is gone."""
    work = asyncio.ensure_future(task)
    gone = asyncio.ensure_future(request.receive())  # the body is read: what comes next is the end of the connection
    done, _ = await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
    gone.cancel()
    if work not in done:
        work.cancel()
        await asyncio.wait({work})
        raise RequestError(GONE, "the client is gone")
    return work.result()


def event(body: BaseModel) -> str:
    return f"data: {body.model_dump_json(exclude_unset=True)}\n\n"


class EventStream(StreamingResponse):
    """The events of an answer as text; an error in it is an event, too.

    Cancels the answers when the client is gone, also before `events` has begun or while an event is sent.

    end: called once with the status that an answer which is not streamed would have had.
    """

    def __init__(
        self, events: AsyncGenerator[BaseModel], cancel: Callable[[], None], end: Callable[[int], None]
    ) -> None:
        self.texts = self._texts(events)
        super().__init__(self.texts, media_type="text/event-stream")
        self.events, self.cancel, self.end = events, cancel, end
        self.has_ended = False

    async def _texts(self, events: AsyncGenerator[BaseModel]) -> AsyncGenerator[str]:
        try:
            async for body in events:
                yield event(body)
            self._end(200)
        except RequestError as error:
            self._end(error.status)
            yield f"data: {json.dumps(error_body(error.status, error.message, error.param))}\n\n"
        yield "data: [DONE]\n\n"

    def _end(self, status: int) -> None:
        if not self.has_ended:
            self.has_ended = True
            self.end(status)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.cancel()
            await self.texts.aclose()
            await self.events.aclose()
            self._end(GONE)


class ChatAnswer:
    """Writes the answers to a chat. With tools, an answer is read as a whole before anything of it is sent."""

    def __init__(self, server: Server, body: ChatRequest, prompt: str, ids: list[int], generation: Generation) -> None:
        self.server, self.body, self.prompt, self.ids, self.generation = server, body, prompt, ids, generation
        self.head = {"id": new_id("chatcmpl"), "created": int(time.time()), "model": body.model}
        calls_are_possible = bool(body.tools) and body.tool_choice != "none"
        self.has_calls = calls_are_possible and response_template(server.tokenizer) is not None

    def message(self, answer: WholeAnswer) -> tuple[AssistantMessage, str]:
        """Returns the message and its finish reason."""
        if not self.has_calls:
            return AssistantMessage(content=answer.text), answer.finish_reason
        tools = [tool.model_dump(exclude_none=True) for tool in self.body.tools or ()]
        content, reasoning, calls = parse_tool_calls(self.server.tokenizer, answer.text, self.prompt, tools)
        tool_calls = [ToolCall(id=new_id("call"), function=call) for call in calls] or None
        message = AssistantMessage(content=content, reasoning_content=reasoning, tool_calls=tool_calls)
        return message, "tool_calls" if calls else answer.finish_reason

    def logprobs(self, tokens: Sequence[Token]) -> Any:
        if not self.body.logprobs:
            return None
        return chat_logprobs(self.server.tokenizer, tokens, self.body.top_logprobs or 0)

    async def whole(self) -> ChatCompletion:
        choices = []
        for index, answer in enumerate(await whole_answers(self.server, self.generation)):
            message, reason = self.message(answer)
            choices.append(
                ChatChoice(index=index, message=message, logprobs=self.logprobs(answer.tokens), finish_reason=reason)
            )
        return ChatCompletion(**self.head, choices=choices, usage=self.server.usage(self.generation, [self.ids]))

    def chunk(self, index: int, delta: Delta, reason: str | None = None, tokens: Sequence[Token] = ()) -> BaseModel:
        logprobs = self.logprobs(tokens) if tokens else None
        choice = ChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=reason)
        return ChatCompletionChunk(**self.head, object="chat.completion.chunk", choices=[choice])

    async def stream(self) -> AsyncGenerator[BaseModel]:
        for index in range(len(self.generation.answers)):
            yield self.chunk(index, Delta(role="assistant", content=""))
        if self.has_calls:
            for index, answer in enumerate(await whole_answers(self.server, self.generation)):
                message, reason = self.message(answer)
                calls = [
                    ToolCallDelta(**call.model_dump(), index=number)
                    for number, call in enumerate(message.tool_calls or ())
                ]
                delta = Delta(**{"tool_calls": calls} if calls else {}, content=message.content)
                yield self.chunk(index, delta, None, answer.tokens)
                yield self.chunk(index, Delta(), reason)
        else:
            async for piece in self.server.pieces(self.generation):
                if piece.text or (piece.tokens and self.body.logprobs):
                    yield self.chunk(piece.index, Delta(content=piece.text), None, piece.tokens)
                if piece.finish_reason is not None:
                    yield self.chunk(piece.index, Delta(), piece.finish_reason)
        if self.body.stream_options is not None and self.body.stream_options.include_usage:
            usage = self.server.usage(self.generation, [self.ids])
            yield ChatCompletionChunk(**self.head, object="chat.completion.chunk", choices=[], usage=usage)


class CompletionAnswer:
    """Writes the answers to plain prompts."""

    def __init__(self, server: Server, body: CompletionRequest, ids: list[list[int]], generation: Generation) -> None:
        self.server, self.body, self.ids, self.generation = server, body, ids, generation
        self.head = {"id": new_id("cmpl"), "created": int(time.time()), "model": body.model}

    def choice(
        self, index: int, text: str, tokens: Sequence[Token], reason: str | None, offset: int = 0
    ) -> CompletionChoice:
        logprobs = None
        if self.body.logprobs is not None:
            as_ids = bool(self.body.return_tokens_as_token_ids)
            logprobs = completion_logprobs(
                self.server.tokenizer, tokens, self.body.logprobs, offset=offset, as_ids=as_ids
            )
        return CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=reason)

    async def whole(self) -> Completion:
        answers = await whole_answers(self.server, self.generation)
        choices = [
            self.choice(index, answer.text, answer.tokens, answer.finish_reason) for index, answer in enumerate(answers)
        ]
        return Completion(**self.head, choices=choices, usage=self.server.usage(self.generation, self.ids))

    async def stream(self) -> AsyncGenerator[BaseModel]:
        offsets = [0] * len(self.generation.answers)
        async for piece in self.server.pieces(self.generation):
            choice = self.choice(piece.index, piece.text, piece.tokens, piece.finish_reason, offsets[piece.index])
            offsets[piece.index] += len(piece.text)
            yield Completion(**self.head, object="text_completion", choices=[choice])
        if self.body.stream_options is not None and self.body.stream_options.include_usage:
            usage = self.server.usage(self.generation, self.ids)
            yield Completion(**self.head, object="text_completion", choices=[], usage=usage)


# ---- Keys, and the size of a request


def key_checks(keys: Mapping[str, str | None]) -> list[Any]:
    """Returns the dependency of routes that ask for the first of these keys that is set; none if none is.

    keys: by the name that the OpenAPI description gives them.
    """
    name, key = next(((name, key) for name, key in keys.items() if key), ("", None))
    if key is None:
        return []
    scheme = HTTPBearer(scheme_name=name, auto_error=False)

    async def check(given: Annotated[HTTPAuthorizationCredentials | None, Depends(scheme)]) -> None:
        if given is None or not secrets.compare_digest(given.credentials.encode(), key.encode()):
            raise RequestError(401, "the API key is missing or wrong: send Authorization: Bearer KEY")

    return [Depends(check)]


class BodyLimit:
    """Middleware that refuses a request with a larger body, and keeps no more of it than that in memory."""

    def __init__(self, app: ASGIApp, max_body: int) -> None:
        self.app, self.max_body = app, max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        size = 0

        async def receive_limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.max_body:
                raise HTTPException(413, f"the request is too large: at most {self.max_body:,} bytes are read")
            return message

        await self.app(scope, receive_limited, send)


# ---- The app


def create_app(engine: Engine, registry: AdapterRegistry, tokenizer: Any, settings: ServerSettings) -> FastAPI:
    """Returns the app of an engine that runs; its end stops the engine."""
    server = Server(engine, registry, tokenizer, settings)

    @asynccontextmanager
    async def stop_engine(_: FastAPI) -> AsyncIterator[None]:
        yield
        server.is_draining = True
        await run_in_threadpool(engine.stop, settings.drain_seconds)

    app = FastAPI(title="tailora", version=__version__, lifespan=stop_engine, docs_url=None, redoc_url=None)
    app.state.server = server
    app.add_middleware(BodyLimit, max_body=settings.max_body)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*settings.allowed_hosts])
    add_error_handlers(app)
    add_page(app)
    add_generation(app, server)
    add_adapter_routes(app, server)
    add_health(app, server)

    @app.middleware("http")
    async def count_requests(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await call_next(request)
        if request.method == "POST" and not getattr(request.state, "is_streamed", False):  # those count at their end
            server.metrics.requests.labels(getattr(request.state, "model", ""), str(response.status_code)).inc()
        return response

    return app


def add_generation(app: FastAPI, server: Server) -> None:
    check = key_checks({"apiKey": server.settings.api_key})

    async def respond(request: Request, body: GenerationRequest, answer: ChatAnswer | CompletionAnswer) -> Any:
        model = request.state.model = answer.generation.model

        def count(status: int) -> None:
            server.metrics.requests.labels(model, str(status)).inc()

        request.state.is_streamed = bool(body.stream)
        if body.stream:
            return EventStream(answer.stream(), answer.generation.cancel, count)
        return await unless_disconnected(request, answer.whole())

    def check_request(body: GenerationRequest) -> None:
        server.check_ready()
        if body.stream_options is not None and not body.stream:
            raise RequestError(400, "stream_options are only for stream = true", "stream_options")

    @app.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses={**ERRORS, 200: {"content": EVENTS}},
        dependencies=check,
    )
    async def chat_completions(body: ChatRequest, request: Request) -> Any:
        check_request(body)
        if body.top_logprobs is not None and not body.logprobs:
            raise RequestError(400, "top_logprobs are only for logprobs = true", "top_logprobs")
        prompt = await run_in_threadpool(server.chat_prompt, body)
        ids = await run_in_threadpool(server.chat_tokenizer.token_ids, prompt)
        count = (body.top_logprobs or 0) if body.logprobs else None
        params = server.params(body, body.max_completion_tokens or body.max_tokens, len(ids), count)
        answer = ChatAnswer(server, body, prompt, ids, await server.start(body, [ids], params))
        return await respond(request, body, answer)

    @app.post(
        "/v1/completions",
        response_model=Completion,
        responses={**ERRORS, 200: {"content": EVENTS}},
        dependencies=check,
    )
    async def completions(body: CompletionRequest, request: Request) -> Any:
        check_request(body)
        ids = await run_in_threadpool(server.prompt_ids, body.prompt)
        longest = max(map(len, ids))
        room = max(server.engine.max_positions - longest, 1)
        params = server.params(body, body.max_tokens or min(COMPLETION_TOKENS, room), longest, body.logprobs)
        answer = CompletionAnswer(server, body, ids, await server.start(body, ids, params))
        return await respond(request, body, answer)

    @app.get("/v1/models", responses=ERRORS, dependencies=check)
    async def models() -> ModelList:
        base, length = server.registry.base_name, server.engine.max_positions
        data = [Model(id=base, created=0, root=base, parent=None, max_model_len=length)]
        data += [
            Model(id=adapter.name, created=adapter.created, root=adapter.name, parent=base, max_model_len=length)
            for adapter in server.registry.list()
        ]
        return ModelList(data=data)


def add_adapter_routes(app: FastAPI, server: Server) -> None:
    check = key_checks({"adminKey": server.settings.admin_key, "apiKey": server.settings.api_key})
    text: dict[str, Any] = {"response_class": PlainTextResponse, "responses": ERRORS_OF_TEXT, "dependencies": check}

    @app.post("/v1/load_lora_adapter", **text)
    async def load_lora_adapter(body: LoadAdapterRequest) -> str:
        server.check_ready()
        await run_in_threadpool(server.registry.load, body.lora_name, body.lora_path, replace=body.load_inplace)
        return f"Success: LoRA adapter '{body.lora_name}' added successfully."

    @app.post("/v1/unload_lora_adapter", **text)
    async def unload_lora_adapter(body: UnloadAdapterRequest) -> str:
        await run_in_threadpool(server.registry.unload, body.lora_name)
        server.metrics.forget(body.lora_name)
        return f"Success: LoRA adapter '{body.lora_name}' removed successfully."


def add_health(app: FastAPI, server: Server) -> None:
    @app.get("/health", responses={503: ERRORS[503]})
    async def health() -> Health:
        """Alive: the process answers, and its engine runs."""
        if not server.engine.is_alive and not server.is_draining:
            raise RequestError(503, "the engine does not run")
        return Health(status="ok")

    @app.get("/ready", responses={503: ERRORS[503]})
    async def ready() -> Health:
        server.check_ready()
        return Health(status="ready")

    check = key_checks({"apiKey": server.settings.api_key})

    @app.get("/metrics", response_class=PlainTextResponse, responses={401: ERRORS_OF_TEXT[401]}, dependencies=check)
    async def metrics() -> Response:
        return Response(generate_latest(server.metrics.collector), media_type=CONTENT_TYPE_LATEST)
