"""Task files in JSON Lines: every error names file and line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn


@dataclass(frozen=True)
class TaskRecord:
    """One line of a task file.

    Args:
        place: FILE:LINE.
        value: the object.
    """

    place: str
    value: Mapping[str, object]

    def fail(self, reason: str) -> NoReturn:
        """Raise a ValueError that begins with file and line."""
        raise ValueError(f"{self.place}: {reason}")

    def get(self, key: str) -> object:
        """The value of a required key.

        Raises:
            ValueError: it is missing.
        """
        if key not in self.value:
            keys = ", ".join(map(repr, self.value)) or "none"
            self.fail(f"missing key {key!r}; the record's keys: {keys}")
        return self.value[key]

    def text(self, key: str) -> str:
        """The value of a required key that holds a string.

        Raises:
            ValueError: it is missing or not a string.
        """
        value = self.get(key)
        if not isinstance(value, str):
            self.fail(f"{key!r} must be a string, got {json.dumps(value)}")
        return value

    def texts(self, key: str) -> list[str]:
        """The value of a required key that holds a list of strings that are not empty.

        Raises:
            ValueError: it is missing, empty or something else.
        """
        value = self.get(key)
        if not isinstance(value, list) or not value or not all(isinstance(item, str) and item for item in value):
            self.fail(f"{key!r} must be a list of strings that are not empty, got {json.dumps(value)}")
        return value


def read_records(path: str) -> list[TaskRecord]:
    """Read a file in JSON Lines; blank lines are skipped.

    Raises:
        ValueError: there is no such file or no record in it, or a line is not a JSON object.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        raise ValueError(f"{path} is a folder; name a file in it")
    if not file.is_file():
        raise ValueError(f"file not found: {path}")
    records = []
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            records.append(TaskRecord(f"{path}:{number}", _parse(line, f"{path}:{number}")))
    if not records:
        raise ValueError(f"{path}: the file has no records")
    return records


def _parse(line: str, place: str) -> Mapping[str, object]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{place}: expected a JSON object, {{...}}, got {json.dumps(value)[:60]}")
    return value
