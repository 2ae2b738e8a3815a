"""Building blocks of the request schemas: strict objects, and validators with precise error messages.

Unions are normalized before validation (a single stop string becomes a list of one), so that an error names the client's
field and not a branch of the union.
"""

from __future__ import annotations

import difflib
import json
from typing import ClassVar

import pydantic_core
from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

MAX_FIELD_NAME = 64  # characters of a client's field name that a message quotes


class StrictModel(BaseModel):
    """An object that rejects unknown fields. Null is the same as an absent field, also for fields that are not known."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    # OpenAI's fields that this server does not implement -> the reason.
    unsupported: ClassVar[dict[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _check_fields(cls, content: object) -> object:
        if not isinstance(content, dict):
            return content
        content = {name: value for name, value in content.items() if value is not None or name in cls.model_fields}
        for name in content:
            if name in cls.unsupported:
                raise field_error(name, cls.unsupported[name], "unsupported")
            if name not in cls.model_fields:
                matches = difflib.get_close_matches(name, cls.model_fields, 1)
                raise field_error(name[:MAX_FIELD_NAME], f"did you mean '{matches[0]}'?" if matches else "", "unknown")
        return content


def value_error(message: str, kind: str = "invalid") -> PydanticCustomError:
    """An error of the value that is validated. ``kind``: see ``api_errors.SPECIAL``."""
    return PydanticCustomError(kind, "{message}", {"message": message})  # the template is formatted by pydantic


def field_error(field: str | tuple[str | int, ...], message: str, kind: str = "invalid") -> PydanticCustomError:
    """An error of a field within the value that is validated."""
    location = (field,) if isinstance(field, str) else field
    return PydanticCustomError(kind, "{message}", {"field": location, "message": message})


def as_list(value: object) -> object:
    """Convert a string to a list of one."""
    if value is None or isinstance(value, list):
        return value
    if isinstance(value, str):
        return [value]
    raise value_error("must be a string or a list of strings")


def as_parts(value: object) -> object:
    """Convert a string to a list of one text part."""
    if value is None or isinstance(value, list):
        return value
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    raise value_error("must be a string or a list of text parts")


def as_biases(value: object) -> object:
    """Convert JSON's string keys to token ids."""
    if not isinstance(value, dict):
        return value
    for key in value:
        if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10):
            raise field_error(str(key)[:MAX_FIELD_NAME], "not a token id")
    return {int(key): bias for key, bias in value.items()}


def as_prompts(value: object) -> list[str | list[int]]:
    """Convert OpenAI's four forms to a list: a string, strings, token ids, lists of token ids."""
    prompts = [value] if isinstance(value, str) or _is_ids(value) else value
    if not (isinstance(prompts, list) and prompts and (all(map(_is_text, prompts)) or all(map(_is_ids, prompts)))):
        raise value_error("must be a string, a list of strings, a list of token ids, or a list of lists of token ids")
    return prompts


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def only(supported: bool | int, reason: str) -> AfterValidator:
    """Accept only the value (or null) that asks for nothing this server does not implement."""

    def check(value: object) -> object:
        if value not in (None, supported):
            raise value_error(f"must be {json.dumps(supported)}, because {reason}", "unsupported_value")
        return value

    return AfterValidator(check)


def json_object(text: str) -> str:
    """Check that a string is a JSON object."""
    try:
        content = pydantic_core.from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise value_error(f"must be a JSON object encoded as a string: {error}") from None
    if not isinstance(content, dict):
        raise value_error("must be a JSON object encoded as a string")
    return text


def finite(value: object) -> object:
    """Check that no number overflows to infinity, which JSON cannot represent."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise value_error("contains a number that is too large") from None
    return value
