"""Tools and calls of records, in the form of OpenAI, whatever form the record has.

The ValueErrors raised here lack a place, their callers add it.
"""

from __future__ import annotations

import json
from typing import Any

from datamodules.records import kind


def tools_of(value: Any) -> list[dict[str, Any]] | None:
    """The tools of a record: a list, its JSON text, or nothing.

    Each is ``{"type": "function", "function": {"name", ...}}``; one that is only what stands in ``function`` is wrapped.

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, str):
        value = _parsed(value, "'tools'") if value.strip() else None
    if value is None:
        return None
    if not isinstance(value, list):
        raise ValueError(f"'tools' must be a list or the JSON text of one, not {kind(value)}")
    return [_tool(tool, f"'tools'[{index}]") for index, tool in enumerate(value)] or None


def _tool(tool: Any, key: str) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise ValueError(f"{key} must be an object, not {kind(tool)}")
    wrapped = tool if "function" in tool else {"type": "function", "function": tool}
    _require_name(wrapped["function"], key)
    return wrapped


def calls_in_text(text: Any, key: str) -> list[dict[str, Any]]:
    """The calls in a ShareGPT turn of a ``function_call``: the JSON text of one, or of a list.

    Raises:
        ValueError: no text, no JSON, no call.
    """
    if not isinstance(text, str):
        raise ValueError(f"{key} must be a string, not {kind(text)}")
    value = _parsed(text, key)
    return calls_of(value if isinstance(value, list) else [value], key)


def calls_of(value: Any, key: str) -> list[dict[str, Any]]:
    """Calls with their arguments as objects: ``[{"type": "function", "function": {"name", "arguments"}, ...}]``.

    Raises:
        ValueError: no list, an empty one, or something in it that is no call.
    """
    if not isinstance(value, list) or not value:
        raise ValueError(f"{key} must be a list of calls, not {kind(value) if value else 'an empty one'}")
    return [_call(call, f"{key}[{index}]") for index, call in enumerate(value)]


def _call(call: Any, key: str) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise ValueError(f'{key} must be an object {{"name": ..., "arguments": ...}}, not {kind(call)}')
    function = call.get("function") or call
    _require_name(function, key)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _parsed(arguments, f"{key}: 'arguments'")
    if not isinstance(arguments, dict):
        raise ValueError(f"{key}: 'arguments' must be an object or the JSON text of one, not {kind(arguments)}")
    outer = {name: item for name, item in call.items() if item is not None} if function is not call else {}
    return {"type": "function", **outer, "function": {"name": function["name"], "arguments": arguments}}


def _require_name(function: Any, key: str) -> None:
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise ValueError(f"{key} has no 'name' of a function")


def _parsed(text: str, key: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{key} is not valid JSON: {error}") from None
