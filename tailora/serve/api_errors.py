"""Errors that the server answers with, in OpenAI's shape, and how they are described in OpenAPI."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from tailora.errors import AdapterNotFoundError, MemoryInUseError, TailoraError
from tailora.serve.answers import EngineError
from tailora.serve.schemas import ErrorBody, ErrorDetail

RETRY_AFTER = {"Retry-After": "1"}
TYPES = {  # of errors, by status
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    413: "RequestTooLargeError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}
ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": ErrorBody} for status in TYPES}
ERRORS_OF_TEXT: dict[int | str, dict[str, Any]] = {  # of routes that answer text otherwise
    status: {
        "description": name,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}},
    }
    for status, name in TYPES.items()
}


class RequestError(Exception):
    """Is answered with this status, in OpenAI's shape."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param


def error_body(status: int, message: str, param: str | None = None, kind: str | None = None) -> dict[str, Any]:
    detail = ErrorDetail(message=message, type=kind or TYPES.get(status, "APIError"), param=param, code=status)
    return ErrorBody(error=detail).model_dump()


def error_response(status: int, message: str, param: str | None = None, kind: str | None = None) -> JSONResponse:
    headers = RETRY_AFTER if status in (429, 503) else None
    return JSONResponse(error_body(status, message, param, kind), status, headers=headers)


def status_of(error: TailoraError) -> int:
    if isinstance(error, AdapterNotFoundError):
        return 404
    return 503 if isinstance(error, MemoryInUseError) else 400


def add_error_handlers(app: FastAPI) -> None:
    async def request_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        return error_response(error.status, error.message, error.param)

    async def engine_error(_: Request, error: Exception) -> Response:
        return error_response(503, f"the engine takes no requests: {error}")

    async def tailora_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, TailoraError)
        status = status_of(error)
        is_admin = request.url.path.endswith("_lora_adapter")
        kind = "InvalidUserInput" if is_admin and status == 400 else None
        message = request.app.state.server.registry.without_root(str(error))
        return error_response(status, message, None if is_admin else "model", kind)

    async def invalid_body(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        problems = [f"{'.'.join(map(str, problem['loc'][1:]))}: {problem['msg']}" for problem in error.errors()]
        names = [str(problem["loc"][1]) for problem in error.errors() if len(problem["loc"]) > 1]
        return error_response(400, "; ".join(dict.fromkeys(problems)), names[0] if names else None)

    async def http_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        response = error_response(error.status_code, str(error.detail))
        response.headers.update(error.headers or {})
        return response

    app.add_exception_handler(RequestError, request_error)
    app.add_exception_handler(EngineError, engine_error)
    app.add_exception_handler(TailoraError, tailora_error)
    app.add_exception_handler(RequestValidationError, invalid_body)
    app.add_exception_handler(HTTPException, http_error)
