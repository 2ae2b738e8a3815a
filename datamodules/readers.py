"""How each kind of file is read: suffix to reader. A new format is one more reader in READERS."""

from __future__ import annotations

import codecs
import gzip
import os
from collections.abc import Callable, Iterator
from typing import Any

from datamodules.json_stream import File, Window, array, bad_bytes, decode_line, pull, sequence
from datamodules.parquet import read_parquet
from datamodules.records import OnError, Record, RecordError, kind

Reader = Callable[[str, File, OnError], Iterator[Record]]


def records(path: str, reader: Reader, on_error: OnError) -> Iterator[Record]:
    """The records of a file, by its reader."""
    with gzip.open(path) if compressed(path) else open(path, "rb") as file:
        yield from reader(path, file, on_error)


def reader_of(path: str) -> Reader:
    """The reader of a file, by its suffix.

    Raises:
        ValueError: there is none.
    """
    suffix = suffix_of(path)
    if suffix not in READERS:
        supported = ", ".join(READERS)
        raise ValueError(f"{path!r}: files of kind {suffix!r} cannot be read; supported: {supported}, each also as .gz")
    if suffix == ".parquet" and compressed(path):
        raise ValueError(
            f"{path!r}: Parquet, which compresses by itself, cannot be read from a .gz file: unpack it with gunzip"
        )
    return READERS[suffix]


def suffix_of(path: str) -> str:
    """What kind of file it is, whether or not it is compressed."""
    return os.path.splitext(path.lower().removesuffix(".gz"))[1]


def compressed(path: str) -> bool:
    """Whether gzip is to be undone."""
    return path.lower().endswith(".gz")


def _read_lines(path: str, file: File, on_error: OnError) -> Iterator[Record]:
    line = 0
    while True:
        line += 1
        try:
            data = pull(file.readline)
        except ValueError as error:
            raise RecordError(path, line, str(error)) from None
        if not data:
            return
        if line == 1:
            data = data.removeprefix(codecs.BOM_UTF8)
        if data.isspace() or not data:
            continue
        try:
            value = _object(decode_line(data))
        except ValueError as error:
            on_error(RecordError(path, line, str(error)))
        else:
            yield Record(path, line, value)


def _read_values(path: str, file: File, on_error: OnError) -> Iterator[Record]:
    window = Window(path, file)
    for line, value in array(window) if window.peek() == "[" else sequence(window):
        try:
            record = Record(path, line, _object(value))
        except ValueError as error:
            on_error(RecordError(path, line, str(error)))
        else:
            yield record


def _read_document(path: str, file: File, on_error: OnError) -> Iterator[Record]:
    data = b""
    try:
        data = pull(file.read)
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + error.object.count(b"\n", 0, error.start)
        on_error(RecordError(path, line, bad_bytes(error)))
    except ValueError as error:
        raise RecordError(path, 1, str(error)) from None
    else:
        if text:
            yield Record(path, 1, {"text": text.replace("\r\n", "\n")})


# The text formats also lie in .gz files; `compressed` tells.
READERS: dict[str, Reader] = {
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".json": _read_values,
    ".parquet": read_parquet,
    ".txt": _read_document,
    ".md": _read_document,
}


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"a record must be a JSON object, {{...}}, not {kind(value)}")
    return value
