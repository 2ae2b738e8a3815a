"""The type of a data file is read from its first bytes; the name decides only where they leave a choice."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from datamodules.file_type import HEAD
from datamodules.prompt_files import read_prompts
from datamodules.record_files import expand, read
from datamodules.records import RecordError

VALUES = [{"text": "one"}, {"text": "two\nlines"}, {"text": "three"}]
LINES = "".join(json.dumps(value) + "\n" for value in VALUES)


def values_of(path: Path, content: str | bytes) -> list[dict]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    assert expand(str(path)) == [str(path)]
    return [record.value for record in read(str(path))]


@pytest.mark.parametrize("name", ["data.jsonl", "data.ndjson", "data.json", "data", "part-00000", "data.v2", "data.jsonl.gz"])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("blank", ["", "\ufeff", "\n \n"])
def test_array_is_read_whatever_the_name(tmp_path, name, indent, blank):
    text = (blank + json.dumps(VALUES, indent=indent)).encode()
    assert values_of(tmp_path / name, gzip.compress(text) if name.endswith(".gz") else text) == VALUES


@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data", "data.v2"])
def test_lines_and_spread_objects_are_read(tmp_path, name):
    assert values_of(tmp_path / name, LINES) == VALUES
    assert values_of(tmp_path / name, LINES.rstrip("\n")) == VALUES
    assert values_of(tmp_path / name, "\n".join(json.dumps(value, indent=2) for value in VALUES)) == VALUES
    assert values_of(tmp_path / name, gzip.compress(LINES.encode())) == VALUES


@pytest.mark.parametrize("name", ["data.jsonl", "data"])
def test_first_line_longer_than_the_head_is_read(tmp_path, name):
    long = [{"text": "x" * (HEAD + 10)}, *VALUES]
    assert values_of(tmp_path / name, "".join(json.dumps(value) + "\n" for value in long)) == long
    assert values_of(tmp_path / name, json.dumps(long)) == long


@pytest.mark.parametrize("name", ["data.json", "data", "data.jsonl", "data.parquet"])
def test_parquet_is_recognised_whatever_the_name(tmp_path, name):
    parquet.write_table(pyarrow.Table.from_pylist(VALUES), tmp_path / name)
    assert [record.value for record in read(str(tmp_path / name))] == VALUES


@pytest.mark.parametrize("name", ["data.txt", "data.md"])
def test_text_file_may_hold_json(tmp_path, name):
    assert values_of(tmp_path / name, LINES) == [{"text": LINES}]


def test_file_without_suffix_may_be_text(tmp_path):
    assert values_of(tmp_path / "corpus", "Bees fly.\n") == [{"text": "Bees fly.\n"}]
    assert [prompt.content for prompt in read_prompts(str(tmp_path / "corpus"))] == ["Bees fly."]


@pytest.mark.parametrize("first", ["[1, 2]", '{"text": }', '["text"]'])
def test_bad_first_line_can_still_be_skipped(tmp_path, first):
    path, errors = tmp_path / "data.jsonl", []
    path.write_text(f"{first}\n{LINES}")
    assert [record.value for record in read(str(path), on_error=errors.append)] == VALUES
    assert [error.line for error in errors] == [1]


def test_truncated_array_in_a_jsonl_file_is_named(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(VALUES)[:-1])
    with pytest.raises(RecordError, match=r"data\.jsonl:1: the file is truncated"):
        list(read(str(path)))


def test_what_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "table.csv").write_text("text\nbees\n")
    (tmp_path / "blob").write_bytes(b"\x7fELF\0\0")
    os.mkfifo(tmp_path / "pipe")
    for name, reason in (("table.csv", "file type '.csv'"), ("blob", "binary file"), ("pipe", "not a regular file")):
        with pytest.raises(ValueError, match=rf"{name}'.* {reason}"):
            expand(str(tmp_path / name))
