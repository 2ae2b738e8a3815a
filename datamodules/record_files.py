"""From paths to records: what a user names in a recipe, file by file and record by record.

    .jsonl .ndjson    one JSON object a line, blank lines allowed
    .json             an array of objects; objects one after another (JSON Lines under the wrong name); a single object
    .parquet          one record a row, its columns are the keys
    .txt .md          the whole file is one document, {"text": ...}

each file but Parquet also compressed, with .gz behind its suffix. Text is UTF-8, with or without a byte order mark.

Choices made:
- Every record knows its file and line, and every complaint names them: `data.jsonl:17: not valid JSON: ...`.
- Files are streamed: memory is about one record and a chunk, however large the file is (one row group of Parquet).
- Lone surrogates ("\\ud800"), which JSON can spell and tokenizers crash on, become U+FFFD.
- Nothing here knows what a record means, apart from `text_of`; `datamodules.conversations` does.

This is the face of `paths`, `readers` and `records`, and all that the rest of the code needs.
"""

from collections.abc import Iterator

from datamodules.paths import expand, identity
from datamodules.readers import reader_of, records
from datamodules.records import OnError, Record, RecordError, fail, kind

__all__ = ["OnError", "Record", "RecordError", "expand", "fail", "identity", "kind", "read", "text_of"]


def read(path: str, on_error: OnError = fail) -> Iterator[Record]:
    """The records of one file, in order.

    `on_error` is called with every bad record that can be stepped over (a bad line, an element that is not an object);
    unless it raises, as the default does, reading goes on behind it. Damage that hides where the next record begins (a
    syntax error in an array, a truncated file) is always raised.

    Raises:
        RecordError: bad JSON, bad UTF-8, a truncated file, a record that is not an object.
        ValueError: a file of an unsupported kind.
    """
    return records(path, reader_of(path), on_error)


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
