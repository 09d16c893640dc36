"""The HTTP server: OpenAI's API, and vLLM's calls for loading and unloading adapters.

Errors have OpenAI's format. Prompts and answers are never logged. `ServerSettings` and the constants below limit what
a client may request, so no request can starve the others.
"""

import asyncio
import copy
import gc
import itertools
import json
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from socket import socket
from typing import Annotated, Any

import uvicorn
from anyio import CapacityLimiter, to_thread
from fastapi import Depends, FastAPI, Request
from fastapi.responses import PlainTextResponse, Response, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from tailora import __version__
from tailora.data.chat_template import ChatTokenizer, fit_to_template
from tailora.data.image_processor import text_tokenizer
from tailora.data.image_tokens import media_ids
from tailora.data.images import Image, images_of
from tailora.data.messages import Messages, marked_messages, text_value
from tailora.data.samples import Conversation
from tailora.engine.interface import Engine, SamplingParams
from tailora.engine.interface import Request as EngineRequest
from tailora.engine.sampling import json_matcher
from tailora.errors import DataError
from tailora.serve import schemas
from tailora.serve.answers import Answer, ChatResponse, CompletionResponse, Generation, Json
from tailora.serve.images import decode_images
from tailora.serve.metrics import Metrics
from tailora.serve.playground import add_page
from tailora.serve.registry import SCALE_MARK, AdapterRegistry
from tailora.serve.schemas import ERRORS, ERRORS_OF_TEXT, GenerationRequest, RequestError, new_id
from tailora.train.generate import image_obstacle

