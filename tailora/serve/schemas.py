"""The requests, responses and errors of OpenAI's API, and the requests of vLLM's API for loading adapters.

An unsupported field that would change the answer only accepts its neutral value (`only`). Fields without effect here,
such as `user`, are accepted and ignored. Unknown fields are refused, so misspellings are not silently ignored.
"""

import secrets
from itertools import islice
from typing import Annotated, Any, Literal, Self

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError
from starlette.exceptions import HTTPException

from tailora.errors import AdapterNotFoundError, MemoryInUseError, TailoraError

MOST_FIELDS = 100  # in an object that only allows known fields
MOST_MESSAGES = 10_000
MOST_PARTS = 1000  # in the content of a message
MOST_PROMPTS = 64
MOST_TOKENS = 131_072  # in a prompt of token ids; no served model allows more
MOST_LOGPROBS = 20
MOST_ANSWERS = 16  # for one prompt
LONGEST_STOP = 1000  # characters of a stop string
LONGEST_NAME = 1000  # characters of a model name
INT64 = 2**63


class RequestBody(BaseModel):
    """Types as in JSON: "1" is not a number, nor are NaN and infinity, which Python's JSON parser accepts."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _count_fields(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > MOST_FIELDS:
            raise PydanticCustomError(
                "too_many_fields", "got {count} fields; use at most {most}", {"count": len(value), "most": MOST_FIELDS}
            )
        return value


def new_id(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(12)}"


class ResponseBody(BaseModel):
    model_config = ConfigDict(extra="forbid")


def only(accepted: str) -> WrapValidator:
    """Returns a validator that reports every value other than those accepted as not supported."""

    def validate(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError(
                "not_supported", "value not supported; remove it, or use {accepted}", {"accepted": accepted}
            ) from None

    return WrapValidator(validate)


AdapterName = Annotated[str, StringConstraints(min_length=1, max_length=LONGEST_NAME)]
ModelName = Annotated[AdapterName, Field(description="the base model, or an adapter, also with a scale: legal@0.5")]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=LONGEST_STOP)]
TokenId = Annotated[int, Field(ge=0, lt=INT64)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MOST_TOKENS, fail_fast=True)]
Zero = Annotated[Annotated[float, Field(ge=0, le=0)] | None, only("0")]
Ignored = Annotated[Any, Field(description="accepted and ignored")]

# ---- Requests


class StreamOptions(RequestBody):
    include_usage: bool | None = None
    include_obfuscation: Ignored = None


class GenerationRequest(RequestBody):
    """Common to chat and plain completions."""

    model: ModelName
    max_tokens: Annotated[int, Field(ge=1, lt=INT64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(None, description="default 1; 0 is greedy")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=INT64)] | None = Field(None, description="0 or -1 for all tokens")
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] | None = Field(None, description="completions per prompt")
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = Field(
        None, description="the completions of a prompt use seed, seed + 1, ...; default: random"
    )
    stop: StopString | Annotated[list[StopString], Field(max_length=16, fail_fast=True)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = Field(None, description="requires stream = true")
    ignore_eos: bool | None = Field(None, description="continue after end-of-sequence tokens, up to max_tokens")
    lora_scale: Annotated[float, Field(ge=-100, le=100)] | None = Field(
        None, description="scale of the adapter's update; 1 leaves it as trained"
    )
    # Would change the answer, but not supported
    frequency_penalty: Zero = None
    presence_penalty: Zero = None
    repetition_penalty: Annotated[Annotated[float, Field(ge=1, le=1)] | None, only("1")] = None
    min_p: Zero = None
    logit_bias: Annotated[Annotated[dict[str, Any], Field(max_length=0)] | None, only("{}")] = None
    # Ignored
    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None


class ImageURL(RequestBody):
    url: Annotated[str, Field(description="a data: URL, such as data:image/png;base64,..., because nothing is fetched")]
    detail: Ignored = None

    @field_validator("url")
    @classmethod
    def _check_scheme(cls, url: str) -> str:
        if not url.startswith("data:"):
            raise PydanticCustomError(
                "not_data_url", "send the image as a data: URL (data:image/png;base64,...); this server fetches nothing"
            )
        return url


class Part(RequestBody):
    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: ImageURL | None = None

    @model_validator(mode="after")
    def _check_value(self) -> Self:
        if [name for name in ("text", "image_url") if getattr(self, name) is not None] != [self.type]:
            raise PydanticCustomError(
                "not_one_value", "expected type and {type}, and nothing else", {"type": self.type}
            )
        return self


Parts = Annotated[list[Part], Field(max_length=MOST_PARTS, fail_fast=True)]
AsParts = BeforeValidator(  # a text is a single part
    lambda value: [{"type": "text", "text": value}] if isinstance(value, str) else value,
    json_schema_input_type=str | Parts | None,
)


class Message(BaseModel):
    """A message of a chat. Other fields, such as name or tool_call_id, are passed to the chat template."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[Parts | None, AsParts] = None
    tool_calls: Annotated[list[dict[str, Any]], Field(max_length=128, fail_fast=True)] | None = None
    reasoning_content: str | None = None


