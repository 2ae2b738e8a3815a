"""Parses tool calls in the text of an answer, in the format of the model's chat template; see ``tool_call_format.py``.

Text that may become a tool call is buffered, all other text is returned as it arrives, and a call is returned when it is
complete. A call of an unknown tool, and one that is not valid JSON, remain text. In formats without an opening marker, a call
can only be at the start of the answer or after another call.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from bumblebee.tokenizer.assistant_mask import without_whitespace
from bumblebee.tokenizer.special_token_guard import replace_surrogates
from bumblebee.tokenizer.tool_call_format import ToolCallFormat, name_and_arguments

IN_STRING, OUTSIDE_STRING = re.compile(r'["\\]'), re.compile(r'["{}\[\]]')


@dataclass(frozen=True)
class ParsedCall:
    """A tool call; the arguments are a JSON object encoded as a string."""

    name: str
    arguments: str


class Incomplete(Exception):
    """More text is needed."""


class ToolCallParser:
    """Splits one answer into text and tool calls while it arrives. The result does not depend on the chunk boundaries.

    Args:
        format: how the model writes tool calls.
        names: names of the tools that may be called.
        unknown: return calls of other tools, too, instead of leaving them in the text. Formats that write the name before the
            arguments do not allow it.
    """

    def __init__(self, format: ToolCallFormat, names: Sequence[str], unknown: bool = False) -> None:
        self.format, self.names, self.unknown = format, list(names), unknown
        self._buffer = ""  # text that has not been returned
        self._scan: ObjectScan | None = None  # of the object in the buffer
        self._after_call = False  # whether the buffer directly follows a call
        self._any_call = self._any_text = False  # whether a call, or text, has been returned

    def feed(self, text: str) -> list[str | ParsedCall]:
        """Add text. Returns the text and the calls that are complete."""
        self._buffer += text
        parts: list[str | ParsedCall] = []
        try:
            while self._buffer:
                _append(parts, self._parse_after_call() if self._after_call else self._parse_next())
        except Incomplete:
            pass
        return parts

    def finish(self) -> list[str | ParsedCall]:
        """End the answer. An incomplete call is returned as text; an incomplete closing marker is dropped."""
        rest, self._buffer = self._buffer, ""
        truncated_marker = self._after_call and self.format.closing.startswith(without_whitespace(rest))
        return [] if not rest or truncated_marker or (self._any_call and rest.isspace()) else [rest]

    def _parse_after_call(self) -> ParsedCall | str:
        """Another call, or an empty string after the closing marker. Raises Incomplete."""
        separator, closing = self.format.separator, self.format.closing
        if separator and (start := consume(self._buffer, 0, separator)) is not None and (match := self._read_call(start)):
            return self._take_call(*match)
        end = consume(self._buffer, 0, closing) if closing else None
        self._buffer = self._buffer[end or 0 :]
        self._after_call = False
        return ""

    def _parse_next(self) -> ParsedCall | str:
        """The text before a possible call, or a call, or the first character of what is not a call. Raises Incomplete."""
        candidate = self._find_candidate()
        if text := self._buffer[:candidate].rstrip():  # whitespace before a call does not belong to the text
            return self._take_text(len(text))
        if candidate == len(self._buffer):
            raise Incomplete
        start = consume(self._buffer, candidate, self.format.opening)
        match = None if start is None else self._read_call(start)
        return self._take_call(*match) if match else self._take_text(candidate + 1)

    def _find_candidate(self) -> int:
        """The first position where a call may start; the length of the buffer if there is none."""
        opening = self.format.opening
        if opening:
            position = self._buffer.find(opening[0])
            return len(self._buffer) if position < 0 else position
        return len(self._buffer) if self._any_text else skip_whitespace(self._buffer, 0)

    def _take_text(self, length: int) -> str:
        text, self._buffer = self._buffer[:length], self._buffer[length:]
        self._any_text = True
        return text

    def _take_call(self, call: ParsedCall, end: int) -> ParsedCall:
        self._buffer = self._buffer[end:]
        self._after_call = self._any_call = True
        return call

    def _read_call(self, start: int) -> tuple[ParsedCall, int] | None:
        """The call at a position and its end; None if there is no call. Raises Incomplete."""
        head = (None, start) if self.format.name_separator is None else self._read_name(start)
        if head is None:
            return None
        name, object_start = head[0], skip_whitespace(self._buffer, head[1])
        if object_start == len(self._buffer):
            raise Incomplete
        if self._buffer[object_start] != "{":
            return None
        self._scan = self._scan or ObjectScan(object_start)
        end = self._scan.end(self._buffer)
        self._scan = None
        call = _parse_call(self._buffer[object_start:end], name)
        return (call, end) if call and (self.unknown or call.name in self.names) else None

    def _read_name(self, start: int) -> tuple[str, int] | None:
        """The tool name at a position, and the end of the separator after it. Raises Incomplete."""
        incomplete = False
        for name in self.names:
            try:
                end = consume(self._buffer, start, name + (self.format.name_separator or ""))
            except Incomplete:
                incomplete = True
                continue
            # One name may be a prefix of another.
            if end is not None and self._buffer[skip_whitespace(self._buffer, end) :][:1] in ("{", ""):
                return name, end
        if incomplete:
            raise Incomplete
        return None


class ObjectScan:
    """Finds the end of a JSON object in a growing text; each character is examined once.

    Args:
        start: position of the object.
    """

    def __init__(self, start: int) -> None:
        self._position, self._depth, self._in_string = start, 0, False

    def end(self, text: str) -> int:
        """The position after the object. Raises Incomplete."""
        while match := (IN_STRING if self._in_string else OUTSIDE_STRING).search(text, self._position):
            character, self._position = match[0], match.end()
            if character == "\\":
                self._position += 1  # the escaped character, which may not have arrived yet
            elif character == '"':
                self._in_string = not self._in_string
            else:
                self._depth += 1 if character in "{[" else -1
                if self._depth == 0:
                    return self._position
        self._position = max(self._position, len(text))
        raise Incomplete


def skip_whitespace(text: str, position: int) -> int:
    """The first position from ``position`` on that is not whitespace."""
    while position < len(text) and text[position].isspace():
        position += 1
    return position


def consume(text: str, position: int, marker: str) -> int | None:
    """The position after a marker, ignoring whitespace before and in it; None if there is other text.

    Raises:
        Incomplete: the text ends before this is decided.
    """
    for character in marker:
        position = skip_whitespace(text, position)
        if position == len(text):
            raise Incomplete
        if text[position] != character:
            return None
        position += 1
    return position


def _parse_call(text: str, name: str | None) -> ParsedCall | None:
    """The call in a JSON object; if the name is known, the object holds the arguments."""
    try:
        # Models write line breaks in strings, which strict JSON does not allow.
        content = json.loads(text, strict=False)
        call = name_and_arguments(content) if name is None else (name, content)
        return call and ParsedCall(call[0], replace_surrogates(json.dumps(call[1], ensure_ascii=False, allow_nan=False)))
    except (ValueError, RecursionError):
        return None


def _append(parts: list[str | ParsedCall], part: str | ParsedCall) -> None:
    """Append a part, joining adjacent text."""
    if isinstance(part, str) and parts and isinstance(last := parts[-1], str):
        parts[-1] = last + part
    elif part:
        parts.append(part)
