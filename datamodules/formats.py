"""From paths to records: what a user names in a recipe, file by file and record by record.

    .jsonl .ndjson    one JSON object a line, blank lines allowed
    .json             an array of objects; objects one after another (JSON Lines under the wrong name); a single object
    .txt .md          the whole file is one document, {"text": ...}
    python_docs       not a file: the corpus of `datamodules.python_docs`

each file also compressed, with .gz behind its suffix. All are UTF-8, with or without a byte order mark.

Choices made:
- Every record knows its file and line, and every complaint names them: `data.jsonl:17: not valid JSON: ...`.
- An array is decoded element by element over a sliding buffer, so memory is about one record and a chunk, however large
  the file is.
- Lone surrogates ("\\ud800"), which JSON can spell and tokenizers crash on, become U+FFFD.
- Nothing here knows what a record means, apart from `text_of`.

A new format is one more reader in READERS.
"""

import codecs
import difflib
import glob
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from datamodules import python_docs

CORPUS = "python_docs"
CHUNK = 1 << 18  # bytes read at once while an array is decoded
LONGEST_TOKEN = 16  # characters; strings aside, no token is longer, so an error further from the end is no cut token

PLACEHOLDER = re.compile(r"(^|/)path/to(/|$)|<[^<>]+>|(^|[/_-])your[_-]|\.\.\.", re.IGNORECASE)
BLANK = re.compile(r"[ \t\r\n]*")
SURROGATE = re.compile("[\ud800-\udfff]")
SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class Record:
    """One object of a file. `line` is the line, counted from 1, on which it begins."""

    file: str
    line: int
    value: dict[str, Any]


class RecordError(ValueError):
    """A record that cannot be used: `FILE:LINE: reason`."""

    def __init__(self, file: str, line: int, reason: str):
        super().__init__(file, line, reason)  # the arguments themselves, so that it survives pickling between workers
        self.file, self.line, self.reason = file, line, reason

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


OnError = Callable[[RecordError], object]
File = io.BufferedReader | gzip.GzipFile
Reader = Callable[[str, File, OnError], Iterator[Record]]


def fail(error: RecordError) -> NoReturn:
    """The default `on_error`: the first bad record ends the reading."""
    raise error


# ---- paths


