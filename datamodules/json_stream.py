"""Incremental JSON decoding with line numbers: JSON Lines, or JSON values in a sliding buffer.

However large an array is, memory is bounded by one of its elements and a chunk. Lone surrogates ("\\ud800"), which JSON can
express but tokenizers reject, become U+FFFD.

ijson 3.6 with its C backend is faster (CPU time for a 47 MB array 0.3 s instead of 0.6 s, for JSON Lines 0.3 s instead of
0.5 s), but it does not report the line of an element or of an error, which every error message about a record needs.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator

from datamodules.records import RecordError

CHUNK = 1 << 18  # bytes that are read at once while an array is decoded
LONGEST_TOKEN = 16  # characters; tokens other than strings are shorter, so an error farther from the end is not a cut token

BLANKS = re.compile(r"[ \t\r\n]*")
SURROGATE = re.compile("[\ud800-\udfff]")
SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")

BinaryFile = io.BufferedReader | gzip.GzipFile


# -- bytes and values; callers add file and line to the ValueErrors raised here ------------------------------------------


def read_bytes(read: Callable[..., bytes], *size: int) -> bytes:
    """Call a file's read method and turn gzip errors into ValueErrors."""
    try:
        return read(*size)
    except EOFError:
        raise ValueError("the compressed file is truncated") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"not a valid gzip file: {error}") from None


def describe_decode_error(error: UnicodeDecodeError) -> str:
    """The reason that an error message gives for invalid UTF-8."""
    return f"not valid UTF-8: byte 0x{error.object[error.start]:02x} ({error.reason})"


def decode_line(data: bytes) -> object:
    """Decode one line of JSON Lines.

    Raises:
        ValueError: the line is not UTF-8, not JSON, or nested too deeply.
    """
    try:
        text = data.decode()
        return replace_surrogates(json.loads(text), text)
    except UnicodeDecodeError as error:
        raise ValueError(describe_decode_error(error)) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("cannot decode JSON: nested too deeply") from None


def replace_surrogates(value: object, source: str, start: int = 0, end: int | None = None) -> object:
    """Replace lone surrogates by U+FFFD in a value decoded from ``source[start:end]``.

    They can only come from escape sequences, so most values need no second pass.
    """
    escaped = SURROGATE_ESCAPE.search(source, start, len(source) if end is None else end)
    return _without_surrogates(value) if escaped else value


def _without_surrogates(value: object) -> object:
    if isinstance(value, str):
        return SURROGATE.sub("\ufffd", value)
    if isinstance(value, list):
        return [_without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(item) for key, item in value.items()}
    return value


# -- values from a stream ------------------------------------------------------------------------------------------------


def iter_values(path: str, file: BinaryFile) -> Iterator[tuple[int, object]]:
    """(line, value) of each element if the file holds one array, otherwise of each of its consecutive values.

    Raises:
        RecordError: damage that hides where the next value begins.
    """
    stream = JSONStream(path, file)
    if stream.peek() == "[":
        yield from _iter_array(stream)
    else:
        while stream.peek():
            yield stream.next_value()


def _iter_array(stream: JSONStream) -> Iterator[tuple[int, object]]:
    stream.skip("[")
    if stream.peek() != "]":
        yield stream.next_value()
        while stream.peek() == ",":
            stream.skip(",")
            yield stream.next_value()
    stream.skip("]")
    if stream.peek():
        raise stream.error("not valid JSON: text after the end of the array")


class JSONStream:
    """A buffer that slides over the text of a file, with a position in the buffer and the line in the file."""

    def __init__(self, path: str, file: BinaryFile) -> None:
        self._path, self._file = path, file
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder()
        self._buffer, self._position, self._line = "", 0, 1
        self._at_end = False  # whether the buffer holds all of the remaining text
        self._damage: str | None = None  # why nothing after the buffer can be read

    def peek(self) -> str:
        """Skip blanks and return the next character, or "" at the end of the file."""
        while True:
            blanks = BLANKS.match(self._buffer, self._position)
            assert blanks
            self._advance_to(blanks.end())
            if self._position < len(self._buffer):
                return self._buffer[self._position]
            if not self._fill():
                return ""

    def skip(self, expected: str) -> None:
        """Skip blanks and the expected character."""
        character = self.peek()
        if not character:
            raise self.error("the file is truncated: the array does not end")
        if character != expected:
            raise self.error(f"not valid JSON: expected ',' or ']', got {character!r}")
        self._advance_to(self._position + 1)

    def next_value(self) -> tuple[int, object]:
        """Skip blanks and decode a value.

        Returns:
            The line on which it begins, and the value.
        """
        self.peek()
        while (decoded := self._decode()) is None:
            self._fill()
        value, end = decoded
        line = self._line
        self._advance_to(end)
        return line, value

    def error(self, reason: str) -> RecordError:
        """An error at the current line."""
        return RecordError(self._path, self._line, reason)

    def _advance_to(self, position: int) -> None:
        self._line += self._buffer.count("\n", self._position, position)
        self._position = position

    def _decode(self) -> tuple[object, int] | None:
        """The value and where it ends, or None if the buffer may end inside the value."""
        try:
            value, end = self._json.raw_decode(self._buffer, self._position)
            value = replace_surrogates(value, self._buffer, self._position, end)
        except json.JSONDecodeError as error:
            unterminated = error.msg.startswith("Unterminated string") and not self._at_end
            if unterminated or self._near_end(error.pos):  # may be valid with more text
                return None
            raise self._syntax_error(error) from None
        except (ValueError, RecursionError) as error:  # a number of 5,000 digits, or brackets nested 1,000 deep
            raise self.error(f"cannot decode JSON: {error}") from None
        if not isinstance(value, dict) and self._near_end(end):  # a number may continue: 1 is the beginning of 1.5
            return None
        return value, end

    def _near_end(self, position: int) -> bool:
        return position >= len(self._buffer) - LONGEST_TOKEN and not self._at_end

    def _syntax_error(self, error: json.JSONDecodeError) -> RecordError:
        if error.msg.startswith("Unterminated string") or error.pos >= len(self._buffer.rstrip()):
            return self.error("the file is truncated: it ends within this record")
        line = self._line + self._buffer.count("\n", self._position, error.pos)
        return RecordError(self._path, line, f"not valid JSON: {error.msg}")

    def _fill(self) -> bool:
        """Drop consumed text and read on; returns False at the end of the file.

        Reads at least as much as remains in the buffer: doubling keeps repeated decoding of a large record linear. Damage is
        reported only when the intact text before it has been consumed.
        """
        rest = self._buffer[self._position :]
        text = "" if self._damage else self._read_text(max(CHUNK, len(rest)))
        if self._damage and not text:
            raise RecordError(self._path, self._line + rest.count("\n"), self._damage)
        self._buffer, self._position, self._at_end = rest + text, 0, not text
        return not self._at_end

    def _read_text(self, size: int) -> str:
        """The next text of the file, "" at its end; before damage, the text that can still be read."""
        text = ""
        while not (text or self._damage):  # a chunk may end inside its only character
            data = self._read_bytes(size)
            try:
                text = self._utf8.decode(data, final=not data)
            except UnicodeDecodeError as error:
                self._damage, text = describe_decode_error(error), error.object[: error.start].decode()
            if not data:
                break
        return text

    def _read_bytes(self, size: int) -> bytes:
        """Like the file's ``read``, which would lose the bytes before the damage of a compressed file."""
        parts = []
        try:
            while size > 0 and (part := read_bytes(self._file.read1, size)):
                parts.append(part)
                size -= len(part)
        except ValueError as error:
            self._damage = str(error)
        return b"".join(parts)
