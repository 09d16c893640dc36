"""Sends the prompts of a verification file to an OpenAI-compatible server, and reads its answers."""

import asyncio
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from tailora.errors import ConfigError, ServerError, nearest
from tailora.verify.passport import Probe
from tailora.verify.server_verdict import Observation

TOP = (20, 5, None)  # log-probabilities to request; servers allow 20 (vLLM), 5 (OpenAI) or none
ENDPOINTS = {"text": "/v1/completions", "chat": "/v1/chat/completions"}
REFUSED = (400, 404, 405, 422, 500, 501)  # for a request that the server does not support
BUSY = (429, 503)  # the request is repeated, after longer and longer waits
FIRST_WAIT = 0.5  # seconds
THIS_MACHINE = ("localhost", "127.0.0.1", "::1")
MOST_BYTES = 16 * 10**6  # of a response; the answer to a probe has a few thousand
FARTHEST = 1e6  # nats; lower values are not log-probabilities
MOST_PROBABILITY = 1.005  # of a server's tokens together: more is not a distribution, even with rounding
LEAST_LEFT = 1e-3  # of the probability, for all tokens that a server does not list


@dataclass(frozen=True)
class Response:
    status: int
    content: bytes


class ServerClient(AbstractContextManager["ServerClient"]):
    """One OpenAI-compatible server. It gets one probe at a time, so that no batch changes its rounding.

    url: with or without "/v1".
    key: of the Authorization header.
    timeout: seconds from connecting to the end of an answer. If the server is too busy, the request is repeated within
        this time.
    A proxy of the environment is used as in other programs, but never for this machine itself.
    Raises ConfigError for an invalid address or key.
    """

    def __init__(self, url: str, key: str | None = None, *, timeout: float = 120.0) -> None:
        try:
            parts = urlsplit(url if "//" in url else f"http://{url}")
            port = "" if parts.port is None else f":{parts.port}"
        except ValueError:  # an IPv6 address without a bracket, or an invalid port
            parts, port = urlsplit(""), ""
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"expected a server address such as http://127.0.0.1:8000, got {url!r}")
        if key is not None and not (key.isascii() and key.isprintable()):
            raise ConfigError("TAILORA_API_KEY contains a line break or an invalid character; set it again")
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        path = parts.path.rstrip("/").removesuffix("/v1")
        self.url = f"{parts.scheme}://{host}{port}{path}"  # without a password, since it is shown
        self._timeout = timeout
        self._runner = asyncio.Runner()  # a task can be stopped at any point, even while it connects
        self._http = httpx.AsyncClient(
            base_url=f"{parts.scheme}://{parts.netloc}{path}",
            headers={"Accept-Encoding": "identity", **({"Authorization": f"Bearer {key}"} if key else {})},
            timeout=None,
            trust_env=parts.hostname not in THIS_MACHINE,
        )
        self._top: dict[str, int | None] = {}  # endpoint that answers -> number of log-probabilities it returns
        self.refusals: dict[str, str] = {}  # endpoint that does not answer -> its message

    def __exit__(self, *_: object) -> None:
        self._runner.run(self._http.aclose())
        self._runner.close()

    def models(self) -> dict[str, str | None]:
        """Returns name -> name of its base, if the server lists them. Raises ServerError."""
        response = self._request("GET", "/v1/models")
        if response.status == 404:
            return {}
        data = self._body(response, "/v1/models").get("data")
        if not isinstance(data, list):
            raise ServerError(f"{self.url}/v1/models returned no list of models; use an OpenAI-compatible server")
        models = [model for model in data if isinstance(model, dict) and isinstance(model.get("id"), str)]
        return {model["id"]: model.get("parent") or None for model in models}

    def ask(
        self,
        probes: Sequence[Probe],
        model: str | None,
        progress: Callable[[int, int], None] = lambda _done, _total: None,
    ) -> list[Observation | None]:
        """Returns the answer to each probe; None without the endpoint. Raises ServerError, also without any answer."""
        observations: list[Observation | None] = []
        for probe in probes:
            observations.append(self._ask(probe, model))
            progress(len(observations), len(probes))
        if not any(observations):
            reasons = "; ".join(f"{endpoint} returned {reason}" for endpoint, reason in self.refusals.items())
            raise ServerError(f"{self.url} did not answer any prompt: {reasons}")
        return observations

    def _ask(self, probe: Probe, model: str | None) -> Observation | None:
        endpoint = ENDPOINTS["chat" if probe.text is None else "text"]
        if endpoint in self.refusals:
            return None
        for top in [self._top[endpoint]] if endpoint in self._top else TOP:
            body: dict[str, Any] = {"max_tokens": 1, "temperature": 0, "model": model}
            if probe.text is not None:
                body |= {"prompt": probe.text, "logprobs": top}
            else:
                body |= {"messages": probe.messages, "logprobs": None if top is None else True, "top_logprobs": top}
            body = {name: value for name, value in body.items() if value is not None}
            response = self._request("POST", endpoint, body)
            if response.status == 200:
                self._top[endpoint] = top
                return _observation(probe, self._body(response, endpoint))
        if endpoint in self._top:
            raise ServerError(f"{self.url}{endpoint} returned {_explanation(response)}")
        self.refusals[endpoint] = _explanation(response)
        return None

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Response:
        try:
            response = self._runner.run(self._until_not_busy(method, path, body))
        except TimeoutError:
            raise ServerError(
                f"{self.url}{path} did not answer within {self._timeout:g} s; use a longer --timeout"
            ) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ServerError(f"cannot reach {self.url}: {error or type(error).__name__}") from None
        if response.status in (401, 403):
            raise ServerError(
                f"{self.url} requires a key; set TAILORA_API_KEY. The server returned {_explanation(response)}"
            )
        if response.status >= 300 and response.status not in REFUSED:
            raise ServerError(f"{self.url}{path} returned {_explanation(response)}")
        return response

    async def _until_not_busy(self, method: str, path: str, body: Mapping[str, Any] | None) -> Response:
        end, wait = asyncio.get_running_loop().time() + self._timeout, FIRST_WAIT
        async with asyncio.timeout_at(end):
            response = await self._read(method, path, body)
            while body and response.status in BUSY and asyncio.get_running_loop().time() + wait < end:
                await asyncio.sleep(wait)
                wait *= 2
                response = await self._read(method, path, body)
        return response

    async def _read(self, method: str, path: str, body: Mapping[str, Any] | None) -> Response:
        async with self._http.stream(method, path, json=body) as response:
            content = bytearray()
            async for part in response.aiter_raw():  # never unpacked: a few bytes could become gigabytes
                content += part
                if len(content) > MOST_BYTES:
                    raise ServerError(f"{self.url}{path} returned more than {MOST_BYTES // 10**6} MB")
            if response.has_redirect_location:
                location = response.headers["Location"]
                raise ServerError(f"{self.url}{path} redirects to {location}; use that address")
        return Response(response.status_code, bytes(content))

    def _body(self, response: Response, path: str) -> dict[str, Any]:
        body = _parsed(response.content)
        if response.status != 200 or not isinstance(body, dict):
            raise ServerError(f"{self.url}{path} returned {_explanation(response)}, which is not OpenAI-compatible")
        return body