COMPLETION_TOKENS = 16  # for /v1/completions without max_tokens, as in OpenAI's API
LARGEST_BODY = 4 * 2**20  # bytes; parsing 16 MiB of JSON would block all other requests for seconds
LARGEST_WITH_IMAGES = 24 * 2**20  # bytes; a long text takes little time, but values do
MOST_VALUES = LARGEST_BODY // 2  # commas and opening brackets, which bound the number of values
MOST_IN_PROGRESS = 512 * 2**20  # bytes of all requests in progress
IMAGE_THREADS = 2  # that read images; other requests do not wait for them
REQUEST_SECONDS = 30.0  # minimum time that a client has to send a request
LAST_SECONDS = 5  # at shutdown, for answers that end when the engine stops
GONE = 499  # status in the metrics of a request whose client disconnected, as in nginx


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Limits and keys."""

    max_queue: int = 256  # limit for running and waiting answers; further requests get status 429
    max_tokens: int | None = None  # limit for each answer; None for the model's own limit
    max_image_pixels: int = 16_000_000  # limit for each image; a larger one would delay all requests for seconds
    drain_seconds: float = 30.0  # seconds that running requests get to finish at shutdown
    allowed_hosts: tuple[str, ...] = ("*",)  # host names that requests may use; "*" for any
    api_key: str | None = None  # required for all requests; None for no key
    admin_key: str | None = None  # required to load and unload adapters; None for the API key


class Server:
    """State shared by the routes. Validates requests before they reach the engine."""

    def __init__(self, engine: Engine, registry: AdapterRegistry, tokenizer: Any, settings: ServerSettings) -> None:
        self.engine, self.registry, self.settings = engine, registry, settings
        self.tokenizer = text_tokenizer(tokenizer)
        self.chat_tokenizer = ChatTokenizer.of(tokenizer)
        self.image_obstacle = image_obstacle(engine.adapter_set.base_model, tokenizer)
        self.media_ids = frozenset(media_ids(self.chat_tokenizer.processor))
        self.image_threads = CapacityLimiter(IMAGE_THREADS)
        engine.processor = copy.deepcopy(self.chat_tokenizer.processor)  # a tokenizer that pads is not thread-safe
        self.metrics = Metrics(engine, registry)
        self.answers = 0  # running or waiting
        self.is_draining = self.is_hurried = False
        self.longest_text = engine.max_positions * max(map(len, self.tokenizer.get_vocab()))  # that could fit

    def check_ready(self) -> None:
        if self.is_draining:
            raise RequestError(503, "the server is shutting down")
        if not self.engine.is_alive:
            raise RequestError(503, "the engine is not running")

    async def drain(self) -> None:
        """Refuses new requests, waits up to `drain_seconds` for running ones unless `is_hurried`, stops the engine."""
        self.is_draining = True
        end = time.monotonic() + self.settings.drain_seconds
        while self.answers and not self.is_hurried and time.monotonic() < end:
            await asyncio.sleep(0.05)
        await run_in_threadpool(self.engine.stop)

    def check_length(self, text: str, param: str) -> None:
        """Raises RequestError for a text that is too long however it is tokenized, which would take long."""
        if len(text) > self.longest_text:
            raise RequestError(
                400,
                f"the prompt has {len(text):,} characters, but at most {self.longest_text:,} can fit into "
                f"{self.engine.max_positions:,} tokens; shorten the prompt",
                param,
            )

    def chat_prompt(self, body: schemas.ChatRequest) -> tuple[str, list[int], tuple[Image, ...]]:
        """Returns the text of a chat, its ids with the tokens of its images, and these. Raises RequestError."""
        if self.chat_tokenizer.template is None:
            raise RequestError(400, "this model has no chat template; use /v1/completions", "messages")
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()] if body.tool_choice != "none" else []
        param = "messages"
        try:
            marked = marked_messages([message.model_dump() for message in body.messages], "messages")
            messages = [message for message, _ in marked]
            messages = decode_images(messages, self.image_obstacle, self.settings.max_image_pixels)
            messages = with_system(messages, self.registry.system_message(body.model))
            param = "tools" if tools else param
            chat = Conversation(messages, first=len(messages), tools=tools or None)
            chat = fit_to_template(chat, self.chat_tokenizer)
            prompt = self.chat_tokenizer.render(chat.messages, tools=chat.tools, add_generation_prompt=True)
        except DataError as error:
            raise RequestError(400, str(error), param) from error
        self.check_length(prompt, param)
        return prompt, self.chat_tokenizer.chat_ids(prompt), images_of(chat.messages)

    def prompts(self, prompt: Any) -> list[list[int]]:
        """Returns the token ids of each prompt. prompt: one or several, as text or token ids."""
        prompts = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
        size = len(self.tokenizer)
        result = []
        for ids in prompts:
            if isinstance(ids, str):
                self.check_length(ids, "prompt")
                try:
                    ids = list(self.tokenizer(text_value(ids, "the prompt"))["input_ids"])
                except DataError as error:
                    raise RequestError(400, str(error), "prompt") from error
            if not ids:
                raise RequestError(400, "a prompt is empty; expected at least one token", "prompt")
            if not self.media_ids.isdisjoint(ids):
                message = "a prompt contains tokens of images, videos or audio; use /v1/chat/completions"
                raise RequestError(400, message, "prompt")
            if max(ids) >= size:
                raise RequestError(400, f"expected token ids below {size}, got {max(ids)}", "prompt")
            result.append(ids)
        return result

    def params(
        self,
        body: GenerationRequest,
        max_tokens: int | None,
        longest: int,
        logprobs: int | None,
        default: int | None = None,
    ) -> SamplingParams:
        """default: of max_tokens, if it fits. Raises RequestError for more than the model or the settings allow."""
        room = self.engine.max_positions - longest
        if room < 1:
            raise RequestError(
                400,
                f"the prompt has {longest} tokens; the limit for prompt and response together is "
                f"{self.engine.max_positions}; shorten the prompt",
                "messages" if isinstance(body, schemas.ChatRequest) else "prompt",
            )
        limit = min(room, self.settings.max_tokens or room)
        if max_tokens is not None and max_tokens > limit:
            raise RequestError(
                400,
                f"max_tokens = {max_tokens} is too large for a prompt of {longest} tokens; use at most {limit}",
                "max_tokens",
            )
        return SamplingParams(
            max_tokens=max_tokens or min(default or limit, limit),
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=max(body.top_k or 0, 0),
            seed=secrets.randbelow(2**63) if body.seed is None else body.seed % 2**63,
            logprobs=logprobs,
            ignore_eos=bool(body.ignore_eos),
        )

    def grammar(self, body: schemas.ChatRequest) -> LLMatcher | None:
        """Returns the grammar of the answers; None for any text. Raises RequestError for an unsupported schema."""
        wanted = body.response_format
        if wanted is None or isinstance(wanted, schemas.TextFormat):
            return None
        if body.tools and body.tool_choice != "none":
            raise RequestError(400, "JSON output cannot be combined with tools; use only one", "response_format")
        schema = wanted.json_schema.json_schema if isinstance(wanted, schemas.JSONSchemaFormat) else {"type": "object"}
        try:
            return json_matcher(schema, self.grammar_tokenizer)
        except ValueError as error:
            raise RequestError(400, f"response_format: {error}", "response_format") from error

    @cached_property
    def grammar_tokenizer(self) -> LLTokenizer:
        """The tokenizer in llguidance's form; takes about a second. Raises ValueError if it is not a fast tokenizer."""
        return from_tokenizer(self.tokenizer, eos_token=sorted(self.engine.eos_token_ids) or None)

    async def start(
        self,
        body: GenerationRequest,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        grammar: LLMatcher | None = None,
        images: tuple[Image, ...] = (),
    ) -> Generation:
        """Submits a request to the engine. Raises RequestError if it is invalid, or if there are too many."""
        if body.stream_options is not None and not body.stream:
            raise RequestError(400, "stream_options requires stream = true", "stream_options")
        n, most = body.n or 1, self.settings.max_queue
        count = n * len(prompts)
        if count > most:
            raise RequestError(400, f"{count} completions requested; the limit is {most}. Use a smaller n", "n")
        if self.answers + count > most:
            raise RequestError(429, f"{self.answers} completions are already running or waiting; try again later")
        self.answers += count  # before waiting for files
        try:
            handle = await run_in_threadpool(self.registry.acquire, body.model, body.lora_scale)
        except BaseException:
            self.answers -= count
            raise
        stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
        name, answers = new_id("request"), list[Answer]()
        for index, (prompt, sample) in enumerate(itertools.product(prompts, range(n))):
            of_sample = replace(params, seed=(params.seed + sample) % 2**63)
            own = None if grammar is None else grammar.deep_copy()
            request = EngineRequest(f"{name}-{index}", tuple(prompt), handle.key, of_sample, own, images)
            answers.append(Answer(index, self.tokenizer, request, stop, self.engine.eos_token_ids))
        # The name in the metrics, without the scale: clients can invent any number of scales
        is_base = body.model == self.registry.base_name
        model = body.model if is_base else body.model.partition(SCALE_MARK)[0]
        tokens = sum(map(len, prompts))
        generation = Generation(self.engine, answers, model, tokens, self.metrics, handle, self._end_answer)
        generation.start()
        self.metrics.prompt_tokens.labels(model).inc(tokens)
        return generation

    def _end_answer(self) -> None:
        self.answers -= 1

    # ---- The routes that generate text

    async def chat_completions(self, body: schemas.ChatRequest, request: Request) -> Any:
        self.check_ready()
        if body.top_logprobs is not None and not body.logprobs:
            raise RequestError(400, "top_logprobs requires logprobs = true", "top_logprobs")
        has_images = any(part.image_url for message in body.messages for part in message.content or ())
        threads = self.image_threads if has_images else None
        text, ids, images = await to_thread.run_sync(self.chat_prompt, body, limiter=threads)
        count = (body.top_logprobs or 0) if body.logprobs else None
        params = self.params(body, body.max_completion_tokens or body.max_tokens, len(ids), count)
        grammar = await run_in_threadpool(self.grammar, body)
        generation = await self.start(body, [ids], params, grammar, images)
        return await self.respond(request, body, ChatResponse(self.tokenizer, body, text, generation))

    async def completions(self, body: schemas.CompletionRequest, request: Request) -> Any:
        self.check_ready()
        prompts = await run_in_threadpool(self.prompts, body.prompt)
        params = self.params(body, body.max_tokens, max(map(len, prompts)), body.logprobs, COMPLETION_TOKENS)
        generation = await self.start(body, prompts, params)
        return await self.respond(request, body, CompletionResponse(self.tokenizer, body, generation))

    async def respond(
        self, request: Request, body: GenerationRequest, response: ChatResponse | CompletionResponse
    ) -> Any:
        """Returns the response, or a stream of its events."""
        model = request.state.model = response.generation.model
        request.state.is_streamed = bool(body.stream)
        if not body.stream:
            return await unless_disconnected(request, response.complete())
        return EventStream(
            response.stream(),
            response.generation.cancel,
            lambda status: self.metrics.requests.labels(model, str(status)).inc(),
        )

    async def models(self) -> schemas.ModelList:
        base = self.registry.base_name
        models = [(base, 0, self.registry.base_system)]
        models += [(adapter.name, adapter.created, adapter.system) for adapter in self.registry.list()]
        data = [
            schemas.Model(
                id=name,
                created=created,
                root=name,
                parent=None if name == base else base,
                max_model_len=self.engine.max_positions,
                input_modalities=["text"] if self.image_obstacle else ["text", "image"],
                system_message=system,
            )
            for name, created, system in models
        ]
        return schemas.ModelList(data=data)


