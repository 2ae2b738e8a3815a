"""The three formats of chats: how each spells a turn and who speaks, read into messages of OpenAI.

A new format is one more ChatFormat in FORMATS. The ValueErrors raised here lack a place, their callers add it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datamodules.records import kind
from datamodules.tool_calls import calls_in_text, calls_of

Message = dict[str, Any]
Turn = tuple[str, Message]  # where in the record, for error messages, and what

ROLES = ("system", "user", "assistant", "tool")
SPEAKERS = {"system": "system", "human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
# Keys of a message that mean something we would not do. All others reach the template, which may know them.
REFUSED = {"function_call": "'tool_calls' is its name now", "weight": "messages cannot be weighed"}


@dataclass(frozen=True)
class ChatFormat:
    """One format.

    Attributes:
        key: the record's key that tells the format.
        names: what it calls a role, and "call", an assistant's message with calls.
        turns: record -> its turns, in Alpaca without the last answer.
        answers: record -> the last answer, where it does not stand among the turns.
        answer: (value of "chosen" or "rejected", key) -> message.
    """

    key: str
    names: dict[str, str]
    turns: Callable[[dict[str, Any]], list[Turn]]
    answers: Callable[[dict[str, Any]], list[Turn]]
    answer: Callable[[Any, str], Message]

    @property
    def assistant(self) -> str:
        return self.names["assistant"]


# ---- Alpaca


def _alpaca_turns(value: dict[str, Any]) -> list[Turn]:
    turns = _system(value)
    for index, pair in enumerate(_list(value.get("history") or [], "'history'")):
        key = f"'history'[{index}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"{key} must be a list of a question and its answer, not {kind(pair)}")
        turns += [(key, _message("user", pair[0], key)), (key, _message("assistant", pair[1], key))]
    parts = [_string(value.get(key, ""), repr(key)) for key in ("instruction", "input")]
    question = "\n".join(part for part in parts if part.strip())
    return [*turns, ("'instruction'", _message("user", question, "'instruction'"))]


def _alpaca_answers(value: dict[str, Any]) -> list[Turn]:
    if "output" not in value:
        raise ValueError("no key 'output', which is the answer to 'instruction'")
    return [("'output'", _message("assistant", value["output"], "'output'"))]


def _alpaca_answer(value: Any, key: str) -> Message:
    return _message("assistant", value, key)


# ---- ShareGPT


def _sharegpt_turns(value: dict[str, Any]) -> list[Turn]:
    return _each(value, "conversations", _sharegpt_message)


def _sharegpt_message(turn: Any, key: str) -> Message:
    speaker = _speaker(turn, "from", SPEAKERS, key)
    if "value" not in turn:
        raise ValueError(f"{key} has no 'value'")
    if speaker == "function_call":
        return {"role": "assistant", "content": None, "tool_calls": calls_in_text(turn["value"], f"{key}: 'value'")}
    return _message(SPEAKERS[speaker], turn["value"], f"{key}: 'value'")


# ---- OpenAI


def _openai_turns(value: dict[str, Any]) -> list[Turn]:
    return _each(value, "messages", _openai_message)


def _openai_message(message: Any, key: str) -> Message:
    role = _speaker(message, "role", ROLES, key)
    rest = {name: item for name, item in message.items() if item is not None and name not in ("role", "content", "tool_calls")}
    for name in REFUSED.keys() & rest.keys():
        raise ValueError(f"{key}: the key {name!r} is not supported: {REFUSED[name]}")
    content, calls = _joined(message.get("content"), f"{key}: 'content'"), message.get("tool_calls")
    if not calls:
        return {**_message(role, content, f"{key}: 'content'"), **rest}
    if role != "assistant":
        raise ValueError(f"{key}: only 'assistant' has 'tool_calls', not {role!r}")
    if content is not None:
        _string(content, f"{key}: 'content'")
    return {"role": role, "content": content, "tool_calls": calls_of(calls, f"{key}: 'tool_calls'"), **rest}


def _joined(content: Any, key: str) -> Any:
    """Content in parts becomes one text."""
    if not isinstance(content, list):
        return content
    for index, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            shown = part.get("type") if isinstance(part, dict) else part
            raise ValueError(f"{key}[{index}] must be a part of type 'text' with its 'text', not {shown!r}")
    return "".join(part["text"] for part in content)


# ---- what they share


def _system(value: dict[str, Any]) -> list[Turn]:
    """The system prompt beside the turns; tables write an empty one where there is none."""
    prompt = _string(value.get("system", ""), "'system'")
    return [("'system'", {"role": "system", "content": prompt})] if prompt.strip() else []


def _each(value: dict[str, Any], name: str, message: Callable[[Any, str], Message]) -> list[Turn]:
    """The turns that stand in a list, behind the system prompt beside it."""
    keyed = ((f"{name!r}[{index}]", turn) for index, turn in enumerate(_list(value[name], repr(name))))
    return [*_system(value), *((key, message(turn, key)) for key, turn in keyed)]


def _message(role: str, content: Any, key: str) -> Message:
    """A message of text, which may be empty only from the system or a tool."""
    if not _string(content, key).strip() and role in ("user", "assistant"):
        raise ValueError(f"{key} is empty")
    return {"role": role, "content": content}


def _string(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{key} must be a string, not {kind(value)}")
    return value


def _list(value: Any, key: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{key} must be a list, not {kind(value)}")
    return value


def _speaker(turn: Any, key: str, known: Any, place: str) -> str:
    if not isinstance(turn, dict):
        raise ValueError(f"{place} must be an object, not {kind(turn)}")
    if key not in turn:
        raise ValueError(f"{place} has no {key!r}; its keys: {', '.join(map(repr, turn)) or 'none'}")
    if not isinstance(turn[key], str) or turn[key] not in known:
        raise ValueError(f"{place}: {key!r} must be one of {', '.join(known)}, not {turn[key]!r}")
    return turn[key]


def _none(value: dict[str, Any]) -> list[Turn]:
    return []


_NAMES = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool", "call": "assistant with tool_calls"}
_SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation", "call": "function_call"}

FORMATS = {
    form.key: form
    for form in (
        ChatFormat("instruction", _NAMES, _alpaca_turns, _alpaca_answers, _alpaca_answer),
        ChatFormat("conversations", _SHAREGPT, _sharegpt_turns, _none, _sharegpt_message),
        ChatFormat("messages", _NAMES, _openai_turns, _none, _openai_message),
    )
}
