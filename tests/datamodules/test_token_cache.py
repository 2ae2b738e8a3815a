"""The token cache: tokens and masks are restored, and a cache is complete or absent."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bumblebee.nn import IGNORE_INDEX
from bumblebee.tokenizer.tokenizer import Tokenizer
from datamodules import SFT, worker_pool
from datamodules.records import Record, RecordError
from datamodules.token_cache import TokenCache, cache_key, find_damage, remove_unfinished, write_lock, write_token_cache
from datamodules.tokenize import RecordTokenizer, TextTokenizer, TokenizedSample, text_digest
from datamodules.worker_pool import BATCH_RECORDS

FILES = ["a.jsonl", "b.jsonl"]


@pytest.fixture(scope="module")
def encoder(tokenizer_folder):
    return TextTokenizer(str(tokenizer_folder), Tokenizer.from_pretrained(tokenizer_folder))


def built(folder, records, encoder, skip=False):
    write_token_cache(folder, iter(records), encoder, FILES, skip, show_progress=False)
    return TokenCache(folder)


def text(content: str, line: int = 1, file: str = "a.jsonl") -> Record:
    return Record(file, line, {"text": content})


class Masks(RecordTokenizer):
    """Two sequences per record, with the ids and masks that it holds; an empty record is bad."""

    sequences_per_sample = 2

    def __init__(self, size: int = 300) -> None:
        self.size = size

    @property
    def dtype(self):
        return np.uint16 if self.size <= 2**16 else np.uint32

    def tokenize(self, records):
        return [
            TokenizedSample(
                [[t for t, _ in row] for row in record.value["rows"]], [[m for _, m in row] for row in record.value["rows"]], 1
            )
            if record.value
            else RecordError(record.file, record.line, "empty")
            for record in records
        ]


ROW = st.lists(st.tuples(st.integers(0, 299), st.booleans()), max_size=20)


@settings(max_examples=12)
@given(texts=st.lists(st.text(min_size=1, max_size=30).filter(str.strip), min_size=1, max_size=20))
def test_cached_texts_decode_and_end_with_end_of_text(texts, encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts") / "cache"
    texts = [text.encode(errors="replace").decode() for text in texts]
    cache = built(folder, [text(content, line) for line, content in enumerate(texts, 1)], encoder)
    assert len(cache) == len(texts)
    for begin, end, content in zip(cache.begins, cache.ends, texts, strict=True):
        *ids, last = cache.tokens[begin:end].tolist()
        assert last == encoder.tokenizer.eos_token_id and last not in ids
        assert encoder.tokenizer.decode(ids) == content


@settings(max_examples=30)
@given(pairs=st.lists(st.tuples(ROW, ROW), max_size=12), size=st.integers(1, 5))
def test_target_masks_are_restored_for_any_batching(pairs, size, tmp_path_factory):
    folder = tmp_path_factory.mktemp("masks") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker_pool, "BATCH_RECORDS", size)
        cache = built(folder, [Record("a.jsonl", 1, {"rows": pair}) for pair in pairs], Masks())
    rows = [row for pair in pairs for row in pair]
    assert len(cache) == len(pairs) and len(cache.ends) == len(rows)
    for number, row in enumerate(rows):
        begin, end = int(cache.begins[number]), int(cache.ends[number])
        assert cache.tokens[begin:end].tolist() == [token for token, _ in row]
        assert cache.target_mask(begin, end).tolist() == [mask for _, mask in row]
        assert cache.targets[number] == sum(mask for _, mask in row[1:])  # nothing comes before a first token to predict it
        if row:
            inputs, labels = cache.segment(begin, end - begin - 1)
            assert inputs.tolist() == [token for token, _ in row[:-1]]
            assert labels.tolist() == [token if mask else IGNORE_INDEX for token, mask in row[1:]]


def test_order_is_kept_across_batches(encoder, tmp_path):
    texts = [f"document {number}" for number in range(2 * BATCH_RECORDS + 5)]
    cache = built(tmp_path / "c", map(text, texts), encoder)
    stream = encoder.tokenizer.decode(cache.tokens.tolist(), skip_special_tokens=False)
    assert stream.split("<|endoftext|>") == [*texts, ""]
    assert cache.about["samples"] == len(texts) and cache.about["tokens"] == len(cache.tokens)


def test_batches_are_limited_in_records_and_characters():
    """Memory is bounded for long documents, too."""
    long = [text("x" * (worker_pool.BATCH_CHARACTERS // 2)) for _ in range(5)]
    assert [len(batch) for batch in worker_pool.batched(long)] == [2, 2, 1]
    assert [len(batch) for batch in worker_pool.batched([text("x")] * (BATCH_RECORDS + 1))] == [BATCH_RECORDS, 1]


def test_origin_is_file_and_line(encoder, tmp_path):
    cache = built(tmp_path / "c", [text("x", 3), text("y", 17, "b.jsonl")], encoder)
    assert [cache.origin(0), cache.origin(1)] == ["a.jsonl:3", "b.jsonl:17"]


@pytest.mark.parametrize(("size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_tokens_have_the_smallest_sufficient_dtype(size, dtype, tmp_path):
    row = [(size - 1, True)]
    cache = built(tmp_path / "c", [Record("a.jsonl", 1, {"rows": [row, row]})], Masks(size))
    assert cache.tokens.dtype == dtype
    assert cache.tokens.tolist() == [size - 1, size - 1]


def test_cache_is_pickled_as_its_folder(encoder, tmp_path):
    cache = built(tmp_path / "c", [text("word " * 10_000)], encoder)
    sent = pickle.dumps(cache)
    assert len(sent) < 1000
    assert pickle.loads(sent).tokens.tolist() == cache.tokens.tolist()


# -- bad records ---------------------------------------------------------------------------------------------------------


def test_first_bad_record_in_file_order_is_raised(tmp_path):
    def broken():
        yield Record("a.jsonl", 1, {"rows": [[], []]})
        yield Record("a.jsonl", 2, {})
        yield RecordError("a.jsonl", 3, "not valid JSON")
        raise RecordError("a.jsonl", 4, "the file is truncated")

    with pytest.raises(RecordError, match=r"^a\.jsonl:2: empty$"):
        built(tmp_path / "c", broken(), Masks())
    with pytest.raises(RecordError, match=r"^a\.jsonl:4: the file is truncated$"):  # cannot be stepped over
        built(tmp_path / "c", broken(), Masks(), skip=True)
    assert list(tmp_path.iterdir()) == []


def test_skipped_records_are_counted(tmp_path):
    row = [(7, True), (8, True)]
    records = [
        Record("a.jsonl", 1, {}),
        Record("a.jsonl", 2, {"rows": [row, row]}),
        RecordError("b.jsonl", 1, "not valid JSON"),
    ]
    cache = built(tmp_path / "c", records, Masks(), skip=True)
    assert (len(cache), cache.about["bad_records"], cache.origin(0)) == (1, 2, "a.jsonl:2")


# -- complete or absent --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [0, 1, BATCH_RECORDS + 3])
def test_failed_write_leaves_no_files(before, encoder, tmp_path):
    def dying():
        for number in range(before):
            yield text(f"text {number}", number)
        raise RuntimeError("the disk is on fire")

    with pytest.raises(RuntimeError, match="on fire"):
        built(tmp_path / "c", dying(), encoder)
    assert list(tmp_path.iterdir()) == []


def test_unfinished_cache_is_overwritten(encoder, tmp_path):
    partial = tmp_path / ".c.partial"
    partial.mkdir()
    (partial / "tokens.bin").write_bytes(b"half")
    cache = built(tmp_path / "c", [text("x")], encoder)
    assert len(cache) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_unfinished_caches_are_removed_unless_locked(tmp_path):
    for name in ("dead", "alive"):
        (tmp_path / f".{name}.partial").mkdir()
        (tmp_path / f".{name}.partial" / "tokens.bin").write_bytes(b"half")
    with write_lock(tmp_path / "alive"):
        remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.glob(".*.partial")] == [".alive.partial"]


# -- keys and digests ----------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from([" ", "\n", "\t", "a", "b", "ä"]), max_size=12))
def test_text_digest_ignores_whitespace(pieces):
    text = "".join(pieces)
    assert text_digest(text) == text_digest(" " + text.replace(" ", "\n  ") + "\t")
    assert len({text_digest(text), text_digest("d" + text), text_digest("d " + text.strip() + " d")}) == 3


def test_cache_key_changes_with_every_part():
    parts = [[["d1"], ["f1"], "t", 0, "stop"], [["d2"], ["f1"], "t", 0, "stop"], [["d1"], ["f1"], "t", 0, "skip"]]
    assert len({cache_key(*part) for part in parts}) == 3
    assert cache_key(*parts[0]) == cache_key(*parts[0])


# -- damage ----------------------------------------------------------------------------------------------------------------


def test_damaged_cache_is_written_again(tokenizer_folder, tmp_path, caplog):
    lines = [{"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "Yes."}]} for n in range(9)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def opened() -> list[list[int]]:
        data = SFT(str(tmp_path / "chats.jsonl"), str(tokenizer_folder), cache_dir=str(tmp_path / "cache"))
        data.setup(0)
        return [[int(token) for token in segment[0]] for sample in data.train for segment in sample]

    expected = opened()
    (folder,) = (tmp_path / "cache" / "tokens").glob("[!.]*")
    damages = {
        "truncated": lambda content: content[:-3],
        "empty": lambda content: b"",
        "longer": lambda content: content + b"\0" * 8,
        "garbage": lambda content: b"\xff" * len(content),
        "removed": None,
    }
    for file in sorted(folder.iterdir()):
        for kind, damage in damages.items():
            if (kind == "removed" and file.name == "about.json") or not file.exists():
                continue  # without about.json there is no cache
            if kind == "garbage" and file.name in ("digests.bin", "trained.bin", "targets.bin"):
                continue  # any bytes may be correct ones
            content = file.read_bytes()
            file.unlink() if damage is None else file.write_bytes(damage(content))
            assert str(find_damage(folder, 400)).startswith(f"{file} is damaged: "), kind
            file.write_bytes(content)
    assert find_damage(folder, 400) is None
    (folder / "ends.bin").write_bytes(b"")
    assert opened() == expected and find_damage(folder, 400) is None
    (record,) = caplog.records
    assert record.message.startswith(f"{folder / 'ends.bin'} is damaged: ")
    assert record.message.endswith("; the files are tokenized again")
