"""One reader per file format, chosen by ``file_type``. To support another format, add a reader to READERS.

pyarrow is imported here only. Parquet files are read by row group, so memory is bounded by one of them.
"""

from __future__ import annotations

import codecs
import gzip
from collections.abc import Callable, Iterator

from datamodules.file_type import file_type, is_gzip
from datamodules.json_stream import BinaryFile, decode_line, describe_decode_error, iter_values, read_bytes
from datamodules.records import OnError, Record, RecordError, json_type

Reader = Callable[[str, BinaryFile, OnError], Iterator[Record]]

PARQUET_ROWS = 1024  # converted to Python objects at once


def read_with(reader: Reader, path: str, on_error: OnError) -> Iterator[Record]:
    """Open a file, decompress it if necessary, and read its records."""
    with gzip.open(path) if is_gzip(path) else open(path, "rb") as file:
        yield from reader(path, file, on_error)


def reader_for(path: str) -> Reader:
    """The reader for a file, see file_type.py.

    Raises:
        ValueError: the file type is not supported.
    """
    return READERS[file_type(path, READERS)]


def _read_json_lines(path: str, file: BinaryFile, on_error: OnError) -> Iterator[Record]:
    line = 0
    while True:
        line += 1
        try:
            data = read_bytes(file.readline)
        except ValueError as error:
            raise RecordError(path, line, str(error)) from None
        if not data:
            return
        if line == 1:
            data = data.removeprefix(codecs.BOM_UTF8)
        if data.isspace() or not data:
            continue
        try:
            value = _require_object(decode_line(data))
        except ValueError as error:
            on_error(RecordError(path, line, str(error)))
        else:
            yield Record(path, line, value)


def _read_json(path: str, file: BinaryFile, on_error: OnError) -> Iterator[Record]:
    for line, value in iter_values(path, file):
        try:
            record = Record(path, line, _require_object(value))
        except ValueError as error:
            on_error(RecordError(path, line, str(error)))
        else:
            yield record


def _require_object(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise ValueError(f"a record must be a JSON object, {{...}}, not {json_type(value)}")
    return value


def _read_text(path: str, file: BinaryFile, on_error: OnError) -> Iterator[Record]:
    try:
        text = read_bytes(file.read).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + error.object.count(b"\n", 0, error.start)
        on_error(RecordError(path, line, describe_decode_error(error)))
    except ValueError as error:
        raise RecordError(path, 1, str(error)) from None
    else:
        if text:
            yield Record(path, 1, {"text": text.replace("\r\n", "\n")})


def _read_parquet(path: str, file: BinaryFile, on_error: OnError) -> Iterator[Record]:
    """The rows of a file as records. Nulls are kept as None."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"{path}: reading Parquet files needs pyarrow: pip install pyarrow ({error})") from error
    row = 0
    try:
        table = parquet.ParquetFile(file, pre_buffer=False)
        for group in range(table.num_row_groups):
            # No threads: records may be read in a process that forks workers.
            for batch in table.iter_batches(PARQUET_ROWS, row_groups=[group], use_threads=False):
                for value in batch.to_pylist():
                    row += 1
                    yield Record(path, row, value)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise RecordError(path, row + 1, f"not a valid Parquet file: {str(error).splitlines()[0]}") from None


READERS: dict[str, Reader] = {
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".txt": _read_text,
    ".md": _read_text,
}
