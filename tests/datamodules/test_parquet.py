"""Parquet files: row by row, with row numbers, and errors for damaged files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from datamodules import conversations, record_files
from datamodules.record_files import expand, read, text_of
from datamodules.records import Record, RecordError

CHATS = [
    {"messages": [{"role": "user", "content": "Rain?"}, {"role": "assistant", "content": "Yes."}], "system": None},
    {"messages": [{"role": "user", "content": "花?"}, {"role": "assistant", "content": "🐝"}], "system": "Be brief."},
]


def write(path: Path, rows: list[dict], **options) -> str:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return str(path)


@pytest.mark.parametrize("compression", ["snappy", "zstd", "none"])
@pytest.mark.parametrize("row_group_size", [1, 7, 10_000])
def test_rows_are_read_with_their_numbers(tmp_path, row_group_size, compression):
    rows = [{"text": f"bee {n}", "n": n, "tags": ["a", None] * (n % 3)} for n in range(3000)]
    path = write(tmp_path / "data.parquet", rows[:50], row_group_size=row_group_size, compression=compression)
    assert list(read(path)) == [Record(path, line, row) for line, row in enumerate(rows[:50], 1)]
    path = write(tmp_path / "large.parquet", rows, row_group_size=2000, compression=compression)
    assert [record.line for record in read(path)] == list(range(1, 3001))


def test_globs_match_parquet_files(tmp_path):
    paths = [write(tmp_path / f"{name}.parquet", [{"text": name}]) for name in "ba"]
    assert expand(str(tmp_path / "*.parquet")) == sorted(paths)


def test_nested_columns_give_conversations(tmp_path):
    records = list(read(write(tmp_path / "chats.parquet", CHATS)))
    assert [conversations.parse_conversation(record).messages for record in records] == [
        CHATS[0]["messages"],
        [{"role": "system", "content": "Be brief."}, *CHATS[1]["messages"]],
    ]


def test_nulls_of_nested_columns_mean_missing_keys(tmp_path):
    call = {"id": None, "function": {"name": "f", "arguments": "{}"}}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    (record,) = read(write(tmp_path / "calls.parquet", [{"messages": turns, "tools": None}]))
    assert record.value["messages"][0]["tool_calls"] is None
    expected = {"type": "function", "function": {"name": "f", "arguments": {}}}
    assert conversations.parse_conversation(record).messages == [
        turns[0],
        {"role": "assistant", "content": None, "tool_calls": [expected]},
    ]


def test_wrong_type_in_a_row_is_named(tmp_path):
    (record,) = read(write(tmp_path / "data.parquet", [{"text": b"bytes"}]))
    with pytest.raises(RecordError, match="data.parquet:1: 'text' must be a string, not bytes"):
        text_of(record)


@pytest.mark.parametrize("end", [0, 3, -60], ids=["empty", "too short", "cut"])
def test_damaged_file_is_reported(tmp_path, end):
    path = Path(write(tmp_path / "data.parquet", [{"text": "bee"}] * 10))
    content = path.read_bytes()
    path.write_bytes(content[:end])
    with pytest.raises(RecordError, match="data.parquet:1: not a valid Parquet file: ."):
        list(read(str(path)))


def test_rows_before_a_damaged_row_group_are_read(tmp_path):
    rows = [{"text": f"bee {n} " * 20} for n in range(100)]
    path = Path(write(tmp_path / "data.parquet", rows, row_group_size=50, compression="snappy", use_dictionary=False))
    group = parquet.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    content[group.data_page_offset : group.data_page_offset + group.total_compressed_size] = (
        b"\xff" * group.total_compressed_size
    )
    path.write_bytes(content)
    rows_read = []
    with pytest.raises(RecordError, match=r"data.parquet:51: not a valid Parquet file: "):
        for record in read(str(path)):
            rows_read.append(record.line)
    assert rows_read == list(range(1, 51))


def test_missing_pyarrow_error_says_what_to_install(tmp_path, monkeypatch):
    path = write(tmp_path / "data.parquet", [{"text": "bee"}])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match="data.parquet: reading Parquet files needs pyarrow: pip install pyarrow"):
        list(read(path))


def test_pyarrow_is_imported_only_for_parquet_files():
    code = "import sys, datamodules.record_files; sys.exit('pyarrow' in sys.modules)"
    root = Path(record_files.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
