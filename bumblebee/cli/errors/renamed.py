"""Renamed commands and options: the old name is refused, and the error names the new one."""

from __future__ import annotations

COMMANDS = {"answer": "evaluate"}
OPTIONS: dict[str, str] = {}  # dotted keys as written in a recipe, without init_args