def with_system(messages: Messages, system: str | None) -> Messages:
    """Adds the system message used in training, unless the chat has one. An empty one means none."""
    own = [message for message in messages if message["role"] in ("system", "developer")]
    if system is None or any(message["content"] for message in own):
        return messages
    if own:
        return [message for message in messages if message not in own] or messages
    return [{"role": "system", "content": system}, *messages]


# ---- Answers, complete or streamed


async def unless_disconnected(request: Request, task: Awaitable[Any]) -> Any:
    """Returns the task's result; cancels the task if the client disconnects."""
    work = asyncio.ensure_future(task)
    gone = asyncio.ensure_future(request.receive())  # the body has been read, so the next message is the disconnect
    done, _ = await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
    gone.cancel()
    if work not in done:
        work.cancel()
        await asyncio.wait({work})
        raise RequestError(GONE, "the client disconnected")
    return work.result()


class EventStream(StreamingResponse):
    """Streams events as text. An error becomes an event, too.

    Cancels the answers when the client disconnects, even before `events` has begun or while an event is being sent.

    end: called once with the status that the response would have had without streaming.
    """

    def __init__(self, events: AsyncGenerator[Json], cancel: Callable[[], None], end: Callable[[int], None]) -> None:
        self.texts = self._texts(events)
        super().__init__(self.texts, media_type="text/event-stream")
        self.cancel, self.end = cancel, end
        self.has_ended = False

    async def _texts(self, events: AsyncGenerator[Json]) -> AsyncGenerator[str]:
        async with aclosing(events):
            try:
                async for event in events:
                    yield f"data: {json.dumps(event, ensure_ascii=False)}\n\n"
                self._end(200)
            except RequestError as error:
                self._end(error.status)
                yield f"data: {json.dumps(schemas.error_body(error.status, error.message, error.param))}\n\n"
        yield "data: [DONE]\n\n"

    def _end(self, status: int) -> None:  # before the last event, after which a client may look at the metrics
        if not self.has_ended:
            self.has_ended = True
            self.end(status)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.cancel()
            await self.texts.aclose()
            self._end(GONE)