def expand(files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[str]:
    """The files that a path, a list of paths, or a glob means (`*`, `?`, `[...]`, and `**` for folders in folders).

    The matches of a glob are sorted; a file that is named twice is kept once, at its first place. `~` is the home
    folder. The word `python_docs` is returned as it is; a file of that name is `./python_docs`.

    Raises:
        ValueError: nothing given, a path that does not exist, a placeholder, a folder, a glob without a match, or a
            file of an unsupported kind.
    """
    paths = [files] if isinstance(files, str | os.PathLike) else files
    found = [match for path in paths for match in _matches(os.fspath(path))]
    if not found:
        raise ValueError("no files were given")
    unique: dict[str, str] = {}
    for path in found:
        unique.setdefault(identity(path), path)
    return list(unique.values())


def identity(path: str) -> str:
    return path if path == CORPUS else os.path.realpath(path)


def _matches(path: str) -> list[str]:
    if path == CORPUS:
        return [path]
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        raise ValueError(f"{path!r} is a folder; name the files in it, for example {_example(path)!r}")
    if os.path.exists(path):  # first of all: a file may be called "data[1].jsonl"
        matches = [path]
    elif PLACEHOLDER.search(path.replace(os.sep, "/")):
        raise ValueError(f"{path!r} is a placeholder; put the path of your own file in its place")
    elif any(character in path for character in "*?["):
        matches = _glob(path)
    else:
        raise ValueError(_missing(path))
    for match in matches:
        _reader(match)  # now, not an hour later when its turn comes
    return matches


def _glob(pattern: str) -> list[str]:
    matches = sorted(path for path in glob.glob(pattern, recursive=True) if not os.path.isdir(path))
    if not matches:
        raise ValueError(f"no file matches {pattern!r}")
    return matches


def _example(folder: str) -> str:
    """A glob that would find something in the folder, if anything supported is there."""
    for name in sorted(os.listdir(folder)):
        if _suffix(name) in READERS:
            return os.path.join(folder, f"*{_suffix(name)}{'.gz' * _compressed(name)}")
    return os.path.join(folder, "*.jsonl")


def _missing(path: str) -> str:
    folder, name = os.path.split(path)
    if not os.path.isdir(folder or "."):
        return f"{path!r} does not exist, and neither does the folder {folder!r}"
    near = difflib.get_close_matches(name, os.listdir(folder or "."), n=3)
    hint = f"; did you mean {' or '.join(repr(os.path.join(folder, name)) for name in near)}?" if near else ""
    return f"{path!r} does not exist{hint}"


# ---- records


def read(path: str, on_error: OnError = fail) -> Iterator[Record]:
    """The records of one file, in order.

    `on_error` is called with every bad record that can be stepped over (a bad line, an element that is not an object);
    unless it raises, as the default does, reading goes on behind it. Damage that hides where the next record begins (a
    syntax error in an array, a truncated file) is always raised.

    Raises:
        RecordError: bad JSON, bad UTF-8, a truncated file, a record that is not an object.
        ValueError: a file of an unsupported kind.
    """
    return _corpus() if path == CORPUS else _records(path, _reader(path), on_error)


def text_of(record: Record) -> str:
    """The text of a pretraining record, `{"text": ...}`.

    Raises:
        RecordError: no such key, not a string, or nothing but whitespace.
    """
    if "text" not in record.value:
        keys = ", ".join(map(repr, record.value)) or "none"
        raise RecordError(record.file, record.line, f"no key 'text'; the record's keys: {keys}")
    text = record.value["text"]
    if not isinstance(text, str):
        raise RecordError(record.file, record.line, f"'text' must be a string, not {kind(text)}")
    if not text.strip():
        raise RecordError(record.file, record.line, "'text' is empty")
    return text


def _reader(path: str) -> Reader:
    suffix = _suffix(path)
    if suffix not in READERS:
        supported = ", ".join(READERS)
        raise ValueError(f"{path!r}: files of kind {suffix!r} cannot be read; supported: {supported}, each also as .gz")
    return READERS[suffix]


def _suffix(path: str) -> str:
    return os.path.splitext(path.lower().removesuffix(".gz"))[1]


def _compressed(path: str) -> bool:
    return path.lower().endswith(".gz")


def _records(path: str, reader: Reader, on_error: OnError) -> Iterator[Record]:
    with gzip.open(path) if _compressed(path) else open(path, "rb") as file:
        yield from reader(path, file, on_error)


def _corpus() -> Iterator[Record]:
    return numbered({"text": text} for text in python_docs.documents())


def numbered(values: Iterable[dict[str, Any]]) -> Iterator[Record]:
    """What is made of the corpus, as records."""
    for number, value in enumerate(values, 1):
        yield Record(CORPUS, number, value)


def _read_lines(path: str, file: File, on_error: OnError) -> Iterator[Record]:
    line = 0
    while True:
        line += 1
        try:
            data = _pull(file.readline)
        except ValueError as error:
            raise RecordError(path, line, str(error)) from None
        if not data:
            return
        if line == 1:
            data = data.removeprefix(codecs.BOM_UTF8)
        if data.isspace() or not data:
            continue
        try:
            value = _object(_decode_line(data))
        except ValueError as error:
            on_error(RecordError(path, line, str(error)))
        else:
            yield Record(path, line, value)


def _read_values(path: str, file: File, on_error: OnError) -> Iterator[Record]:
    window = _Window(path, file)
    for line, value in _array(window) if window.peek() == "[" else _sequence(window):
        try:
            record = Record(path, line, _object(value))
        except ValueError as error:
            on_error(RecordError(path, line, str(error)))
        else:
            yield record


def _read_document(path: str, file: File, on_error: OnError) -> Iterator[Record]:
    data = b""
    try:
        data = _pull(file.read)
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + error.object.count(b"\n", 0, error.start)
        on_error(RecordError(path, line, _bad_bytes(error)))
    except ValueError as error:
        raise RecordError(path, 1, str(error)) from None
    else:
        if text:
            yield Record(path, 1, {"text": text.replace("\r\n", "\n")})


READERS: dict[str, Reader] = {
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".json": _read_values,
    ".txt": _read_document,
    ".md": _read_document,
}


# ---- bytes and JSON values; the ValueErrors raised here lack a place, their callers add it


def _pull(read: Callable[..., bytes], *size: int) -> bytes:
    """Calls a file's read method; what gzip finds wrong becomes a ValueError."""
    try:
        return read(*size)
    except EOFError:
        raise ValueError("the compressed file is truncated") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"not a sound gzip file: {error}") from None


def _bad_bytes(error: UnicodeDecodeError) -> str:
    return f"not valid UTF-8: byte 0x{error.object[error.start]:02x} ({error.reason})"


def _decode_line(data: bytes) -> Any:
    try:
        text = data.decode()
        return _sound(json.loads(text), text)
    except UnicodeDecodeError as error:
        raise ValueError(_bad_bytes(error)) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("not usable JSON: nested too deeply") from None


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"a record must be a JSON object, {{...}}, not {kind(value)}")
    return value


def kind(value: Any) -> str:
    """What JSON calls it."""
    names: dict[type, str] = {dict: "an object", list: "an array", str: "a string", int: "a number", float: "a number"}
    return names.get(type(value)) or (json.dumps(value) if value is None or isinstance(value, bool) else type(value).__name__)


def _sound(value: Any, source: str, start: int = 0, end: int | None = None) -> Any:
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


# ---- JSON values from a stream


def _sequence(window: "_Window") -> Iterator[tuple[int, Any]]:
    """(line, value) of values that follow one another, one a line or not."""
    while window.peek():
        yield window.value()


def _array(window: "_Window") -> Iterator[tuple[int, Any]]:
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


class _Window:
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
            value = _sound(value, self.buffer, self.at, end)
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
                self.damage, text = _bad_bytes(error), error.object[: error.start].decode()
            if not data:
                break
        return text

    def _read_bytes(self, size: int) -> bytes:
        """Like the file's `read`, which would lose what precedes the damage of a compressed file."""
        pieces = []
        try:
            while size > 0 and (piece := _pull(self.file.read1, size)):
                pieces.append(piece)
                size -= len(piece)
        except ValueError as error:
            self.damage = str(error)
        return b"".join(pieces)
