"""One record of a file, and the complaint about one: both know their file and line."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn


@dataclass(frozen=True)
class Record:
    """One object of a file. `line` is the line, counted from 1, on which it begins."""

    file: str
    line: int
    value: dict[str, Any]


class RecordError(ValueError):
    """A record that cannot be used: `FILE:LINE: reason`."""

    def __init__(self, file: str, line: int, reason: str):
        super().__init__(file, line, reason)  # the arguments themselves, so that it survives pickling between workers
        self.file, self.line, self.reason = file, line, reason

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


OnError = Callable[[RecordError], object]


def fail(error: RecordError) -> NoReturn:
    """The default `on_error`: the first bad record ends the reading."""
    raise error


def kind(value: Any) -> str:
    """What JSON calls it; what is none of JSON's, by its type."""
    names: dict[type, str] = {dict: "an object", list: "an array", str: "a string", int: "a number", float: "a number"}
    return names.get(type(value)) or (json.dumps(value) if value is None or isinstance(value, bool) else type(value).__name__)
