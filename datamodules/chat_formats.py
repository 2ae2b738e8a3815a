"""The four chat formats: how each spells turns, speakers, tools and calls, converted to OpenAI messages.

To support another format, add a ChatFormat to FORMATS. The ValueErrors raised here name the key; callers add file and line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from bumblebee.tokenizer.assistant_mask import Message
from bumblebee.tokenizer.chat_template import Tool
from datamodules.records import json_type, keys_of

Turn = tuple[str, Message]  # key in the record, for error messages, and the message

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
# Keys of a message whose meaning is not supported. All others are passed to the chat template.
UNSUPPORTED = {"function_call": "use 'tool_calls'", "weight": "messages cannot be weighted"}


@dataclass(frozen=True)
class ChatFormat:
    """One chat format.

    Args:
        key: the key of a record that identifies the format.
        names: the format's name of each role, and of "call", an assistant message with tool calls.
        turns: record -> its turns; in Alpaca without the last answer.
        answers: record -> the last answer, if it is not among the turns.
        answer: (value of "chosen" or "rejected", key) -> message.
    """

    key: str
    names: dict[str, str]
    turns: Callable[[dict[str, object]], list[Turn]]
    answers: Callable[[dict[str, object]], list[Turn]]
    answer: Callable[[object, str], Message]

    @property
    def assistant(self) -> str:
        return self.names["assistant"]


# -- Alpaca --------------------------------------------------------------------------------------------------------------


def _alpaca_turns(value: dict[str, object]) -> list[Turn]:
    turns = _system(value)
    for index, pair in enumerate(_list(value.get("history") or [], "'history'")):
        key = f"'history'[{index}]"
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"{key} must be a list of a question and its answer, not {json_type(pair)}")
        turns += [(key, _message("user", pair[0], key)), (key, _message("assistant", pair[1], key))]
    parts = [_string(value.get(key, ""), repr(key)) for key in ("instruction", "input")]
    question = "\n".join(part for part in parts if part.strip())
    return [*turns, ("'instruction'", _message("user", question, "'instruction'"))]


def _alpaca_answers(value: dict[str, object]) -> list[Turn]:
    if "output" not in value:
        raise ValueError("no key 'output', the answer to 'instruction'")
    return [("'output'", _message("assistant", value["output"], "'output'"))]


def _alpaca_answer(value: object, key: str) -> Message:
    return _message("assistant", value, key)


# -- ShareGPT ------------------------------------------------------------------------------------------------------------


def _sharegpt_turns(value: dict[str, object]) -> list[Turn]:
    return _turns_in_list(value, "conversations", _sharegpt_message)


def _sharegpt_message(turn: object, key: str) -> Message:
    turn, speaker = _turn_and_speaker(turn, "from", SHAREGPT_ROLES, key)
    if "value" not in turn:
        raise ValueError(f"{key} has no 'value'")
    if speaker == "function_call":
        calls = _parse_calls_text(turn["value"], f"{key}: 'value'")
        return {"role": "assistant", "content": None, "tool_calls": calls}
    return _message(SHAREGPT_ROLES[speaker], turn["value"], f"{key}: 'value'")


# -- OpenAI --------------------------------------------------------------------------------------------------------------


def _openai_turns(value: dict[str, object]) -> list[Turn]:
    return _turns_in_list(value, "messages", _openai_message)


def _openai_message(message: object, key: str) -> Message:
    message, role = _turn_and_speaker(message, "role", ROLES, key)
    rest = {name: item for name, item in message.items() if item is not None and name not in ("role", "content", "tool_calls")}
    for name in UNSUPPORTED.keys() & rest.keys():
        raise ValueError(f"{key}: the key {name!r} is not supported: {UNSUPPORTED[name]}")
    content, calls = _join_parts(message.get("content"), f"{key}: 'content'"), message.get("tool_calls")
    if not calls:
        return {**_message(role, content, f"{key}: 'content'"), **rest}
    if role != "assistant":
        raise ValueError(f"{key}: only 'assistant' has 'tool_calls', not {role!r}")
    if content is not None:
        _string(content, f"{key}: 'content'")
    return {"role": role, "content": content, "tool_calls": _parse_calls(calls, f"{key}: 'tool_calls'"), **rest}


def _join_parts(content: object, key: str) -> object:
    """Join content that is a list of text parts."""
    if not isinstance(content, list):
        return content
    for index, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            shown = part.get("type") if isinstance(part, dict) else part
            raise ValueError(f"{key}[{index}] must be a part of type 'text' with its 'text', not {shown!r}")
    return "".join(part["text"] for part in content)


# -- prompt and completion, as TRL's datasets have them ------------------------------------------------------------------------


def _prompt_turns(value: dict[str, object]) -> list[Turn]:
    if isinstance(value["prompt"], str):
        return [*_system(value), ("'prompt'", _message("user", value["prompt"], "'prompt'"))]
    _check_text_or_messages(value, "prompt")
    return _turns_in_list(value, "prompt", _openai_message)


def _completion(value: dict[str, object]) -> list[Turn]:
    if "completion" not in value:
        raise ValueError("no key 'completion', the answer to 'prompt'")
    if isinstance(value["completion"], str):
        return [("'completion'", _message("assistant", value["completion"], "'completion'"))]
    _check_text_or_messages(value, "completion")
    return _turns_in_list({"completion": value["completion"]}, "completion", _openai_message)


def _check_text_or_messages(value: dict[str, object], name: str) -> None:
    if not isinstance(value[name], list):
        raise ValueError(f"{name!r} must be a string or a list of messages, not {json_type(value[name])}")


def _prompt_answer(value: object, key: str) -> Message:
    """A text, a message, or a list of one message."""
    if isinstance(value, str):
        return _message("assistant", value, key)
    if isinstance(value, list):
        if len(value) != 1:
            raise ValueError(f"{key} must be one message, not a list of {len(value)}")
        return _openai_message(value[0], f"{key}[0]")
    return _openai_message(value, key)


# -- common to all formats -----------------------------------------------------------------------------------------------


def _system(value: dict[str, object]) -> list[Turn]:
    """The system prompt next to the turns. An empty one, as exported from tables, means that there is none."""
    prompt = _string(value.get("system", ""), "'system'")
    return [("'system'", {"role": "system", "content": prompt})] if prompt.strip() else []


def _turns_in_list(value: dict[str, object], name: str, convert: Callable[[object, str], Message]) -> list[Turn]:
    """The system prompt next to a list of turns, and the turns."""
    keyed = ((f"{name!r}[{index}]", turn) for index, turn in enumerate(_list(value[name], repr(name))))
    return [*_system(value), *((key, convert(turn, key)) for key, turn in keyed)]


def _message(role: str, content: object, key: str) -> Message:
    """A text message; only a system or tool message may be empty."""
    if not _string(content, key).strip() and role in ("user", "assistant"):
        raise ValueError(f"{key} is empty")
    return {"role": role, "content": content}


def _string(value: object, key: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{key} must be a string, not {json_type(value)}")
    return value


def _list(value: object, key: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{key} must be a list, not {json_type(value)}")
    return value


def _turn_and_speaker(turn: object, speaker_key: str, speakers: Collection[str], key: str) -> tuple[dict[str, object], str]:
    """A turn, checked to be an object, and who speaks in it."""
    if not isinstance(turn, dict):
        raise ValueError(f"{key} must be an object, not {json_type(turn)}")
    if speaker_key not in turn:
        raise ValueError(f"{key} has no {speaker_key!r}; its keys: {keys_of(turn)}")
    speaker = turn[speaker_key]
    if not isinstance(speaker, str) or speaker not in speakers:
        raise ValueError(f"{key}: {speaker_key!r} must be one of {', '.join(speakers)}, not {speaker!r}")
    return turn, speaker


# -- tools and calls -----------------------------------------------------------------------------------------------------


def parse_tools(value: object) -> list[Tool] | None:
    """The tools of a record as ``{"type": "function", "function": {"name", ...}}``.

    Args:
        value: a list or its JSON text; None or an empty text for no tools. A tool may also be written as the content of
            "function" alone.

    Raises:
        ValueError: anything else.
    """
    if isinstance(value, str):
        value = _parse_json(value, "'tools'") if value.strip() else None
    if value is None:
        return None
    if not isinstance(value, list):
        raise ValueError(f"'tools' must be a list or the JSON text of one, not {json_type(value)}")
    return [_parse_tool(tool, f"'tools'[{index}]") for index, tool in enumerate(value)] or None


def _parse_tool(tool: object, key: str) -> Tool:
    if not isinstance(tool, dict):
        raise ValueError(f"{key} must be an object, not {json_type(tool)}")
    wrapped = tool if "function" in tool else {"type": "function", "function": tool}
    _require_name(wrapped["function"], key)
    return wrapped


def _parse_calls_text(text: object, key: str) -> list[dict[str, object]]:
    """The calls of a ShareGPT "function_call" turn: the JSON text of one call or of a list."""
    value = _parse_json(_string(text, key), key)
    return _parse_calls(value if isinstance(value, list) else [value], key)


def _parse_calls(value: object, key: str) -> list[dict[str, object]]:
    """Calls with their arguments as objects: ``[{"type": "function", "function": {"name", "arguments"}, ...}]``."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"{key} must be a list of calls, not {json_type(value) if value else 'an empty one'}")
    return [_parse_call(call, f"{key}[{index}]") for index, call in enumerate(value)]


