"""Reading and writing JSON files: errors name the file, and writes are atomic."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TypeAlias

from bumblebee.utils.text_files import write_text

JSON: TypeAlias = "None | bool | int | float | str | list[JSON] | dict[str, JSON]"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: the file is not valid JSON, or does not hold an object; the message names the file.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, {{...}}, got {type(value).__name__}")
    return value


def write_json(path: Path, value: object) -> None:
    """Write indented JSON to a temporary file next to ``path``, then rename it."""
    temporary = path.with_name(f".{path.name}.partial")
    write_text(temporary, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    os.replace(temporary, path)
