"""Error responses in OpenAI's format, and their OpenAPI description."""

from itertools import islice
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from tailora.errors import AdapterNotFoundError, MemoryInUseError, TailoraError
from tailora.serve.schemas import ErrorBody, ErrorDetail

RETRY_AFTER = {"Retry-After": "1"}
MOST_PROBLEMS = 10  # listed in one message
LONGEST_TEXT = 300  # characters of one problem, which may quote the request
TYPES = {  # by status
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    413: "RequestTooLargeError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}
ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": ErrorBody} for status in TYPES}
ERRORS_OF_TEXT: dict[int | str, dict[str, Any]] = {  # for routes that otherwise return text
    status: {
        "description": name,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}},
    }
    for status, name in TYPES.items()
}


class RequestError(Exception):
    """Becomes a response with this status, in OpenAI's format."""

    def __init__(self, status: int, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param


def error_body(status: int, message: str, param: str | None = None, kind: str | None = None) -> dict[str, Any]:
    detail = ErrorDetail(message=message, type=kind or TYPES.get(status, "APIError"), param=param, code=status)
    return ErrorBody(error=detail).model_dump()


def error_response(status: int, message: str, param: str | None = None, kind: str | None = None) -> JSONResponse:
    headers = RETRY_AFTER if status in (429, 503) else None
    return JSONResponse(error_body(status, message, param, kind), status, headers=headers)


def describe(problems: list[dict[str, Any]]) -> tuple[str, str | None]:
    """Returns the first of pydantic's problems as a message, and the name of the first field."""
    lines = [f"{'.'.join(map(str, problem['loc'][1:])) or 'body'}: {problem['msg']}" for problem in problems]
    more = ["and more"] if len(problems) > MOST_PROBLEMS else []
    names = [str(problem["loc"][1])[:LONGEST_TEXT] for problem in problems if len(problem["loc"]) > 1]
    shown = dict.fromkeys(line[:LONGEST_TEXT] for line in lines[:MOST_PROBLEMS])
    return "; ".join([*shown, *more]), names[0] if names else None


def add_error_handlers(app: FastAPI) -> None:
    async def respond(request: Request, error: Exception) -> Response:
        match error:
            case RequestError():
                return error_response(error.status, error.message, error.param)
            case RequestValidationError():
                return error_response(400, *describe([*islice(error.errors(), MOST_PROBLEMS + 1)]))
            case HTTPException():
                message = str(error.detail)
                if error.status_code in (404, 405):  # the router's "Not Found" and "Method Not Allowed"
                    routes = [route for route in request.app.routes if getattr(route, "include_in_schema", False)]
                    known = ", ".join(f"{' '.join(route.methods)} {route.path}" for route in routes)
                    message = f"unknown route {request.method} {request.url.path[:LONGEST_TEXT]}; available: {known}"
                response = error_response(error.status_code, message)
                response.headers.update(error.headers or {})
                return response
        status = 404 if isinstance(error, AdapterNotFoundError) else 503 if isinstance(error, MemoryInUseError) else 400
        is_admin = request.url.path.endswith("_lora_adapter")
        message = request.app.state.server.registry.without_root(str(error))
        kind = "InvalidUserInput" if is_admin and status == 400 else None
        return error_response(status, message, None if is_admin else "model", kind)

    for handled in (RequestError, RequestValidationError, HTTPException, TailoraError):
        app.add_exception_handler(handled, respond)