# ---- Keys, and the size of a request


def key_check(name: str, key: str | None) -> list[Any]:
    """Returns the dependencies of routes that require this key; none if it is not set. name: in the OpenAPI schema."""
    if key is None:
        return []
    scheme = HTTPBearer(scheme_name=name, auto_error=False)

    async def check(given: Annotated[HTTPAuthorizationCredentials | None, Depends(scheme)]) -> None:
        if given is None or not secrets.compare_digest(given.credentials.encode(), key.encode()):
            raise RequestError(401, "the API key is missing or wrong; send the header Authorization: Bearer KEY")

    return [Depends(check)]


class BodyLimit:
    """Middleware that refuses a request with a body that is too large, without reading all of it.

    in_progress: bytes of all requests in progress.
    """

    def __init__(self, app: ASGIApp, has_images: bool) -> None:
        self.app, self.has_images, self.in_progress = app, has_images, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        size = values = 0

        async def receive_limited() -> Message:
            nonlocal size, values
            message = await receive()
            body = message.get("body", b"")
            size += len(body)
            self.in_progress += len(body)
            values += sum(body.count(mark) for mark in (b",", b"[", b"{"))
            largest = LARGEST_WITH_IMAGES if self.has_images else LARGEST_BODY
            if size > largest:
                raise HTTPException(413, f"the request is too large; the limit is {largest:,} bytes")
            if values > MOST_VALUES:
                raise HTTPException(413, f"the request has too many values; the limit is {MOST_VALUES:,}")
            if self.in_progress > MOST_IN_PROGRESS:
                raise HTTPException(
                    503, "the requests in progress already fill the memory for requests; try again later"
                )
            return message

        try:
            await self.app(scope, receive_limited, send)
        finally:
            self.in_progress -= size


