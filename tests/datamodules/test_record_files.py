"""Record files: every record with its line, every error with file and line, for any chunk size."""

import gzip
import itertools
import json
import os
import pickle
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules import json_stream, record_files
from datamodules.record_files import expand, read, text_of
from datamodules.records import Record, RecordError

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.lists(st.dictionaries(st.text(max_size=5), VALUES, max_size=4), max_size=6)
BLANKS = st.text(alphabet=" \t\r\n", max_size=4)
CHUNKS = st.sampled_from([1, 2, 3, 7, 64, json_stream.CHUNK])


def outcome(content: bytes, suffix: str, chunk: int = json_stream.CHUNK) -> tuple[list[tuple[int, dict]], str | None]:
    """([(line, value), ...], error without the path) of a file with this content."""
    records: list[tuple[int, dict]] = []
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "CHUNK", chunk)
        path = Path(folder, "data" + suffix)
        path.write_bytes(content)
        try:
            for record in read(str(path)):
                assert record.file == str(path)
                records.append((record.line, record.value))
        except RecordError as error:
            assert error.file == str(path)
            return records, f"{error.line}: {error.reason}"
    return records, None


def error_of(content: bytes | str, suffix: str) -> str:
    records, error = outcome(content.encode() if isinstance(content, str) else content, suffix)
    assert error, records
    return error


def lines_of(text: str, values: list[dict]) -> list[int]:
    """Naive reference: decode the whole text and count the newlines before each value."""
    lines, at = [], 1 if text.startswith("[") else 0
    for _ in values:
        at += len(text[at:]) - len(text[at:].lstrip(" \t\r\n,"))
        lines.append(1 + text.count("\n", 0, at))
        at = json.JSONDecoder().raw_decode(text, at)[1]
    return lines


# -- valid files ---------------------------------------------------------------------------------------------------------


@given(OBJECTS, st.sampled_from([None, 0, 1, 4]), st.booleans(), CHUNKS)
def test_array_elements_are_read_with_their_lines(values, indent, ascii_only, chunk):
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
    assert outcome(text.encode(), ".json", chunk) == (list(zip(lines_of(text, values), values, strict=True)), None)


@given(OBJECTS, st.lists(BLANKS, min_size=20, max_size=20), st.booleans(), CHUNKS)
def test_blanks_between_elements_are_ignored(values, blanks, bom, chunk):
    blank = itertools.cycle(blanks)
    body = ",".join(f"{next(blank)}{json.dumps(value)}{next(blank)}" for value in values)
    text = f"[{body}{next(blank)}]{next(blank)}"
    content = text.encode("utf-8-sig" if bom else "utf-8")
    assert outcome(content, ".json", chunk) == (list(zip(lines_of(text, values), values, strict=True)), None)


@given(OBJECTS, st.sampled_from([".jsonl", ".ndjson", ".json"]), st.sampled_from(["\n", "\r\n", "\n\n", "\n \r\n"]), CHUNKS)
def test_json_lines_are_read_whatever_the_suffix(values, suffix, newline, chunk):
    text = "".join(json.dumps(value, ensure_ascii=False) + newline for value in values)
    step = newline.count("\n")
    expected = [(1 + step * index, value) for index, value in enumerate(values)]
    assert outcome(text.encode("utf-8-sig"), suffix, chunk) == (expected, None)


@given(OBJECTS, st.sampled_from([".json", ".jsonl", ".ndjson"]), CHUNKS)
def test_gzip_files_are_read_like_uncompressed_ones(values, suffix, chunk):
    text = json.dumps(values, indent=1) if suffix == ".json" else "\n".join(map(json.dumps, values))
    plain = outcome(text.encode(), suffix, chunk)
    assert plain == outcome(gzip.compress(text.encode()), suffix + ".gz", chunk)
    assert [value for _, value in plain[0]] == values


def test_single_multiline_object_is_one_record():
    assert outcome(b'\n{\n "text": "one"\n}\n', ".json") == ([(2, {"text": "one"})], None)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".ndjson", ".txt", ".md", ".json.gz", ".txt.gz"])
def test_empty_file_has_no_records(suffix):
    content = gzip.compress(b"") if suffix.endswith(".gz") else b""
    assert outcome(content, suffix) == ([], None)