def check_model(models: Mapping[str, str | None], name: str, flag: str) -> None:
    """Raises ConfigError if the server lists models, but not this one."""
    if models and name not in models and "@" not in name:  # as our own server names a scaled adapter
        raise ConfigError(f"{flag}: unknown model {name!r}; the server has {', '.join(models)}{nearest(name, models)}")


def choose_model(models: Mapping[str, str | None], name: str | None, folder_name: str) -> str | None:
    """Returns the model to verify: `name`, or else the one with the folder's name, or the only adapter or model.

    A base of adapters with the folder's name does not count, as in `serve --model demo --adapter chats=outputs/demo`.
    Raises ConfigError if that leaves several, or `name` is none of them. None if the server lists none.
    """
    if name is not None:
        check_model(models, name, "--model")
    if not models or name is not None:
        return name
    adapters = [model for model, parent in models.items() if parent is not None]
    named = [model for model in models if model == folder_name and model not in models.values()]
    for choices in (named, adapters, list(models)):
        if len(choices) == 1:
            return choices[0]
    raise ConfigError(f"the server has several models; choose one with --model: {', '.join(models)}")


# ---- Answers


def _observation(probe: Probe, body: Mapping[str, Any]) -> Observation:
    """Ignores numbers that cannot be log-probabilities of one distribution. Raises ServerError without a choice."""
    choices = body.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        raise ServerError("the server's response contains no choices")
    usage, message = body.get("usage"), choice.get("message")
    prompt_tokens = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    prompt_tokens = prompt_tokens if isinstance(prompt_tokens, int) else None
    text = choice.get("text") if probe.text is not None else message.get("content") if isinstance(message, dict) else ""
    listed = _listed(choice.get("logprobs"))
    probability = sum(math.exp(value) for _, value in listed)
    if probability > MOST_PROBABILITY:
        return Observation(None, prompt_tokens=prompt_tokens)
    exact = {token: index for index, token in enumerate(probe.tokens)}
    words = [token.strip() for token in probe.tokens]
    stripped = {word: index for index, word in enumerate(words) if word and words.count(word) == 1}

    def index_of(token: str) -> int | None:
        """Returns the index of the probe's token with this text, or with this text except for white space."""
        return exact.get(token, stripped.get(token.strip()))

    likeliest = max(listed, key=lambda pair: pair[1])[0] if listed else str(text or "")
    if len(listed) < 2:
        return Observation(index_of(likeliest), prompt_tokens=prompt_tokens)
    logprobs: dict[int, float] = {}
    for token, value in listed:
        if (index := index_of(token)) is not None:
            logprobs[index] = max(value, logprobs.get(index, -math.inf))
    return Observation(
        chosen=index_of(likeliest),
        logprobs=logprobs,
        bound=min(*(value for _, value in listed), math.log(max(1 - probability, LEAST_LEFT))),
        unknown=sum(math.exp(value) for token, value in listed if index_of(token) is None and "\ufffd" not in token),
        prompt_tokens=prompt_tokens,
    )


