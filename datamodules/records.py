"""A record of a data file, and the error about one: both carry the file and the line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn


@dataclass(frozen=True)
class Record:
    """One object of a data file.

    Args:
        file: path of the file.
        line: line on which the object begins, from 1; in Parquet, the number of the row.
        value: the object.
    """

    file: str
    line: int
    value: dict[str, object]


class RecordError(ValueError):
    """A record that cannot be used: ``FILE:LINE: reason``."""

    def __init__(self, file: str, line: int, reason: str) -> None:
        super().__init__(file, line, reason)  # the arguments themselves, so that the error can be pickled
        self.file, self.line, self.reason = file, line, reason

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


OnError = Callable[[RecordError], object]


def raise_error(error: RecordError) -> NoReturn:
    """The default ``on_error``: stop at the first bad record."""
    raise error


def keys_of(value: dict[str, object]) -> str:
    """The keys of a record, for error messages."""
    return ", ".join(map(repr, value)) or "none"


def json_type(value: object) -> str:
    """The name of a value's JSON type, or of its Python type if JSON has no such type, for error messages."""
    names: dict[type, str] = {dict: "an object", list: "an array", str: "a string", int: "a number", float: "a number"}
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return names.get(type(value)) or type(value).__name__
