"""The page for comparing two models side by side, and a small server of it for any OpenAI-compatible server.

`add_page` serves it at `/` of our own server. For other servers, `playground_app` forwards the page's requests: a
browser would refuse them, since few servers allow other origins.
"""

import base64
import hashlib
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from importlib.resources import files
from urllib.parse import urlsplit

import httpx
from fastapi import FastAPI
from starlette.background import BackgroundTask
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from tailora.errors import ConfigError

PASSED_ON = {  # the requests of the page
    "GET": ("/v1/models",),
    "POST": ("/v1/chat/completions", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"),
}
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
CONNECT_SECONDS = 10.0


def page() -> str:
    return files("tailora.serve").joinpath("playground.html").read_text(encoding="utf-8")


def page_headers(html: str) -> Mapping[str, str]:
    """Returns headers that allow this page's own script and style, requests to its own server, and nothing else."""
    policy = {
        "default-src": "'none'",
        "script-src": _hashes(html, "script"),
        "style-src": _hashes(html, "style"),
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return {
        "Content-Security-Policy": "; ".join(f"{name} {sources}" for name, sources in policy.items()),
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }


def _hashes(html: str, tag: str) -> str:
    contents = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() for content in contents)
    return " ".join(f"'sha256-{digest}'" for digest in digests)


def add_page(app: FastAPI) -> None:
    """Serves the page at `/`."""
    html = page()

    async def playground() -> HTMLResponse:
        return HTMLResponse(html, headers=page_headers(html))

    app.add_api_route("/", playground, methods=["GET"], include_in_schema=False)


def playground_app(url: str) -> FastAPI:
    """Returns an app with the page, which forwards its requests to the server at `url`, with or without "/v1".

    The user types keys into the page. Raises ConfigError if `url` is not the address of a server.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--url {url}: not the address of a server; use one such as http://127.0.0.1:8000")
    server = url.rstrip("/").removesuffix("/v1")

    @asynccontextmanager
    async def client_of_app(app: FastAPI) -> AsyncIterator[None]:
        timeout = httpx.Timeout(None, connect=CONNECT_SECONDS)  # an answer takes as long as it takes
        async with httpx.AsyncClient(base_url=server, timeout=timeout) as client:
            app.state.client = client
            yield

    app = FastAPI(lifespan=client_of_app, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOCAL_HOSTS])  # keeps other sites' names out
    add_page(app)
    for method, paths in PASSED_ON.items():
        for path in paths:
            app.add_route(path, _pass_on, methods=[method])
    return app


async def _pass_on(request: Request) -> Response:
    """Sends the request to the server, and streams its answer back."""
    client: httpx.AsyncClient = request.app.state.client
    is_json = request.headers.get("content-type", "").partition(";")[0] == "application/json"
    if request.method == "POST" and not is_json:  # another site could send any other type without asking
        return JSONResponse({"error": {"message": "send application/json"}}, 415)
    names = ("authorization", "content-type")
    headers = {name: request.headers[name] for name in names if name in request.headers}
    sent = client.build_request(request.method, request.url.path, headers=headers, content=await request.body())
    try:
        answer = await client.send(sent, stream=True)
    except httpx.HTTPError as error:
        message = f"{client.base_url} cannot be reached: {error or type(error).__name__}"
        return JSONResponse({"error": {"message": message}}, 502)
    media_type = answer.headers.get("content-type")
    return StreamingResponse(
        answer.aiter_bytes(), answer.status_code, media_type=media_type, background=BackgroundTask(answer.aclose)
    )
