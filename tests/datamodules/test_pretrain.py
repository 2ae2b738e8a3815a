"""Pretrain from files to batches: every token trained once, and no text on both sides of a split."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bumblebee.nn import IGNORE_INDEX
from bumblebee.nn.documents import Documents
from bumblebee.tokenizer.tokenizer import Tokenizer
from datamodules import Pretrain, token_datamodule
from datamodules.collate import collate_rows
from datamodules.records import Record, RecordError

WORDS = "the a list file return value tuple dict string raises if is None and not of to".split()
TEXTS = st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=80).map(" ".join), min_size=1, max_size=25)


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def many(count: int = 40) -> list[str]:
    """Distinct texts of one to about a hundred tokens."""
    random = np.random.default_rng(0)
    return [f"{number}: " + " ".join(random.choice(WORDS, random.integers(1, 60))) for number in range(count)]


@pytest.fixture
def make(tokenizer_folder, tmp_path):
    """A function that sets up a Pretrain on texts, with its own cache."""

    def set_up(texts: list[str] | str, kind: type[Pretrain] = Pretrain, **options) -> Pretrain:
        files = texts if isinstance(texts, str) else write(tmp_path / "texts.jsonl", texts)
        options = {"tokenizer": str(tokenizer_folder), "max_length": 32, "cache_dir": str(tmp_path / "cache"), **options}
        data = kind(files=files, **options)
        data.setup(seed=0)
        return data

    return set_up


def batches(data: Pretrain, size: int = 3) -> list[dict[str, torch.Tensor]]:
    windows = [data.train[index] for index in range(len(data.train))]
    return [data.collate(windows[at : at + size]) for at in range(0, len(windows), size)]


def segments_in(batch: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    """(inputs, labels) of each segment, recovered from the positions, which begin at 0; without padding."""
    segments = []
    for ids, labels, positions in zip(*(batch[name].tolist() for name in ("input_ids", "labels", "position_ids")), strict=True):
        for token, label, position in zip(ids, labels, positions, strict=True):
            if label == IGNORE_INDEX:
                continue
            if position == 0:
                segments.append(([], []))
            assert position == len(segments[-1][0])
            segments[-1][0].append(token)
            segments[-1][1].append(label)
    return segments


@settings(max_examples=20)
@given(texts=TEXTS, max_length=st.integers(1, 40))
def test_every_token_but_the_first_is_a_target_exactly_once(texts, max_length, tokenizer_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    data = Pretrain(write(folder / "t.jsonl", texts), str(tokenizer_folder), max_length, cache_dir=str(folder))
    data.setup(0)
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder)
    expected: Counter[tuple[int, int]] = Counter()
    for text in texts:
        ids = [*tokenizer.encode(text), tokenizer.eos_token_id]
        expected.update(zip(ids, ids[1:], strict=False))  # (token, the next token)
    trained: Counter[tuple[int, int]] = Counter()
    for batch in batches(data):
        assert batch["input_ids"].shape[1] == max_length
        for inputs, labels in segments_in(batch):
            assert inputs[1:] == labels[:-1]
            trained.update(zip(inputs, labels, strict=True))
    assert trained == expected


def test_end_of_text_is_trained_even_if_it_is_the_pad_token(make):
    texts = many()
    data = make(texts)
    assert data.tokenizer.pad_token_id == data.tokenizer.eos_token_id
    labels = torch.cat([batch["labels"].flatten() for batch in batches(data)])
    assert (labels == data.tokenizer.eos_token_id).sum() == len(texts)
    inputs = [token for batch in batches(data) for ids, _ in segments_in(batch) for token in ids]
    assert data.tokenizer.eos_token_id not in inputs  # nothing is predicted from the end of another text


def test_long_document_is_split_without_loss(make):
    [text] = long = [" ".join(WORDS * 30)]
    data = make(long)
    chunks = sorted((start, length) for window in range(len(data.train)) for start, length in data.train.windows.chunks(window))
    assert len(chunks) > 5
    tokens = data.train.cache.tokens
    again = [int(tokens[0])] + [int(token) for start, length in chunks for token in tokens[start + 1 : start + 1 + length]]
    assert data.tokenizer.decode(again) == text
    assert again[-1] == data.tokenizer.eos_token_id


def test_padding_has_no_targets_and_begins_no_document(make):
    [batch] = batches(make(["a short text"]))
    used = int((batch["labels"] != IGNORE_INDEX).sum())
    assert 1 < used < 32
    assert (batch["labels"][0, used:] == IGNORE_INDEX).all()
    assert batch["position_ids"][0].tolist() == [*range(used), *([used - 1] * (32 - used))]


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(1, 5), max_size=4), min_size=1, max_size=4), st.integers(20, 24))
def test_padded_batches_have_a_document_per_segment_or_empty_row(lengths, width):
    rows = [[(np.ones(length), np.ones(length)) for length in row] for row in lengths]
    batch = collate_rows(rows, width, 0)
    documents = Documents.find(batch["position_ids"])
    assert len(documents.cu_seqlens) - 1 == sum(max(1, len(row)) for row in lengths)
    assert documents.one_per_row == all(len(row) < 2 for row in lengths)
    assert batch["position_ids"].max() <= max(1, *(length - 1 for row in lengths for length in row), 1)


def test_batches_are_int64_of_one_shape(make):
    for batch in batches(make(many())):
        assert list(batch) == ["input_ids", "labels", "position_ids"]
        assert {(tensor.dtype, tuple(tensor.shape)) for tensor in batch.values()} == {(torch.int64, (len(batch["labels"]), 32))}


def test_spelled_end_of_text_is_trained_as_text(make):
    data = make(["say <|endoftext|> aloud"])
    ids = data.train.cache.tokens.tolist()
    assert ids.count(data.tokenizer.eos_token_id) == 1 and ids[-1] == data.tokenizer.eos_token_id
    assert data.tokenizer.decode(ids) == "say <|endoftext|> aloud"


# -- held out, deduplicated ----------------------------------------------------------------------------------------------


def texts_of(data: Pretrain, side) -> list[str]:
    cache = side.cache
    numbers = data.epoch_samples if side is data.train else data.held_out
    return [data.tokenizer.decode(cache.tokens[cache.begins[d] : cache.ends[d]].tolist()) for d in numbers]


def test_equal_texts_are_on_one_side_of_the_split(make):
    texts = [*many(30), *many(30), *(text.replace(" ", "  ") for text in many(30))]
    data = make(texts, validation_ratio=0.3)
    train, held_out = ({" ".join(t.split()) for t in texts_of(data, side)} for side in (data.train, data.validation))
    assert train and held_out and not train & held_out
    assert train | held_out == set(many(30))
    assert len(data.epoch_samples) + len(data.held_out) == 90


@pytest.mark.parametrize("ratio", [0.001, 0.1, 0.5])
def test_split_holds_out_its_share_and_at_least_one(ratio, make):
    data = make(many(100), validation_ratio=ratio)
    assert len(data.held_out) == max(1, round(ratio * 100))


def test_split_depends_on_content_only(make):
    first = make(many(), validation_ratio=0.2)
    second = make(many()[::-1], validation_ratio=0.2)
    assert sorted(texts_of(first, first.validation)) == sorted(texts_of(second, second.validation))
    first.setup(seed=99)
    assert sorted(texts_of(first, first.validation)) == sorted(texts_of(second, second.validation))


def test_without_a_ratio_nothing_is_held_out(make):
    data = make(many())
    assert data.validation is None and len(data.epoch_samples) == 40


def test_validation_files_are_held_out_whole(make, tmp_path):
    other = write(tmp_path / "other.jsonl", ["held out one", "held out two"])
    data = make(many(), validation_files=other)
    assert texts_of(data, data.validation) == ["held out one", "held out two"]
    assert len(data.epoch_samples) == 40


def test_deduplicate_ignores_whitespace_and_keeps_the_first(make):
    data = make(["one  two", "three", "one two", "one\ntwo ", "three", "four"], deduplicate=True)
    assert texts_of(data, data.train) == ["one  two", "three", "four"]
    assert data.summary()["duplicates left out"] == 3


def test_without_deduplicate_every_copy_is_kept(make):
    data = make(["one", "two", "one"])
    assert texts_of(data, data.train) == ["one", "two", "one"]


# -- the cache -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tokenized(monkeypatch):
    """Calls of write_token_cache."""
    calls = []
    real = token_datamodule.write_token_cache
    monkeypatch.setattr(
        token_datamodule, "write_token_cache", lambda *args, **options: (calls.append(1), real(*args, **options))
    )
    return calls


def test_second_start_uses_the_cache(make, tokenized):
    first, second = make(many()), make(many())
    assert len(tokenized) == 1
    for one, other in zip(batches(first), batches(second), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_window_and_split_options_share_a_cache(make, tokenized):
    make(many())
    make(many(), max_length=7, validation_ratio=0.1, deduplicate=True)
    assert len(tokenized) == 1


def test_content_tokenizer_and_error_policy_are_in_the_key(make, tokenized, tmp_path):
    make(many())
    make([*many(), "one more"])
    assert len(tokenized) == 2
    other = tmp_path / "other_tokenizer"
    Tokenizer.train(many(), 300).save_pretrained(other)
    make([*many(), "one more"], tokenizer=str(other))
    assert len(tokenized) == 3
    make([*many(), "one more"], on_bad_record="skip")
    assert len(tokenized) == 4


def test_start_after_a_crash_tokenizes_everything(make, tokenizer_folder, tmp_path):
    class Dying(Pretrain):
        def read(self, mixture):
            yield Record(mixture.files[0], 1, {"text": "half of it"})
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        make(many(), Dying)
    assert list((tmp_path / "cache" / "tokens").glob("[!.]*")) == []
    data = make(many())
    assert texts_of(data, data.train) == many()


def test_cache_dir_option_overrides_the_environment(tokenizer_folder, monkeypatch, tmp_path):
    monkeypatch.setenv("BUMBLEBEE_CACHE", str(tmp_path / "env"))
    assert Pretrain("f", "t").cache_dir == tmp_path / "env"
    assert Pretrain("f", "t", cache_dir="mine").cache_dir == Path("mine")
    monkeypatch.delenv("BUMBLEBEE_CACHE")
    assert Pretrain("f", "t").cache_dir == Path.home() / ".cache" / "bumblebee"


# -- records -------------------------------------------------------------------------------------------------------------

BAD = '{"text": "fine"}\n{"txt": "no text"}\n{"text": \n\n{"text": "also fine"}\n'


def test_bad_record_stops_the_run_with_file_and_line(make, tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text(BAD)
    with pytest.raises(RecordError, match=r"bad\.jsonl:2: .*no key 'text'"):
        make(str(file))
    assert not any((tmp_path / "cache" / "tokens").glob("[!.]*"))


def test_skipped_records_are_counted_also_from_the_cache(make, tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text(BAD)
    for _ in range(2):
        data = make(str(file), on_bad_record="skip")
        assert texts_of(data, data.train) == ["fine", "also fine"]
        assert data.summary()["bad records skipped"] == 2


def test_files_of_several_formats_are_read_in_order(make, tmp_path):
    write(tmp_path / "1.jsonl", ["first"])
    (tmp_path / "2.txt").write_text("second")
    (tmp_path / "3.json.gz").write_bytes(gzip.compress(b'[{"text": "third"}]'))
    data = make(str(tmp_path / "[1-3]*"))
    assert texts_of(data, data.train) == ["first", "second", "third"]
    assert data.train.cache.origin(2).endswith("3.json.gz:1")


class Shouting(Pretrain):
    """A research subclass that changes one thing."""

    mark = ""

    def read_key_parts(self):
        return [*super().read_key_parts(), self.mark]

    def read(self, mixture):
        for record in super().read(mixture):
            yield Record(record.file, record.line, {"text": record.value["text"].upper() + self.mark})


def test_overridden_read_has_its_own_cache(make, tokenized):
    make(["quiet words"])
    data = make(["quiet words"], Shouting)
    assert texts_of(data, data.train) == ["QUIET WORDS"]
    make(["quiet words"], Shouting)
    assert len(tokenized) == 2


def test_read_key_parts_are_part_of_the_cache_key(make):
    class Louder(Shouting):
        mark = "!"

    make(["quiet words"], Shouting)
    data = make(["quiet words"], Louder)
    assert texts_of(data, data.train) == ["QUIET WORDS!"]


@pytest.mark.parametrize("changed", ["data", "tokenizer"])
def test_file_that_changes_while_it_is_read_is_not_cached(changed, make, tokenizer_folder, tmp_path):
    folder = tmp_path / "own tokenizer"
    Tokenizer.from_pretrained(tokenizer_folder).save_pretrained(folder)
    file = tmp_path / "data.txt"
    file.write_text("the first text")
    touched = {"data": file, "tokenizer": folder / "tokenizer_config.json"}[changed]

    class Racing(Pretrain):
        def read(self, mixture):
            if touched is not None:
                touched.write_text(touched.read_text().replace("the first", "another") + " ")
            yield from super().read(mixture)

    message = re.escape(f"{touched} changed while it was read; nothing is cached: start again when it is complete")
    with pytest.raises(ValueError, match=f"^{message}$"):
        make(str(file), Racing, tokenizer=str(folder))
    assert not list((tmp_path / "cache" / "tokens").glob("[!.]*"))
    expected, touched = file.read_text(), None
    data = make(str(file), Racing, tokenizer=str(folder))
    assert texts_of(data, data.train) == [expected]


def test_adapter_folders_of_different_bases_share_no_cache(make, tokenizer_folder, tmp_path):
    caches = set()
    for name, size in (("small", 300), ("large", 400)):
        Tokenizer.train(many(), size).save_pretrained(tmp_path / name)
        (tmp_path / f"{name}-adapter").mkdir()
        adapter = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / name)}
        (tmp_path / f"{name}-adapter" / "adapter_config.json").write_text(json.dumps(adapter))
        caches.add(make(many(), tokenizer=str(tmp_path / f"{name}-adapter")).cache.folder)
    assert len(caches) == 2


# -- invalid options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 0}, "max_length.*0"),
        ({"validation_ratio": 1.0}, "validation_ratio.*1.0"),
        ({"validation_ratio": -0.1}, "validation_ratio.*-0.1"),
        ({"validation_ratio": 0.1, "validation_files": "x"}, "choose one"),
    ],
)
def test_numbers_out_of_range_are_rejected_with_their_value(options, message):
    with pytest.raises(ValueError, match=message):
        Pretrain("files", "tokenizer", **options)


def test_tokenizer_without_end_of_text_is_rejected(make, tokenizer_folder, tmp_path):
    folder = tmp_path / "endless"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((tokenizer_folder / "tokenizer.json").read_bytes())
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="names no eos_token"):
        make(many(), tokenizer=str(folder))


def test_folder_without_tokenizer_is_rejected(make, tmp_path):
    with pytest.raises(ValueError, match="not a tokenizer folder"):
        make(many(), tokenizer=str(tmp_path))


def test_summary_counts_match_the_batches(make):
    data = make(many(), validation_ratio=0.2)
    summary = data.summary()
    assert summary["documents"] == 32
    assert summary["targets"] == sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches(data))
    assert summary["windows"].startswith(f"{len(data.train)} of 32 tokens")
