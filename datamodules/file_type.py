"""The type of a data file, from its first bytes: its name decides only where they leave a choice.

    Parquet       begins with "PAR1", whatever its name
    gzip          begins with 1f 8b, whatever its name; what is compressed determines the type
    JSON          begins with { or [, unless the suffix is that of a text file: an array, JSON Lines or consecutive objects
    text          is named .txt or .md, or has no suffix

So an array that is named .jsonl, Parquet that is named .json and files without suffix (part-00000) are read as what they are.
"""

from __future__ import annotations

import codecs
import gzip
import json
import os
import stat
from collections.abc import Collection

GZIP, PARQUET = b"\x1f\x8b", b"PAR1"
JSON, JSON_LINES = ".json", ".jsonl"  # the suffixes that stand for the two layouts
JSON_SUFFIXES = (JSON, JSON_LINES, ".ndjson")
HEAD = 1 << 16  # bytes that are looked at


def file_type(path: str, supported: Collection[str]) -> str:
    """The suffix by which a file would have to be named.

    Args:
        path: the file; one that does not exist is judged by its name.
        supported: suffixes that have a reader.

    Raises:
        ValueError: the file type is not supported, or the file is a pipe, which cannot be read twice.
    """
    suffix, head = suffix_of(path), _read_head(path)
    if head.startswith(PARQUET) or suffix == ".parquet":
        if is_gzip(path):
            raise ValueError(
                f"{path!r}: Parquet files, which are compressed internally, cannot be read as .gz: use gunzip first"
            )
        return ".parquet"
    if suffix in supported and suffix not in JSON_SUFFIXES:
        return suffix
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if text[:1] in (b"{", b"["):
        return _json_layout(text, suffix)
    if suffix in JSON_SUFFIXES:
        return suffix
    if suffix or b"\0" in head:
        kind = f"file type {suffix!r}" if suffix else "binary file"
        raise ValueError(f"{path!r}: unsupported {kind}; supported: {', '.join(supported)}, each also as .gz")
    return ".txt"


def suffix_of(path: str) -> str:
    """The suffix of a file name, without .gz."""
    return os.path.splitext(path.lower().removesuffix(".gz"))[1]


def is_gzip(path: str) -> bool:
    """Whether a file is compressed with gzip, or named as if it were."""
    return path.lower().endswith(".gz") or _first_bytes(path, len(GZIP)) == GZIP


def _read_head(path: str) -> bytes:
    """The first bytes of the uncompressed file; none if it does not exist or is damaged, which its reader reports."""
    if os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path!r} is not a regular file: data files are read more than once, so pipes are not supported")
    if not is_gzip(path):
        return _first_bytes(path, HEAD)
    try:
        with gzip.open(path) as file:
            return file.read1(HEAD)
    except (OSError, EOFError):
        return b""


def _first_bytes(path: str, count: int) -> bytes:
    if not os.path.isfile(path):
        return b""
    with open(path, "rb") as file:
        return file.read(count)


def _json_layout(text: bytes, suffix: str) -> str:
    """Whether JSON is read line by line or as a stream of values, from its first line."""
    line, newline, rest = text.partition(b"\n")
    if suffix == JSON or line.strip() in (b"{", b"["):  # an array, or an object that spans lines
        return JSON
    if line.startswith(b"{") and suffix in JSON_SUFFIXES:
        return JSON_LINES
    # An array that is followed by something is a bad first record; one alone is the file.
    more = line.startswith(b"{") or rest.strip()
    return JSON_LINES if newline and more and _is_json(line) else JSON


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