class Function(RequestBody):
    name: Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Annotated[Literal[False] | None, only("false")] = None


class Tool(RequestBody):
    type: Literal["function"]
    function: Function


class TextFormat(RequestBody):
    type: Literal["text"]


class JSONObjectFormat(RequestBody):
    type: Literal["json_object"]


class JSONSchema(RequestBody):
    name: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    json_schema: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = Field(None, description="ignored; the schema is always enforced")


class JSONSchemaFormat(RequestBody):
    type: Literal["json_schema"]
    json_schema: JSONSchema


ResponseFormat = Annotated[TextFormat | JSONObjectFormat | JSONSchemaFormat, Field(discriminator="type")]


class ChatRequest(GenerationRequest):
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=INT64)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = Field(
        None, description="requires logprobs = true"
    )
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Annotated[Literal["auto", "none"] | None, only('"auto" or "none"')] = None
    parallel_tool_calls: Annotated[Literal[True] | None, only("true")] = None
    response_format: ResponseFormat | None = Field(
        None, description="JSON object, or JSON that matches a schema; not supported with tools"
    )


class CompletionRequest(GenerationRequest):
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
    )
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    # Would change the answer, but not supported
    echo: Annotated[Literal[False] | None, only("false")] = None
    suffix: Annotated[Annotated[str, StringConstraints(max_length=0)] | None, only('""')] = None
    best_of: Annotated[Annotated[int, Field(ge=1, le=1)] | None, only("1")] = None


class LoadAdapterRequest(RequestBody):
    lora_name: AdapterName
    lora_path: Annotated[
        str,
        StringConstraints(min_length=1, max_length=4096),
        Field(description="path of the adapter inside the server's adapter folder"),
    ]
    load_inplace: bool = Field(False, description="replace an adapter of this name; new requests use the new one")


class UnloadAdapterRequest(RequestBody):
    lora_name: AdapterName
    lora_int_id: Ignored = None


# ---- Answers


FinishReason = Literal["stop", "length", "tool_calls"]
Logprobs = Annotated[dict[str, Any], Field(description="content, or tokens and token_logprobs, as in OpenAI's API")]


class Usage(ResponseBody):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AssistantMessage(ResponseBody):
    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    refusal: None = None


class ChatChoice(ResponseBody):
    index: int
    message: AssistantMessage
    logprobs: Logprobs | None = None
    finish_reason: FinishReason


class ChatCompletion(ResponseBody):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionChoice(ResponseBody):
    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length"] | None  # null in a stream until the end


class Completion(ResponseBody):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


# ---- Models


class Model(ResponseBody):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "tailora"
    root: str
    parent: str | None
    max_model_len: int
    input_modalities: list[Literal["text", "image"]]
    system_message: str | None = Field(description="used in training; added to requests without one")


class ModelList(ResponseBody):
    object: Literal["list"] = "list"
    data: list[Model]


# ---- Errors


class ErrorDetail(ResponseBody):
    message: str
    type: str
    param: str | None
    code: int


class ErrorBody(ResponseBody):
    error: ErrorDetail


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
    headers = {"Retry-After": "1"} if status in (429, 503) else None
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
