"""Calls of tools in the text of an answer, written as the model's chat template writes them; see call_format.py.

Text that may become a call is held back, everything else is given out as it comes; a call is given out when it is complete.
What is no call of a tool that the request has, or no JSON, stays text. Where calls have no opening mark, a call can only be
the beginning of the answer or follow another one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from bumblebee.tokenizer.assistant_mask import without_whitespace
from bumblebee.tokenizer.special_token_guard import replace_surrogates
from serve.tool_call_format import CallFormat, named

QUOTED, UNQUOTED = re.compile(r'["\\]'), re.compile(r'["{}\[\]]')


@dataclass(frozen=True)
class Call:
    """A call of a tool; the arguments are the JSON text of an object."""

    name: str
    arguments: str


class Unfinished(Exception):
    """Only more text can tell."""


class CallParser:
    """Takes one answer apart into text and calls while it arrives. How it is cut into pieces makes no difference.

    Args:
        format: how the model writes calls.
        names: of the tools that may be called.
    """

    def __init__(self, format: CallFormat, names: Sequence[str]) -> None:
        self.format, self.names = format, list(names)
        self._held = ""  # not given out yet
        self._scan: ObjectScan | None = None  # of the object in what is held
        self._behind_call = False  # whether what is held follows a call directly
        self._called = self._written = False  # whether there was a call, or text

    def feed(self, text: str) -> list[str | Call]:
        """The text and the calls that are certain now."""
        self._held += text
        parts: list[str | Call] = []
        try:
            while self._held:
                _append(parts, self._behind() if self._behind_call else self._next())
        except Unfinished:
            pass
        return parts

    def finish(self) -> list[str | Call]:
        """What is left when no more text comes: what had only begun to be a call is text, a cut closing mark is nothing."""
        rest, self._held = self._held, ""
        cut = self._behind_call and self.format.closing.startswith(without_whitespace(rest))
        return [] if not rest or cut or (self._called and rest.isspace()) else [rest]

    def _behind(self) -> Call | str:
        """Another call, or nothing where a call ends. Raises Unfinished."""
        joint, closing = self.format.joint, self.format.closing
        if joint and (at := consume(self._held, 0, joint)) is not None and (found := self._read(at)):
            return self._take(*found)
        end = consume(self._held, 0, closing) if closing else None
        self._held = self._held[end or 0 :]
        self._behind_call = False
        return ""

    def _next(self) -> Call | str:
        """The text before what may be a call, or a call, or the character that begins none. Raises Unfinished."""
        begin = self._candidate()
        if text := self._held[:begin].rstrip():  # blanks before a call are not the answer's
            return self._say(len(text))
        if begin == len(self._held):
            raise Unfinished
        at = consume(self._held, begin, self.format.opening)
        found = None if at is None else self._read(at)
        return self._take(*found) if found else self._say(begin + 1)

    def _candidate(self) -> int:
        """The first place where a call may begin; the length of the text if there is none."""
        opening = self.format.opening
        if opening:
            at = self._held.find(opening[0])
            return len(self._held) if at < 0 else at
        return len(self._held) if self._written else past_blanks(self._held, 0)

    def _say(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        self._written = True
        return text

    def _take(self, call: Call, end: int) -> Call:
        self._held = self._held[end:]
        self._behind_call = self._called = True
        return call

    def _read(self, at: int) -> tuple[Call, int] | None:
        """The call that stands at a place, and its end; None if there is none. Raises Unfinished."""
        found = (None, at) if self.format.between is None else self._head(at)
        if found is None:
            return None
        name, begin = found[0], past_blanks(self._held, found[1])
        if begin == len(self._held):
            raise Unfinished
        if self._held[begin] != "{":
            return None
        self._scan = self._scan or ObjectScan(begin)
        end = self._scan.end(self._held)
        self._scan = None
        call = _call(self._held[begin:end], name)
        return (call, end) if call and call.name in self.names else None

    def _head(self, at: int) -> tuple[str, int] | None:
        """The name that stands at a place, and the end of what parts it from its arguments. Raises Unfinished."""
        unfinished = False
        for name in self.names:
            try:
                end = consume(self._held, at, name + (self.format.between or ""))
            except Unfinished:
                unfinished = True
                continue
            # One name may be the beginning of another.
            if end is not None and self._held[past_blanks(self._held, end) :][:1] in ("{", ""):
                return name, end
        if unfinished:
            raise Unfinished
        return None


class ObjectScan:
    """Finds where a JSON object ends, in a text that grows: every character is looked at once.

    Args:
        begin: where it begins.
    """

    def __init__(self, begin: int) -> None:
        self._at, self._depth, self._quoted = begin, 0, False

    def end(self, text: str) -> int:
        """The place behind the object. Raises Unfinished."""
        while found := (QUOTED if self._quoted else UNQUOTED).search(text, self._at):
            mark, self._at = found[0], found.end()
            if mark == "\\":
                self._at += 1  # whatever is escaped; its place may not be there yet
            elif mark == '"':
                self._quoted = not self._quoted
            else:
                self._depth += 1 if mark in "{[" else -1
                if self._depth == 0:
                    return self._at
        self._at = max(self._at, len(text))
        raise Unfinished


def past_blanks(text: str, at: int) -> int:
    """The first place from one on that is no blank."""
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def consume(text: str, at: int, mark: str) -> int | None:
    """The place behind a mark, blanks before and in it left aside; None if another text stands there.

    Raises:
        Unfinished: the text ends before that is known.
    """
    for character in mark:
        at = past_blanks(text, at)
        if at == len(text):
            raise Unfinished
        if text[at] != character:
            return None
        at += 1
    return at


def _call(text: str, name: str | None) -> Call | None:
    """The call in an object; where the name is known, the object is the arguments."""
    try:
        # Models break lines within strings, which JSON does not allow.
        content = json.loads(text, strict=False)
        found = named(content) if name is None else (name, content)
        return found and Call(found[0], replace_surrogates(json.dumps(found[1], ensure_ascii=False, allow_nan=False)))
    except (ValueError, RecursionError):
        return None


def _append(parts: list[str | Call], part: str | Call) -> None:
    """Pieces of text that follow each other become one."""
    if isinstance(part, str) and parts and isinstance(last := parts[-1], str):
        parts[-1] = last + part
    elif part:
        parts.append(part)