def _listed(logprobs: Any) -> list[tuple[str, float]]:
    """Returns the tokens that the server lists for the first position, with log-probabilities.

    OpenAI has two forms: `top_logprobs` as a list of objects token -> value, and `content` with a list for each token.
    """

    def first(value: Any) -> dict[str, Any]:
        return value[0] if isinstance(value, list) and value and isinstance(value[0], dict) else {}

    if not isinstance(logprobs, dict):
        return []
    entries = first(logprobs.get("content")).get("top_logprobs")
    if isinstance(entries, list):
        pairs = [(entry.get("token"), entry.get("logprob")) for entry in entries if isinstance(entry, dict)]
    else:
        pairs = list(first(logprobs.get("top_logprobs")).items())
    return [
        (token, float(min(value, 1)))
        for token, value in pairs
        if isinstance(token, str) and isinstance(value, int | float) and value > -FARTHEST
    ]


def _parsed(content: bytes) -> Any:
    """Returns the value of a JSON text; None if it is not JSON."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def _explanation(response: Response) -> str:
    """Returns the status and the message of an error response."""
    body = _parsed(response.content)
    error = body.get("error") if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    text = message if isinstance(message, str) else response.content.decode(errors="replace")
    printable = "".join(character if character.isprintable() else " " for character in text)
    return f"{response.status} {' '.join(printable.split())[:200]}".strip()
