"""From the paths in a recipe to records.

    .jsonl .ndjson    one JSON object per line; blank lines are allowed
    .json             an array of objects, several objects one after another, or a single object
    .parquet          one record per row; its columns are the keys
    .txt .md          the whole file is one document, {"text": ...}

The first bytes of a file decide where they contradict its suffix or there is none (file_type.py). All formats except Parquet
may be compressed with gzip (.jsonl.gz). Text is UTF-8, with or without a byte order mark.

Choices:
- Every record knows its file and line, and every error names them: ``data.jsonl:17: not valid JSON: ...``.
- Files are streamed: memory is bounded by one record and a chunk (in Parquet, by one row group), however large a file is.
- What the keys of a record mean is decided elsewhere: in ``text_of`` and in conversations.py.
"""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Iterator, Sequence

from datamodules.file_type import is_gzip, suffix_of
from datamodules.readers import READERS, read_with, reader_for
from datamodules.records import OnError, Record, RecordError, json_type, keys_of, raise_error

PLACEHOLDER = re.compile(r"(^|/)path/to(/|$)|<[^<>]+>|(^|[/_-])your[_-]|\.\.\.", re.IGNORECASE)


def read(path: str, on_error: OnError = raise_error) -> Iterator[Record]:
    """Iterate over the records of a file.

    Args:
        path: the file.
        on_error: called with each bad record that can be skipped (a bad line, or an array element that is not an object).
            Unless it raises, as the default does, reading continues after the record.

    Raises:
        RecordError: damage that hides where the next record begins, such as a syntax error in an array or a truncated file.
        ValueError: the file type is not supported.
    """
    return read_with(reader_for(path), path, on_error)


def text_of(record: Record) -> str:
    """The text of a pretraining record, ``{"text": ...}``.

    Raises:
        RecordError: the key is missing, or its value is not a string or only whitespace.
    """
    if "text" not in record.value:
        raise RecordError(record.file, record.line, f"no key 'text'; the record's keys: {keys_of(record.value)}")
    text = record.value["text"]
    if not isinstance(text, str):
        raise RecordError(record.file, record.line, f"'text' must be a string, not {json_type(text)}")
    if not text or text.isspace():
        raise RecordError(record.file, record.line, "'text' is empty")
    return text


# -- paths ---------------------------------------------------------------------------------------------------------------


def expand(files: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[str]:
    """Expand a path, a list of paths, or a glob (``*``, ``?``, ``[...]``, and ``**`` for nested folders) to files.

    The matches of a glob are sorted, and a file that is named more than once is kept at its first position. ``~`` is the home
    folder.

    Raises:
        ValueError: there are no files, a path does not exist, is a placeholder or a folder, a glob has no match, or a file
            type is not supported.
    """
    paths = [files] if isinstance(files, str | os.PathLike) else files
    matches = [match for path in paths for match in _expand_one(os.fspath(path))]
    if not matches:
        raise ValueError("no files given")
    unique: dict[str, str] = {}
    for path in matches:
        unique.setdefault(os.path.realpath(path), path)
    return list(unique.values())


def _expand_one(path: str) -> list[str]:
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        raise ValueError(f"{path!r} is a folder; name the files in it, for example {_example_glob(path)!r}")
    if os.path.exists(path):  # checked first, because a file may be called "data[1].jsonl"
        matches = [path]
    elif PLACEHOLDER.search(path.replace(os.sep, "/")):
        raise ValueError(f"{path!r} is a placeholder; replace it with the path of your own file")
    elif any(character in path for character in "*?["):
        matches = _glob(path)
    else:
        raise ValueError(_missing(path))
    for match in matches:
        reader_for(match)  # reject unsupported files before anything is read
    return matches


def _glob(pattern: str) -> list[str]:
    matches = sorted(path for path in glob.glob(pattern, recursive=True) if not os.path.isdir(path))
    if not matches:
        raise ValueError(f"no file matches {pattern!r}")
    return matches


def _example_glob(folder: str) -> str:
    """A glob that matches a supported file of the folder, if it has one."""
    for name in sorted(os.listdir(folder)):
        if suffix_of(name) in READERS:
            return os.path.join(folder, f"*{suffix_of(name)}{'.gz' * is_gzip(name)}")
    return os.path.join(folder, "*.jsonl")


def _missing(path: str) -> str:
    folder, name = os.path.split(path)
    if not os.path.isdir(folder or "."):
        return f"file not found: {path}; folder not found: {folder}"
    similar = difflib.get_close_matches(name, os.listdir(folder or "."), n=3)
    hint = f"; did you mean {' or '.join(repr(os.path.join(folder, name)) for name in similar)}?" if similar else ""
    return f"file not found: {path}{hint}"
