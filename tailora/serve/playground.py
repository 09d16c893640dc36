"""The page for comparing two models side by side, and a small proxy for other OpenAI-compatible servers.

`add_page` serves the page at `/` of our own server. For other servers, `playground_app` serves it and forwards its
requests: few servers allow other origins, so a browser would block direct ones.
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

FORWARDED_PATHS = {  # the page's requests
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
    html = page()

    async def playground() -> HTMLResponse:
        return HTMLResponse(html, headers=page_headers(html))

    app.add_api_route("/", playground, methods=["GET"], include_in_schema=False)


def playground_app(url: str) -> FastAPI:
    """Returns an app that serves the page and forwards its requests to `url`. Raises ConfigError for an invalid one."""
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # such as http://[::1, or a port above 65535
        is_address = False
    if not is_address:
        raise ConfigError(f"--url: expected a server address such as http://127.0.0.1:8000, got {url!r}")
    server = url.rstrip("/").removesuffix("/v1")

    @asynccontextmanager
    async def client_of_app(app: FastAPI) -> AsyncIterator[None]:
        timeout = httpx.Timeout(None, connect=CONNECT_SECONDS)  # no limit for answers
        async with httpx.AsyncClient(base_url=server, timeout=timeout) as client:
            app.state.client = client
            yield

    app = FastAPI(lifespan=client_of_app, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOCAL_HOSTS])  # against DNS rebinding
    add_page(app)
    for method, paths in FORWARDED_PATHS.items():
        for path in paths:
            app.add_route(path, _forward, methods=[method])
    return app


async def _forward(request: Request) -> Response:
    """Forwards the request to the server and streams the response back."""
    client: httpx.AsyncClient = request.app.state.client
    is_json = request.headers.get("content-type", "").partition(";")[0] == "application/json"
    if request.method == "POST" and not is_json:  # other sites could send other types without a preflight request
        return JSONResponse({"error": {"message": "expected the content type application/json"}}, 415)
    names = ("authorization", "content-type")
    headers = {name: request.headers[name] for name in names if name in request.headers}
    sent = client.build_request(request.method, request.url.path, headers=headers, content=await request.body())
    try:
        answer = await client.send(sent, stream=True)
    except httpx.HTTPError as error:
        message = f"cannot reach {client.base_url}: {error or type(error).__name__}"
        return JSONResponse({"error": {"message": message}}, 502)
    media_type = answer.headers.get("content-type")
    return StreamingResponse(
        answer.aiter_bytes(), answer.status_code, media_type=media_type, background=BackgroundTask(answer.aclose)
    )
