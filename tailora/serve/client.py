"""Asks an OpenAI-compatible server the probes of a passport, and reads its answers."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx

from tailora.errors import ConfigError, ServerError, nearest
from tailora.formats.passport import Probe
from tailora.study.verification import Observation

TOP = (20, 5, None)  # log-probabilities to ask for; servers allow 20 (vLLM) or 5 (OpenAI), or tell none
ENDPOINTS = {"text": "/v1/completions", "chat": "/v1/chat/completions"}
REFUSED = (400, 404, 405, 422, 500, 501)  # of a request that the server does not know
MODELS_SHOWN = 10


class ServerClient:
    """One OpenAI-compatible server. It is asked one probe at a time, so that no batch changes its rounding.

    url: with or without "/v1".    key: of the Authorization header.    timeout: seconds for an answer.
    Raises ConfigError for what is no address.
    """

    def __init__(self, url: str, key: str | None = None, *, timeout: float = 120.0) -> None:
        try:
            parts = urlsplit(url if "//" in url else f"http://{url}")
        except ValueError:  # a bracket of an IPv6 address is missing
            parts = urlsplit("")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url} is no address of a server; give one such as http://127.0.0.1:8000")
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout)
        self._top: dict[str, int | None] = {}  # endpoint that answers -> log-probabilities that it tells
        self._missing: set[str] = set()  # endpoints

    def __enter__(self) -> "ServerClient":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def models(self) -> dict[str, str | None]:
        """Returns name -> name of its base, as far as the server tells. Raises ServerError."""
        response = self._request("GET", "/v1/models")
        if response.status_code == 404:
            return {}
        data = _body(response, "/v1/models").get("data")
        if not isinstance(data, list):
            raise ServerError(f"{self.url}/v1/models has no list of models: this is no OpenAI-compatible server")
        models = [model for model in data if isinstance(model, dict) and isinstance(model.get("id"), str)]
        return {model["id"]: model.get("parent") or None for model in models}

    def ask(
        self,
        probes: Sequence[Probe],
        model: str | None,
        progress: Callable[[int, int], None] = lambda _done, _total: None,
    ) -> list[Observation | None]:
        """Returns what the server answers to each probe; None where it lacks the endpoint. Raises ServerError."""
        observations: list[Observation | None] = []
        for probe in probes:
            observations.append(self._ask(probe, model))
            progress(len(observations), len(probes))
        return observations

    def _ask(self, probe: Probe, model: str | None) -> Observation | None:
        kind = "chat" if probe.text is None else "text"
        if kind in self._missing:
            return None
        for top in [self._top[kind]] if kind in self._top else TOP:
            response = self._request("POST", ENDPOINTS[kind], _request_body(probe, model, top))
            if response.status_code == 200:
                self._top[kind] = top
                return _observation(probe, _body(response, ENDPOINTS[kind]))
        if kind not in self._top:
            self._missing.add(kind)
            return None
        raise ServerError(f"{self.url}{ENDPOINTS[kind]} answers {_explanation(response)}")

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> httpx.Response:
        try:
            response = self._http.request(method, path, json=body)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ServerError(f"{self.url} cannot be asked: {error or type(error).__name__}") from None
        if response.status_code in (401, 403):
            raise ServerError(f"{self.url} asks for a key: set TAILORA_API_KEY. It says {_explanation(response)}")
        if response.status_code >= 300 and response.status_code not in REFUSED:
            raise ServerError(f"{self.url}{path} answers {_explanation(response)}")
        return response


def choose_model(models: Mapping[str, str | None], name: str | None, folder_name: str) -> str | None:
    """Returns the model to ask: `name`; else the one with the folder's name, or the only adapter or model.

    Raises ConfigError if that leaves several, or `name` is none of them. None if the server lists none.
    """
    if not models:
        return name
    shown = ", ".join(list(models)[:MODELS_SHOWN])
    if name is not None:
        if name not in models and not any(mark in name for mark in "@+"):  # a strength or a mixture of our own server
            raise ConfigError(f"--model {name}: the server has {shown}{nearest(name, models)}")
        return name
    adapters = [model for model, parent in models.items() if parent is not None]
    for choices in ([folder_name] if folder_name in models else [], adapters, list(models)):
        if len(choices) == 1:
            return choices[0]
    raise ConfigError(f"the server has several models, give one by --model: {shown}")


# ---- Requests and answers


def _request_body(probe: Probe, model: str | None, top: int | None) -> dict[str, Any]:
    body: dict[str, Any] = {"max_tokens": 1, "temperature": 0}
    if model is not None:
        body["model"] = model
    if probe.text is not None:
        return {**body, "prompt": probe.text, **({} if top is None else {"logprobs": top})}
    return {
        **body,
        "messages": probe.messages,
        **({} if top is None else {"logprobs": True, "top_logprobs": top}),
    }


def _observation(probe: Probe, body: Mapping[str, Any]) -> Observation:
    """Raises ServerError if the answer has no choice."""
    choices = body.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        raise ServerError("the server's answer has no choices")
    usage = body.get("usage")
    prompt_tokens = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    text = choice.get("text") if probe.text is not None else (choice.get("message") or {}).get("content")
    listed = list(_listed(choice.get("logprobs")))
    indices = _Indices(probe.tokens)
    logprobs: dict[int, float] = {}
    for token, value in listed:
        if (index := indices.of(token)) is not None:
            logprobs[index] = max(value, logprobs.get(index, -math.inf))
    likeliest = max(listed, key=lambda pair: pair[1])[0] if listed else str(text or "")
    return Observation(
        chosen=indices.of(likeliest),
        logprobs=logprobs if len(listed) > 1 else {},
        bound=min(value for _, value in listed) if len(listed) > 1 else None,
        prompt_tokens=prompt_tokens if isinstance(prompt_tokens, int) else None,
    )


def _listed(logprobs: Any) -> Iterable[tuple[str, float]]:
    """Yields the tokens that the server lists for the first position, with log-probabilities.

    OpenAI has two forms: `top_logprobs` as a list of objects token -> value, and `content` with a list for each token.
    """
    if not isinstance(logprobs, dict):
        return
    if isinstance(content := logprobs.get("content"), list) and content:
        pairs = [(entry.get("token"), entry.get("logprob")) for entry in content[0].get("top_logprobs") or ()]
    elif isinstance(top := logprobs.get("top_logprobs"), list) and top and isinstance(top[0], dict):
        pairs = list(top[0].items())
    else:
        return
    for token, value in pairs:
        if isinstance(token, str) and isinstance(value, int | float) and math.isfinite(value):
            yield token, float(value)


class _Indices:
    """Finds a token of the server among those of a probe: by its text, or by its text without white space."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self._exact = {token: index for index, token in enumerate(tokens)}
        stripped = [token.strip() for token in tokens]
        self._stripped = {token: index for index, token in enumerate(stripped) if token and stripped.count(token) == 1}

    def of(self, token: str) -> int | None:
        index = self._exact.get(token)
        return self._stripped.get(token.strip()) if index is None else index


def _body(response: httpx.Response, path: str) -> dict[str, Any]:
    try:
        body = response.json()
    except ValueError:
        body = None
    if response.status_code != 200 or not isinstance(body, dict):
        raise ServerError(f"{path} answers {_explanation(response)}, which is not OpenAI's API")
    return body


def _explanation(response: httpx.Response) -> str:
    text = " ".join(response.text.split())
    return f"{response.status_code} {text[:200]}".strip()