@pytest.mark.parametrize("content", [b" \r\n\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_blank_file_has_no_records(content, suffix):
    assert outcome(content, suffix) == ([], None)


@pytest.mark.parametrize("suffix", [".txt", ".md", ".TXT"])
def test_text_file_is_one_document(suffix):
    assert outcome("\ufeff蜜蜂\r\nbees\n".encode(), suffix) == ([(1, {"text": "蜜蜂\nbees\n"})], None)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_lone_surrogates_are_replaced_and_pairs_are_kept(suffix, chunk):
    records, _ = outcome(rb'{"a\ud800": ["\uDFFFx", {"b": "\ud83d\ude00 \u00e9"}], "n": 1}', suffix, chunk)
    assert records == [(1, {"a\ufffd": ["\ufffdx", {"b": "\U0001f600 \u00e9"}], "n": 1})]


def test_array_is_streamed(tmp_path):
    path = tmp_path / "large.json"
    path.write_text(json.dumps([{"text": "bee " * 250, "n": n} for n in range(8000)]))  # 8 MB
    tracemalloc.start()
    try:
        total = sum(record.value["n"] for record in read(str(path)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert total == sum(range(8000))
    assert peak < 8 * json_stream.CHUNK


# -- errors --------------------------------------------------------------------------------------------------------------


@given(OBJECTS.filter(bool), st.sampled_from([None, 2]), st.data())
def test_truncated_array_yields_its_complete_records_first(values, indent, data):
    text = json.dumps(values, indent=indent)
    cut = data.draw(st.integers(1, len(text) - 1))
    records, error = outcome(text[:cut].encode(), ".json")
    assert [value for _, value in records] == values[: len(records)]
    assert error
    assert "truncated" in error or "not valid JSON" in error


@settings(max_examples=300)
@given(OBJECTS, st.sampled_from([None, 1]), st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=2)), max_size=3))
def test_errors_do_not_depend_on_the_chunk_size(values, indent, damages):
    content = bytearray(json.dumps(values, indent=indent, ensure_ascii=False).encode())
    for place, replacement in damages:
        place %= len(content) + 1
        content[place : place + 1] = replacement
    whole = outcome(bytes(content), ".json")
    assert whole == outcome(bytes(content), ".json", chunk=1) == outcome(bytes(content), ".json", chunk=5)


@pytest.mark.parametrize(
    ("content", "suffix", "message"),
    [
        ('{"a": 1}\n\n{"a": }\n', ".jsonl", "3: not valid JSON: Expecting value at column 7"),
        ('{"a": 1}\n[1]\n', ".jsonl", "2: a record must be a JSON object, {...}, not an array"),
        ('[{},\n"text"]', ".json", "2: a record must be a JSON object, {...}, not a string"),
        ("[null]", ".json", "1: a record must be a JSON object, {...}, not null"),
        ("[{}, 1.5]", ".json", "1: a record must be a JSON object, {...}, not a number"),
        ('[{},\n{\n"a": tru}, {}]', ".json", "3: not valid JSON: Expecting value"),
        ('[{},\n{"a": 1', ".json", "2: the file is truncated: it ends within this record"),
        ('[{},\n{"a": "b\n"}, {}]', ".json", "2: not valid JSON: Invalid control character at"),
        ('[{},\n{"a": "b\n', ".json", "2: the file is truncated: it ends within this record"),
        ('[{},\n{"a": "b', ".json", "2: the file is truncated: it ends within this record"),
        ("[{},\n{}\n", ".json", "3: the file is truncated: the array does not end"),
        ("[{},\n{}\n{}]", ".json", "3: not valid JSON: expected ',' or ']', got '{'"),
        ("[{}]\n\n[", ".json", "3: not valid JSON: text after the end of the array"),
        ("\n<html>", ".json", "2: not valid JSON: Expecting value"),
        (b'{"a": 1}\n{"a": "\xff"}\n', ".jsonl", "2: not valid UTF-8: byte 0xff (invalid start byte)"),
        (b'[{"a": 1},\n\n{"a": "\xe8\x9c"}]', ".json", "3: not valid UTF-8: byte 0xe8 (invalid continuation byte)"),
        (b'[{"a": 1}]\n\xe8', ".json", "2: not valid UTF-8: byte 0xe8 (unexpected end of data)"),
        (b"one\ntwo \xff", ".txt", "2: not valid UTF-8: byte 0xff (invalid start byte)"),
        ('{"a": ' + "[" * 100_000, ".jsonl", "1: cannot decode JSON: nested too deeply"),
    ],
)
def test_bad_record_is_named_with_line_and_reason(content, suffix, message):
    assert error_of(content, suffix) == message


def test_deep_nesting_is_a_record_error():
    assert error_of('[{"a": ' + "[" * 100_000 + "]" * 100_000 + "}]", ".json").startswith("1: cannot decode JSON")


@pytest.mark.skipif(not hasattr(sys, "set_int_max_str_digits"), reason="this Python has no limit")
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_number_beyond_the_digit_limit_is_a_record_error(suffix):
    assert "integer string" in error_of('{"a": ' + "1" * 5000 + "}", suffix)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".txt"])
def test_truncated_gzip_yields_its_complete_records_first(suffix):
    values = [{"text": os.urandom(50).hex()} for _ in range(50)]
    text = json.dumps(values, indent=0) if suffix == ".json" else "".join(json.dumps(value) + "\n" for value in values)
    records, error = outcome(gzip.compress(text.encode())[:-2000], suffix + ".gz")
    assert error
    assert error.endswith("the compressed file is truncated")
    if suffix != ".txt":
        assert 0 < len(records) < 50
        assert [value for _, value in records] == values[: len(records)]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".json.gz", ".txt.gz"])
