"""What the bodies of requests are made of: objects without unknown fields, and checks that say what would be right.

Unions are made one type before they are checked (one stop string is a list of one), so that an error names the client's field
and not a branch of ours.
"""

from __future__ import annotations

import difflib
import json
from typing import Any, ClassVar

import pydantic_core
from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

NAME = 64  # characters of a name of the client's that a message quotes


class Strict(BaseModel):
    """An object without unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    # Fields of OpenAI that mean something we do not do -> why; a null there means nothing.
    unsupported: ClassVar[dict[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _known(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        content = {name: value for name, value in content.items() if value is not None or name not in cls.unsupported}
        for name in content:
            if name in cls.unsupported:
                raise wrong_field("unsupported", name, f"is not supported: {cls.unsupported[name]}")
            if name not in cls.model_fields:
                close = difflib.get_close_matches(name, cls.model_fields, 1)
                meant = f"; did you mean {close[0]}?" if close else ""
                raise wrong_field("unknown", name[:NAME], f"is no field of this request{meant}")
        return content


def wrong_field(kind: str, field: str | tuple[str | int, ...], message: str) -> PydanticCustomError:
    """What is wrong with something within the value that is checked."""
    within = (field,) if isinstance(field, str) else field
    return PydanticCustomError(kind, "{message}", {"field": within, "message": message})  # the text is a format string


def wrong(message: str, kind: str = "wrong") -> PydanticCustomError:
    """What is wrong with the value that is checked."""
    return PydanticCustomError(kind, "{message}", {"message": message})


def as_list(value: Any) -> Any:
    """A string is a list of one."""
    if value is None or isinstance(value, list):
        return value
    if isinstance(value, str):
        return [value]
    raise wrong("must be a string or a list of strings")


def as_parts(value: Any) -> Any:
    """A text is a list of one part."""
    if value is None or isinstance(value, list):
        return value
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    raise wrong("must be a string or a list of text parts")


def as_biases(value: Any) -> Any:
    """JSON's keys are strings: "42" is id 42."""
    if not isinstance(value, dict):
        return value
    for key in value:
        if not (isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 10):
            raise wrong_field("wrong", str(key)[:NAME], "is no token id")
    return {int(key): bias for key, bias in value.items()}


def as_prompts(value: Any) -> list[str | list[int]]:
    """OpenAI's four forms: a text, texts, ids, lists of ids."""
    prompts = [value] if isinstance(value, str) or _is_ids(value) else value
    if not (isinstance(prompts, list) and prompts and (all(map(_is_text, prompts)) or all(map(_is_ids, prompts)))):
        raise wrong("must be a string, a list of strings, a list of token ids or a list of such lists")
    return prompts


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def only(right: Any, why: str) -> AfterValidator:
    """Of the values that OpenAI knows, the one that asks for nothing we do not do."""

    def check(value: Any) -> Any:
        if value not in (None, right):
            raise wrong(f"must be {json.dumps(right)}: {why}", "unsupported")
        return value

    return AfterValidator(check)


def json_object(text: str) -> str:
    """The JSON text of an object."""
    try:
        content = pydantic_core.from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise wrong(f"must be the JSON text of an object: {error}") from None
    if not isinstance(content, dict):
        raise wrong("must be the JSON text of an object")
    return text


def finite(value: Any) -> Any:
    """Numbers that overflow are infinite, which JSON cannot say."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise wrong("has a number that is too large") from None
    return value