def _parse_call(call: object, key: str) -> dict[str, object]:
    if not isinstance(call, dict):
        raise ValueError(f'{key} must be an object {{"name": ..., "arguments": ...}}, not {json_type(call)}')
    function = call.get("function") or call
    _require_name(function, key)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _parse_json(arguments, f"{key}: 'arguments'")
    if not isinstance(arguments, dict):
        raise ValueError(f"{key}: 'arguments' must be an object or the JSON text of one, not {json_type(arguments)}")
    outer = {name: item for name, item in call.items() if item is not None} if function is not call else {}
    return {"type": "function", **outer, "function": {"name": function["name"], "arguments": arguments}}


def _require_name(function: object, key: str) -> None:
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise ValueError(f"{key} has no function 'name'")


def _parse_json(text: str, key: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{key} is not valid JSON: {error}") from None


# -- the formats ---------------------------------------------------------------------------------------------------------


def _no_answers(value: dict[str, object]) -> list[Turn]:
    return []


_OPENAI = {"system": "system", "user": "user", "assistant": "assistant", "tool": "tool", "call": "assistant with tool_calls"}
_SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation", "call": "function_call"}

FORMATS = {
    chat_format.key: chat_format
    for chat_format in (
        ChatFormat("instruction", _OPENAI, _alpaca_turns, _alpaca_answers, _alpaca_answer),
        ChatFormat("conversations", _SHAREGPT, _sharegpt_turns, _no_answers, _sharegpt_message),
        ChatFormat("messages", _OPENAI, _openai_turns, _no_answers, _openai_message),
        ChatFormat("prompt", _OPENAI, _prompt_turns, _completion, _prompt_answer),
    )
}
