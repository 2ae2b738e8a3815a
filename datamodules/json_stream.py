"""JSON from bytes: one line, or values one behind the other over a sliding buffer.

However large an array is, memory is about one of its elements and a chunk. The place is known at any time, so every complaint
names its line. Lone surrogates ("\\ud800"), which JSON can spell and tokenizers crash on, become U+FFFD.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from datamodules.records import RecordError

CHUNK = 1 << 18  # bytes read at once while an array is decoded
LONGEST_TOKEN = 16  # characters; strings aside, no token is longer, so an error further from the end is no cut token

BLANK = re.compile(r"[ \t\r\n]*")
SURROGATE = re.compile("[\ud800-\udfff]")
SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")

File = io.BufferedReader | gzip.GzipFile


# ---- bytes and values; the ValueErrors raised here lack a place, their callers add it


def pull(read: Callable[..., bytes], *size: int) -> bytes:
    """Calls a file's read method; what gzip finds wrong becomes a ValueError."""
    try:
        return read(*size)
    except EOFError:
        raise ValueError("the compressed file is truncated") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"not a sound gzip file: {error}") from None


def bad_bytes(error: UnicodeDecodeError) -> str:
    """What is wrong with bytes that are no UTF-8."""
    return f"not valid UTF-8: byte 0x{error.object[error.start]:02x} ({error.reason})"


def decode_line(data: bytes) -> Any:
    """The value of one line of JSON Lines.

    Raises:
        ValueError: it is not UTF-8, not JSON, or nested too deeply.
    """
    try:
        text = data.decode()
        return sound(json.loads(text), text)
    except UnicodeDecodeError as error:
        raise ValueError(bad_bytes(error)) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("not usable JSON: nested too deeply") from None


def sound(value: Any, source: str, start: int = 0, end: int | None = None) -> Any:
    """The value without lone surrogates. They can only come from escapes, so most sources need no second look."""
    escaped = SURROGATE_ESCAPE.search(source, start, len(source) if end is None else end)
    return _without_surrogates(value) if escaped else value


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return SURROGATE.sub("\ufffd", value)
    if isinstance(value, list):
        return [_without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(item) for key, item in value.items()}
    return value


# ---- values from a stream


def sequence(window: Window) -> Iterator[tuple[int, Any]]:
    """(line, value) of values that follow one another, one a line or not."""
    while window.peek():
        yield window.value()


def array(window: Window) -> Iterator[tuple[int, Any]]:
    """(line, value) of the elements of an array, which has to be all that the file holds."""
    window.take("[")
    if window.peek() != "]":
        yield window.value()
        while window.peek() == ",":
            window.take(",")
            yield window.value()
    window.take("]")
    if window.peek():
        raise window.error("not valid JSON: text behind the end of the array")


class Window:
    """A buffer that slides over the text of a file, and the place in it: `at` in the buffer, `line` in the file."""

    def __init__(self, path: str, file: File):
        self.path, self.file = path, file
        self.bytes = codecs.getincrementaldecoder("utf-8-sig")()
        self.buffer, self.at, self.line = "", 0, 1
        self.ended = False  # whether the buffer holds all the rest of the file
        self.damage: str | None = None  # why nothing beyond the buffer can be read
        self.decoder = json.JSONDecoder()

    def peek(self) -> str:
        """Goes to the next character that is not blank and returns it; "" at the end of the file."""
        while True:
            blank = BLANK.match(self.buffer, self.at)
            assert blank
            self._move(blank.end())
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if not self._grow():
                return ""

    def take(self, expected: str) -> None:
        found = self.peek()
        if not found:
            raise self.error("the file is truncated: its array has no end")
        if found != expected:
            raise self.error(f"not valid JSON: ',' or ']' expected here, not {found!r}")
        self._move(self.at + 1)

    def value(self) -> tuple[int, Any]:
        """(line, value) of the JSON value that begins at the next character that is not blank."""
        self.peek()
        while (decoded := self._decode()) is None:
            self._grow()
        value, end = decoded
        line = self.line
        self._move(end)
        return line, value

    def error(self, reason: str) -> RecordError:
        return RecordError(self.path, self.line, reason)

    def _move(self, to: int) -> None:
        self.line += self.buffer.count("\n", self.at, to)
        self.at = to

    def _decode(self) -> tuple[Any, int] | None:
        """(value, its end); None where the buffer may end within the value."""
        try:
            value, end = self.decoder.raw_decode(self.buffer, self.at)
            value = sound(value, self.buffer, self.at, end)
        except json.JSONDecodeError as error:
            unterminated = error.msg.startswith("Unterminated string") and not self.ended
            if unterminated or self._near_end(error.pos):  # more text may mend it
                return None
            raise self._syntax_error(error) from None
        except (ValueError, RecursionError) as error:  # a number of 5,000 digits, brackets 1,000 deep
            raise self.error(f"not usable JSON: {error}") from None
        if not isinstance(value, dict) and self._near_end(end):  # a number may go on: 1 is the beginning of 1.5
            return None
        return value, end

    def _near_end(self, position: int) -> bool:
        return position >= len(self.buffer) - LONGEST_TOKEN and not self.ended

    def _syntax_error(self, error: json.JSONDecodeError) -> RecordError:
        if error.msg.startswith("Unterminated string") or error.pos >= len(self.buffer.rstrip()):
            return self.error("the file is truncated: it ends within this record")
        line = self.line + self.buffer.count("\n", self.at, error.pos)
        return RecordError(self.path, line, f"not valid JSON: {error.msg}")

    def _grow(self) -> bool:
        """Drops what is behind and reads on; False at the end of the file.

        It reads at least as much as is left in the buffer: doubling keeps the repeated decoding of a large record
        linear. Damage is reported only when the sound text before it has been used up.
        """
        left = self.buffer[self.at :]
        text = "" if self.damage else self._read(max(CHUNK, len(left)))
        if self.damage and not text:
            raise RecordError(self.path, self.line + left.count("\n"), self.damage)
        self.buffer, self.at, self.ended = left + text, 0, not text
        return not self.ended

    def _read(self, size: int) -> str:
        """The next text of the file, "" at its end, and before damage what can still be read."""
        text = ""
        while not (text or self.damage):  # a chunk may end inside its only character
            data = self._read_bytes(size)
            try:
                text = self.bytes.decode(data, final=not data)
            except UnicodeDecodeError as error:
                self.damage, text = bad_bytes(error), error.object[: error.start].decode()
            if not data:
                break
        return text

    def _read_bytes(self, size: int) -> bytes:
        """Like the file's `read`, which would lose what precedes the damage of a compressed file."""
        pieces = []
        try:
            while size > 0 and (piece := pull(self.file.read1, size)):
                pieces.append(piece)
                size -= len(piece)
        except ValueError as error:
            self.damage = str(error)
        return b"".join(pieces)
