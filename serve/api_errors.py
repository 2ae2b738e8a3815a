"""What is wrong with a request, said in OpenAI's error format.

A fault carries the HTTP status and the four fields of OpenAI's error object, so that its clients raise the exception they
would raise there: BadRequestError at 400, AuthenticationError at 401, NotFoundError at 404, RateLimitError at 429.
See https://platform.openai.com/docs/guides/error-codes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

SHOWN = 60  # characters of a value that a message quotes

# pydantic's error types -> what would be right. The braces are filled from the error's context.
RIGHT = {
    "missing": "is missing",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be a string",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "literal_error": "must be {expected}",
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be more than {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be less than {lt}",
    "too_short": "must have at least {min_length} entries",
    "too_long": "must have at most {max_length} entries",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "must match {pattern}",
}
# The same -> OpenAI's code; all others are "invalid_value".
CODES = {
    "missing": "missing_required_parameter",
    "unknown": "unknown_parameter",
    "unsupported": "unsupported_parameter",
} | {name: "invalid_type" for name in RIGHT if name.endswith("_type")}


class Fault(Exception):
    """A request that gets an error for an answer.

    Args:
        status: of HTTP.
        message: one sentence for the person who sent the request.
        type: OpenAI's kind; left out, what goes with the status.
        param: the field that is wrong, with its path.
        code: OpenAI's word for it, for programs.
        headers: of the HTTP answer, Retry-After for instance.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.type = type or _type_of(status)
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    @classmethod
    def from_validation(cls, error: ValidationError) -> Fault:
        """The first thing that is wrong with a body, as one sentence that names the field and what would be right."""
        first = error.errors(include_url=False)[0]
        kind, context = first["type"], first.get("ctx", {})
        param = path([*first["loc"], *context.get("field", ())])
        right = RIGHT[kind].format(**context) if kind in RIGHT else first["msg"]
        got = f", not {shown(first['input'])}" if kind in RIGHT and kind != "missing" else ""
        return invalid(f"{param or 'the body'} {right}{got}", param, CODES.get(kind, "invalid_value"))


def invalid(message: str, param: str | None = None, code: str | None = "invalid_value") -> Fault:
    """400: a field with a wrong value."""
    return Fault(400, message, param=param, code=code)


def path(parts: Sequence[str | int]) -> str | None:
    """A place in a body, as one writes it: ``messages[0].content``; None for the body itself."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return text.lstrip(".") or None


def shown(value: Any) -> str:
    """A value as JSON, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"


def _type_of(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"