class Connection(H11Protocol):
    """Closes itself if a client takes too long to send a request: after one to two times REQUEST_SECONDS."""

    def connection_made(self, *args: Any) -> None:
        super().connection_made(*args)
        self.loop.call_later(REQUEST_SECONDS, self._check, None)

    def _check(self, last_request: object) -> None:
        if self.waits_for_client and self.cycle is last_request:
            self.transport.close()
        elif not self.transport.is_closing():
            self.loop.call_later(REQUEST_SECONDS, self._check, self.cycle)

    @property
    def waits_for_client(self) -> bool:
        """True if the next request has not begun, or its head or body is incomplete."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body


class HTTPServer(uvicorn.Server):
    """Serves an app of `create_app`. The first Ctrl-C lets running answers finish; a second one ends them."""

    def __init__(self, config: uvicorn.Config, core: Server, note: Callable[[str], None]) -> None:
        super().__init__(config)
        self.core, self.note = core, note

    def handle_exit(self, sig: int, frame: Any) -> None:
        is_second = self.should_exit and not self.core.is_hurried
        super().handle_exit(sig, frame)
        if is_second:  # answers end with an error; only a third Ctrl-C drops the connections
            self.core.is_hurried, self.force_exit = True, False

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        for connection in list(self.server_state.connections):
            if isinstance(connection, Connection) and connection.waits_for_client:
                connection.transport.close()
        if count := self.core.answers:
            what = f"up to {self.core.settings.drain_seconds:g} s for {count} completion{'s' if count > 1 else ''}"
            self.note(f"shutting down: waiting {what}; press Ctrl-C again to stop now")
        draining = asyncio.create_task(self.core.drain())
        await super().shutdown(sockets)
        await draining


def run_server(app: FastAPI, listener: socket, note: Callable[[str], None]) -> None:
    """Serves an app of `create_app` until Ctrl-C or SIGTERM."""
    server: Server = app.state.server
    graceful = int(server.settings.drain_seconds) + LAST_SECONDS
    config = uvicorn.Config(app, http=Connection, log_level="warning", timeout_graceful_shutdown=graceful)
    gc.collect()
    gc.freeze()  # scanning all modules again would pause all requests for 0.2 s
    try:
        with suppress(KeyboardInterrupt):  # uvicorn raises the signal again at the end
            HTTPServer(config, server, note).run(sockets=[listener])
    finally:
        gc.unfreeze()


# ---- The app


def create_app(engine: Engine, registry: AdapterRegistry, tokenizer: Any, settings: ServerSettings) -> FastAPI:
    """Returns the app of a running engine. Run it with `HTTPServer`, whose shutdown stops the engine."""
    server = Server(engine, registry, tokenizer, settings)
    app = FastAPI(title="tailora", version=__version__, docs_url=None, redoc_url=None)
    app.state.server = server
    app.add_middleware(BodyLimit, has_images=not server.image_obstacle)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*settings.allowed_hosts])
    schemas.add_error_handlers(app)
    add_page(app)
    add_generation(app, server)
    add_adapter_routes(app, server)
    add_health(app, server)

    @app.middleware("http")
    async def count_requests(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        response = await call_next(request)
        is_streamed = getattr(request.state, "is_streamed", False)  # counted at its end
        if request.method == "POST" and not is_streamed:
            server.metrics.requests.labels(getattr(request.state, "model", ""), str(response.status_code)).inc()
        return response

    return app


def add_generation(app: FastAPI, server: Server) -> None:
    check = key_check("apiKey", server.settings.api_key)
    responses: dict[int | str, Any] = {
        **ERRORS,
        200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}},
    }
    post: dict[str, Any] = {"methods": ["POST"], "responses": responses, "dependencies": check}
    chat, plain = schemas.ChatCompletion, schemas.Completion
    app.add_api_route("/v1/chat/completions", server.chat_completions, response_model=chat, **post)
    app.add_api_route("/v1/completions", server.completions, response_model=plain, **post)
    app.add_api_route("/v1/models", server.models, methods=["GET"], responses=ERRORS, dependencies=check)


def add_adapter_routes(app: FastAPI, server: Server) -> None:
    check = key_check("adminKey", server.settings.admin_key) or key_check("apiKey", server.settings.api_key)
    text: dict[str, Any] = {"response_class": PlainTextResponse, "responses": ERRORS_OF_TEXT, "dependencies": check}

    @app.post("/v1/load_lora_adapter", **text)
    async def load_lora_adapter(body: schemas.LoadAdapterRequest) -> str:
        server.check_ready()
        await run_in_threadpool(server.registry.load, body.lora_name, body.lora_path, replace=body.load_inplace)
        return f"Success: LoRA adapter '{body.lora_name}' added successfully."

    @app.post("/v1/unload_lora_adapter", **text)
    async def unload_lora_adapter(body: schemas.UnloadAdapterRequest) -> str:
        await run_in_threadpool(server.registry.unload, body.lora_name)
        server.metrics.forget(body.lora_name)
        return f"Success: LoRA adapter '{body.lora_name}' removed successfully."


def add_health(app: FastAPI, server: Server) -> None:
    @app.get("/health", responses={503: ERRORS[503]})
    async def health() -> dict[str, str]:
        """Succeeds while the engine is running."""
        if not server.engine.is_alive and not server.is_draining:
            raise RequestError(503, "the engine is not running")
        return {"status": "ok"}

    @app.get("/ready", responses={503: ERRORS[503]})
    async def ready() -> dict[str, str]:
        server.check_ready()
        return {"status": "ready"}

    check = key_check("apiKey", server.settings.api_key)

    @app.get("/metrics", response_class=PlainTextResponse, responses={401: ERRORS_OF_TEXT[401]}, dependencies=check)
    async def metrics() -> Response:
        return Response(generate_latest(server.metrics.collector), media_type=CONTENT_TYPE_LATEST)
