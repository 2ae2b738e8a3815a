"""From a record to a conversation, or to a prompt with two answers, whichever of three formats the record has.

    Alpaca      {"instruction", "input"?, "output", "system"?, "history"?: [[question, answer], ...], "tools"?}
    ShareGPT    {"conversations": [{"from": system|human|gpt|function_call|observation, "value"}, ...], "system"?, "tools"?}
    OpenAI      {"messages": [{"role": system|user|assistant|tool, "content", "tool_calls"?}, ...], "tools"?}

A preference has, in the same formats, a prompt without its last answer, and two of these, "chosen" and "rejected": strings in
Alpaca, a turn or message each in the others.

Choices made:
- The format is that of the record, not of the file: the key of its turns tells. Other keys (an id, a source) do not matter.
- A null is an absent key, as Parquet and exports of tables write it.
- Out come the messages of OpenAI, the arguments of calls as objects. Order is strict: perhaps a system prompt, then user and
  assistant in turn; behind calls stand their results. What breaks it is a RecordError that names the key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from bumblebee.tokenizer import chat_template
from datamodules.chat_formats import FORMATS, ChatFormat, Message, Turn
from datamodules.record_files import Record, RecordError
from datamodules.tool_calls import tools_of

# Who may stand behind whom; "" is the beginning, "call" an assistant's message with calls.
FOLLOWS = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant", "call"),
    "assistant": ("user",),
    "call": ("tool",),
    "tool": ("tool", "assistant", "call"),
}
Found = TypeVar("Found")


@dataclass(frozen=True)
class Conversation:
    """Messages that end with the assistant's, and the tools it may call."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None


@dataclass(frozen=True)
class Preference:
    """A prompt that ends with the user or a tool, and two answers, each one message of the assistant."""

    prompt: list[Message]
    chosen: Message
    rejected: Message
    tools: list[dict[str, Any]] | None


def conversation(record: Record) -> Conversation:
    """The conversation of a record.

    Raises:
        RecordError: an unknown format, a wrong type or order of turns, an empty answer, bad JSON in tools or calls.
    """
    return _placed(_conversation, record)


def preference(record: Record) -> Preference:
    """The prompt and the two answers of a record.

    Raises:
        RecordError: as for ``conversation``; also answers that are missing or equal.
    """
    return _placed(_preference, record)


def question(record: Record) -> tuple[list[Message], list[dict[str, Any]] | None]:
    """The messages of a record that ends with a question, and its tools.

    Raises:
        RecordError: as for ``conversation``; also a last message of the assistant.
    """
    return _placed(lambda value: (_asked(value, _format(value)), tools_of(value.get("tools"))), record)


def with_system(messages: Sequence[Message], prompt: str | None) -> list[Message]:
    """The messages, behind a system prompt if there is one and they bring none of their own. In data an empty one is none."""
    return chat_template.with_system(messages, prompt or None)


def _placed(read: Callable[[dict[str, Any]], Found], record: Record) -> Found:
    try:
        return read({key: value for key, value in record.value.items() if value is not None})
    except ValueError as error:
        raise RecordError(record.file, record.line, str(error)) from None


def _conversation(value: dict[str, Any]) -> Conversation:
    form = _format(value)
    for key in ("chosen", "rejected"):
        if key in value:
            raise ValueError(f"the key {key!r} makes this a preference, not a conversation")
    turns = _ordered([*form.turns(value), *form.answers(value)], form)
    key, last = turns[-1]
    if last["role"] != "assistant":
        raise ValueError(f"{key}: a conversation ends with {form.assistant!r}, not with {form.names[last['role']]!r}")
    return Conversation([message for _, message in turns], tools_of(value.get("tools")))


def _preference(value: dict[str, Any]) -> Preference:
    form = _format(value)
    prompt = _asked(value, form)
    chosen, rejected = _answer(value, "chosen", form), _answer(value, "rejected", form)
    if chosen == rejected:
        raise ValueError("'chosen' and 'rejected' are equal: there is nothing to prefer")
    return Preference(prompt, chosen, rejected, tools_of(value.get("tools")))


def _asked(value: dict[str, Any], form: ChatFormat) -> list[Message]:
    turns = _ordered(form.turns(value), form)
    key, last = turns[-1]
    if last["role"] not in ("user", "tool"):
        raise ValueError(f"{key}: a prompt ends with {form.names['user']!r}, not with {form.names[last['role']]!r}")
    return [message for _, message in turns]


def _format(value: dict[str, Any]) -> ChatFormat:
    found = [key for key in FORMATS if key in value]
    if len(found) != 1:
        keys = ", ".join(map(repr, value)) or "none"
        known = " or ".join(map(repr, FORMATS))
        raise ValueError(f"exactly one of the keys {known} tells the format of a chat; the record's keys: {keys}")
    return FORMATS[found[0]]


def _answer(value: dict[str, Any], key: str, form: ChatFormat) -> Message:
    if key not in value:
        raise ValueError(f"no key {key!r}: a preference has 'chosen' and 'rejected'")
    message = form.answer(value[key], repr(key))
    if message["role"] != "assistant":
        raise ValueError(f"{key!r} must be from {form.assistant!r}, not from {form.names[message['role']]!r}")
    return message


def _ordered(turns: list[Turn], form: ChatFormat) -> list[Turn]:
    """The turns, if each may stand behind the one before."""
    if not turns:
        raise ValueError(f"{form.key!r} is empty")
    before = ""
    for key, message in turns:
        kind = "call" if message.get("tool_calls") else message["role"]
        if kind not in FOLLOWS[before]:
            expected = " or ".join(repr(form.names[name]) for name in FOLLOWS[before])
            place = f"behind {form.names[before]!r}" if before else "at the beginning"
            raise ValueError(f"{key}: {form.names[kind]!r} cannot stand {place}, where {expected} belongs")
        before = kind
    return turns
