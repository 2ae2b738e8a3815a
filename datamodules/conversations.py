"""From a record to a conversation, or to a prompt with two answers, in any of four formats.

    Alpaca      {"instruction", "input"?, "output", "system"?, "history"?: [[question, answer], ...], "tools"?}
    ShareGPT    {"conversations": [{"from": system|human|gpt|function_call|observation, "value"}, ...], "system"?, "tools"?}
    OpenAI      {"messages": [{"role": system|user|assistant|tool, "content", "tool_calls"?}, ...], "tools"?}
    TRL         {"prompt": a question or messages, "completion": an answer or messages, "tools"?}

A preference pair has a prompt without the last answer in one of these formats, and two answers, "chosen" and "rejected":
strings in Alpaca, one turn or message each in ShareGPT and OpenAI, any of these in TRL. Without a format's key, or beside a
"prompt", they may be two lists of messages that differ in the last one: the messages before it are the prompt. "margin" may
say by how much the chosen answer is better, for a reward model. An unpaired answer is a conversation with "label": true if its
last answer is good, else false.

Choices:
- Each record, not each file, has a format, which the key of its turns identifies. Other keys (an id, a source) are ignored, and
  so is "prompt" beside the key of another format.
- A null is the same as a missing key, because Parquet and table exports write nulls.
- The result is OpenAI messages, with the arguments of calls as objects. The order is strict: an optional system prompt, then
  user and assistant in turn, with results after calls. Violations raise a RecordError that names the key.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from bumblebee.tokenizer import chat_template
from bumblebee.tokenizer.assistant_mask import Message
from bumblebee.tokenizer.chat_template import Tool
from datamodules.chat_formats import FORMATS, ChatFormat, Turn, parse_tools
from datamodules.records import Record, RecordError, keys_of

# Which turns may follow each turn; "" is the beginning, "call" an assistant message with tool calls.
FOLLOWS = {
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant", "call"),
    "assistant": ("user",),
    "call": ("tool",),
    "tool": ("tool", "assistant", "call"),
}
Parsed = TypeVar("Parsed")


@dataclass(frozen=True)
class Conversation:
    """Messages that end with an assistant message, and the tools that the assistant may call."""

    messages: list[Message]
    tools: list[Tool] | None


@dataclass(frozen=True)
class PreferencePair:
    """A prompt that ends with a user or tool message, and two answers, each one assistant message."""

    prompt: list[Message]
    chosen: Message
    rejected: Message
    tools: list[Tool] | None
    margin: float | None = None


@dataclass(frozen=True)
class LabelledAnswer:
    """A prompt that ends with a user or tool message, an answer, and whether it is a good one."""

    prompt: list[Message]
    answer: Message
    label: bool
    tools: list[Tool] | None


def parse_conversation(record: Record) -> Conversation:
    """Convert a record to a conversation.

    Raises:
        RecordError: unknown format, wrong type or order of turns, empty answer, or invalid JSON in tools or calls.
    """
    return _parse(_conversation, record)


def parse_preference(record: Record) -> PreferencePair:
    """Convert a record to a preference pair.

    Raises:
        RecordError: as for :func:`parse_conversation`; also if an answer is missing or both are equal.
    """
    return _parse(_preference, record)


def parse_labelled(record: Record) -> list[LabelledAnswer]:
    """Convert a conversation with a "label", or a preference pair, to one or two answers with labels.

    Raises:
        RecordError: as for :func:`parse_conversation` and :func:`parse_preference`; also if the label is missing.
    """
    return _parse(_labelled, record)


def parse_prompt(record: Record) -> tuple[list[Message], list[Tool] | None]:
    """Convert a record that ends with a question to messages and tools.

    Raises:
        RecordError: as for :func:`parse_conversation`; also if the last message is the assistant's.
    """
    return _parse(lambda value: (_prompt(value, _format_of(value)), parse_tools(value.get("tools"))), record)


def with_system(messages: Sequence[Message], prompt: str | None) -> list[Message]:
    """Add a system prompt to messages that do not begin with one. In a recipe, an empty prompt means none."""
    return chat_template.with_system(messages, prompt or None)


def _parse(parse: Callable[[dict[str, object]], Parsed], record: Record) -> Parsed:
    try:
        return parse({key: value for key, value in record.value.items() if value is not None})
    except ValueError as error:
        raise RecordError(record.file, record.line, str(error)) from None


def _conversation(value: dict[str, object]) -> Conversation:
    chat_format = _format_of(value)
    for key in ("chosen", "rejected"):
        if key in value:
            raise ValueError(f"the key {key!r} makes this a preference pair, not a conversation")
    turns = _check_order([*chat_format.turns(value), *chat_format.answers(value)], chat_format)
    key, last = turns[-1]
    if last["role"] != "assistant":
        names = chat_format.names
        raise ValueError(f"{key}: a conversation must end with {chat_format.assistant!r}, not {names[last['role']]!r}")
    return Conversation([message for _, message in turns], parse_tools(value.get("tools")))


def _labelled(value: dict[str, object]) -> list[LabelledAnswer]:
    if "chosen" in value or "rejected" in value:
        if "label" in value:
            raise ValueError("'label' belongs to one answer, but 'chosen' and 'rejected' make this a preference pair")
        pair = _preference(value)
        return [LabelledAnswer(pair.prompt, *each, pair.tools) for each in ((pair.chosen, True), (pair.rejected, False))]
    if "label" not in value:
        raise ValueError("no key 'label': true for a good answer, false for a bad one; or a pair with 'chosen' and 'rejected'")
    label = value["label"]
    if not isinstance(label, bool):
        raise ValueError(f"'label' must be true or false, not {label!r}")
    chat = _conversation(value)
    return [LabelledAnswer(chat.messages[:-1], chat.messages[-1], label, chat.tools)]


def _preference(value: dict[str, object]) -> PreferencePair:
    value = _without_shared_messages(value)
    chat_format = _format_of(value)
    prompt = _prompt(value, chat_format)
    chosen, rejected = _answer(value, "chosen", chat_format), _answer(value, "rejected", chat_format)
    if chosen == rejected:
        raise ValueError("'chosen' and 'rejected' are equal")
    return PreferencePair(prompt, chosen, rejected, parse_tools(value.get("tools")), _margin(value))


def _margin(value: dict[str, object]) -> float | None:
    margin = value.get("margin")
    if margin is None:
        return None
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
        raise ValueError(f"'margin' must be a number, by how much 'chosen' is better, not {margin!r}")
    return float(margin)


def _without_shared_messages(value: dict[str, object]) -> dict[str, object]:
    """Make a prompt of the turns that two whole conversations share."""
    chosen, rejected = value.get("chosen"), value.get("rejected")
    if not isinstance(chosen, list) or not isinstance(rejected, list) or min(len(chosen), len(rejected)) < 2:
        return value
    if len(chosen) != len(rejected) or chosen[:-1] != rejected[:-1]:
        raise ValueError("'chosen' and 'rejected' are conversations that must differ in the last message only")
    rest = {key: item for key, item in value.items() if key not in FORMATS}
    turns = "conversations" if isinstance(chosen[0], dict) and "from" in chosen[0] else "messages"
    return {**rest, turns: chosen[:-1], "chosen": chosen[-1], "rejected": rejected[-1]}


def _prompt(value: dict[str, object], chat_format: ChatFormat) -> list[Message]:
    turns = _check_order(chat_format.turns(value), chat_format)
    key, last = turns[-1]
    if last["role"] not in ("user", "tool"):
        names = chat_format.names
        raise ValueError(f"{key}: a prompt must end with {names['user']!r}, not {names[last['role']]!r}")
    return [message for _, message in turns]


def _format_of(value: dict[str, object]) -> ChatFormat:
    present = [key for key in FORMATS if key in value]
    if len(present) == 2 and "prompt" in present:
        present.remove("prompt")  # a copy of the question, as in several published datasets
    if len(present) != 1:
        known = " or ".join(map(repr, FORMATS))
        raise ValueError(f"expected exactly one of the keys {known}; the record's keys: {keys_of(value)}")
    return FORMATS[present[0]]


def _answer(value: dict[str, object], key: str, chat_format: ChatFormat) -> Message:
    if key not in value:
        raise ValueError(f"no key {key!r}: a preference pair has 'chosen' and 'rejected'")
    message = chat_format.answer(value[key], repr(key))
    if message["role"] != "assistant":
        names = chat_format.names
        raise ValueError(f"{key!r} must be from {chat_format.assistant!r}, not from {names[message['role']]!r}")
    return message


def _check_order(turns: list[Turn], chat_format: ChatFormat) -> list[Turn]:
    """The turns, after checking that each may follow the one before it."""
    if not turns:
        raise ValueError(f"{chat_format.key!r} is empty")
    previous = ""
    for key, message in turns:
        current = "call" if message.get("tool_calls") else message["role"]
        if current not in FOLLOWS[previous]:
            expected = " or ".join(repr(chat_format.names[name]) for name in FOLLOWS[previous])
            where = f"follow {chat_format.names[previous]!r}" if previous else "come first"
            raise ValueError(f"{key}: {chat_format.names[current]!r} cannot {where}; expected {expected}")
        previous = current
    return turns
