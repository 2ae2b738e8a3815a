"""API errors in OpenAI's format, and the exception handlers that send them.

An ``APIError`` carries the HTTP status and the four fields of OpenAI's error object, so that OpenAI's clients raise the
matching exception: BadRequestError for 400, AuthenticationError for 401, NotFoundError for 404, RateLimitError for 429.
See https://platform.openai.com/docs/guides/error-codes. The handlers cover errors of FastAPI and Starlette as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

CLIENT_CLOSED_REQUEST = 499  # nginx's status for a client that disconnected before the response; appears in metrics only
ENDPOINTS = "; of OpenAI's API, this server has /v1/chat/completions, /v1/completions and /v1/models"
MAX_QUOTED = 60  # characters of a value that a message quotes

# pydantic's type errors -> the expected type.
EXPECTED_TYPES = {
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}
# pydantic's other errors -> the rule that is violated. The braces are filled from the error's context.
RULES = {
    "finite_number": "must be a finite number",
    "literal_error": "must be {expected}",
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be greater than {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be less than {lt}",
    "too_short": "must have at least {min_length} items",
    "too_long": "must have at most {max_length} items",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "must match {pattern}",
}
# Errors raised in schema_types.py, and pydantic's "missing" -> OpenAI's code and the first words of the message.
SPECIAL = {
    "missing": ("missing_required_parameter", "Missing required parameter"),
    "unknown": ("unknown_parameter", "Unknown parameter"),
    "unsupported": ("unsupported_parameter", "Unsupported parameter"),
    "unsupported_value": ("unsupported_parameter", "Unsupported value for"),
}


class APIError(Exception):
    """An error response.

    Args:
        status: HTTP status.
        message: one sentence for the person who sent the request.
        type: OpenAI's error type; None derives it from the status.
        param: path of the invalid field, such as ``messages[0].content``.
        code: OpenAI's machine-readable error code.
        headers: HTTP headers of the response, such as Retry-After.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.type = type or _type_for(status)
        self.headers = headers or {}

    def body(self) -> dict[str, object]:
        """OpenAI's error object."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    @classmethod
    def from_validation(cls, error: ValidationError) -> APIError:
        """Report the first error of a request body: the field, what is expected, and the value."""
        first = error.errors(include_url=False)[0]
        kind, context = first["type"], first.get("ctx", {})
        param = field_path([*first["loc"], *context.get("field", ())])
        got = f", got {quoted(first['input'])}"
        code = "invalid_type" if kind.endswith("_type") else "invalid_value"
        start = "Invalid type for" if kind in EXPECTED_TYPES else "Invalid value for"
        if kind in SPECIAL:
            code, start = SPECIAL[kind]
        if kind in EXPECTED_TYPES:
            detail = f"expected {EXPECTED_TYPES[kind]}{got}"
        elif kind in RULES:
            detail = RULES[kind].format(**context) + got
        else:
            detail = "" if kind == "missing" else first["msg"]
        return invalid(_sentence(start, param, detail), param, code)


def _sentence(start: str, param: str | None, detail: str) -> str:
    """``Invalid value for 'temperature': must be at most 2, got 3``."""
    field = f"'{param}'" if param else "the request body"
    return f"{start} {field}" + (f": {detail}" if detail else "")


def invalid(message: str, param: str | None = None, code: str | None = "invalid_value") -> APIError:
    """A 400 error for an invalid field."""
    return APIError(400, message, param=param, code=code)


def field_path(parts: Sequence[str | int]) -> str | None:
    """A location in a request body, such as ``messages[0].content``; None for the body itself."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return text.lstrip(".") or None


def quoted(value: object) -> str:
    """A value as JSON, shortened to ``MAX_QUOTED`` characters."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= MAX_QUOTED else text[: MAX_QUOTED - 1] + "…"


def _type_for(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"


# -- exception handlers --------------------------------------------------------------------------------------------------


def error_response(error: APIError) -> JSONResponse:
    """The HTTP response for an error."""
    return JSONResponse(error.body(), error.status, error.headers)


def install_exception_handlers(app: FastAPI) -> None:
    """Send every error of an application in OpenAI's format."""

    @app.exception_handler(APIError)
    async def api_error(request: Request, error: APIError) -> Response:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def routing_error(request: Request, error: HTTPException) -> Response:
        messages = {
            404: f"Unknown path: {request.url.path}{ENDPOINTS if request.url.path.startswith('/v1/') else ''}",
            405: f"Method {request.method} is not allowed for {request.url.path}",
        }
        message = messages.get(error.status_code, str(error.detail))
        return error_response(APIError(error.status_code, message, headers=error.headers))

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> Response:
        return error_response(APIError(400, "The request could not be parsed"))

    @app.exception_handler(ClientDisconnect)
    async def client_disconnected(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    @app.exception_handler(Exception)
    async def internal_error(request: Request, error: Exception) -> Response:
        return error_response(APIError(500, "Internal server error; see the server's log", code="internal_error"))