def test_invalid_gzip_is_reported(suffix):
    assert error_of(b'{"text": "plain"}', suffix).startswith("1: not a valid gzip file")


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_on_error_can_skip_bad_records(tmp_path, suffix):
    path = tmp_path / f"data{suffix}"
    path.write_text('{"n": 1}\n7.25\n{"n": 2}\n' if suffix == ".jsonl" else '[{"n": 1},\n7.25,\n{"n": 2}]')
    errors: list[RecordError] = []
    assert [record.value["n"] for record in read(str(path), on_error=errors.append)] == [1, 2]
    assert [str(error) for error in errors] == [f"{path}:2: a record must be a JSON object, {{...}}, not a number"]


def test_record_error_survives_pickling():
    error = pickle.loads(pickle.dumps(RecordError("data.jsonl", 3, "reason")))
    assert (str(error), error.file, error.line, error.reason) == ("data.jsonl:3: reason", "data.jsonl", 3, "reason")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({"instruction": "a", "output": "b"}, "no key 'text'; the record's keys: 'instruction', 'output'"),
        ({}, "no key 'text'; the record's keys: none"),
        ({"text": None}, "'text' must be a string, not null"),
        ({"text": ["a"]}, "'text' must be a string, not an array"),
        ({"text": True}, "'text' must be a string, not true"),
        ({"text": ""}, "'text' is empty"),
        ({"text": " \n"}, "'text' is empty"),
    ],
)
def test_record_without_text_is_rejected(value, reason):
    with pytest.raises(RecordError) as caught:
        text_of(Record("data.jsonl", 4, value))
    assert str(caught.value) == f"data.jsonl:4: {reason}"


def test_text_is_returned_unchanged():
    assert text_of(Record("data.jsonl", 1, {"text": " bees\n", "id": 1})) == " bees\n"


# -- paths ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with some files in it."""
    for name in ("a.jsonl", "b.jsonl", "sub/c.jsonl.gz", "sub/deep/d.json", "notes.txt", "table.csv", "rows.parquet.gz"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ("a.jsonl", ["a.jsonl"]),
        (Path("a.jsonl"), ["a.jsonl"]),
        (["b.jsonl", "a.jsonl"], ["b.jsonl", "a.jsonl"]),
        ("*.jsonl", ["a.jsonl", "b.jsonl"]),
        ("[ab].jsonl", ["a.jsonl", "b.jsonl"]),
        ("**/*.json*", ["a.jsonl", "b.jsonl", "sub/c.jsonl.gz", "sub/deep/d.json"]),
        (["b.jsonl", "*.jsonl", "./a.jsonl"], ["b.jsonl", "a.jsonl"]),
    ],
)
def test_paths_lists_and_globs_are_expanded(folder, files, expected):
    assert expand(files) == expected


def test_existing_file_may_look_like_a_glob_or_placeholder(folder):
    for name in ("data[1].jsonl", "your_data.jsonl"):
        (folder / name).touch()
        assert expand(name) == [name]


def test_tilde_is_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    assert expand("~/a.jsonl") == [str(folder / "a.jsonl")]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "no files given"),
        ("aa.jsonl", "file not found: aa.jsonl; did you mean 'a.jsonl'"),
        ("sub/c.jsonl", "file not found: sub/c.jsonl; did you mean 'sub/c.jsonl.gz'?"),
        ("zzzzzz", "file not found: zzzzzz"),
        ("nowhere/a.jsonl", "file not found: nowhere/a.jsonl; folder not found: nowhere"),
        ("*.parquet", "no file matches '*.parquet'"),
        ("sub", "'sub' is a folder; name the files in it, for example 'sub/*.jsonl.gz'"),
        ("path/to/data.jsonl", "'path/to/data.jsonl' is a placeholder"),
        ("<your data>", "is a placeholder"),
        ("YOUR_DATA.jsonl", "is a placeholder"),
        (".../data.jsonl", "is a placeholder"),
        ("table.csv", "'table.csv': unsupported file type '.csv'; supported: .jsonl"),
        ("*.csv", "'table.csv': unsupported file type"),
        ("rows.parquet.gz", "'rows.parquet.gz': Parquet files, which are compressed internally, cannot be read as .gz"),
    ],
)
def test_wrong_path_error_is_helpful(folder, files, message):
    with pytest.raises(ValueError) as caught:
        expand(files)
    assert message in str(caught.value)


def test_unsupported_file_is_rejected_before_reading():
    with pytest.raises(ValueError, match="each also as .gz"):
        read("data.xlsx")


def test_readers_do_not_import_torch():
    code = "import sys, datamodules.record_files; sys.exit('torch' in sys.modules)"
    root = Path(record_files.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


# -- shipped samples -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pretrain.jsonl", "pretrain.json", "pretrain.txt"])
def test_shipped_pretraining_samples_are_valid(name):
    samples = Path(record_files.__file__).parents[1] / "recipes" / "samples" / name
    texts = [text_of(record) for record in read(str(samples))]
    assert len(set(texts)) == len(texts)
    assert sum(len(text.encode()) for text in texts) >= 8192
