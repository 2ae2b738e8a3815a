"""The token cache: the texts come back, and a cache is complete or absent."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bumblebee.tokenizer import Tokenizer
from datamodules.token_cache import BATCH, Document, TokenCache, build, cache_key, file_digest, text_digest

EOS = 0


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return Tokenizer.from_pretrained(tokenizer_folder)


def built(folder, documents, tokenizer):
    build(folder, iter(documents), {"files": ["a.jsonl", "b.jsonl"], "bad_records": 0}, tokenizer, EOS, show=False)
    return TokenCache(folder)


@settings(max_examples=12)
@given(texts=st.lists(st.text(max_size=30), min_size=1, max_size=20))
def test_every_text_comes_back_with_one_end_of_text_behind_it(texts, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts") / "cache"
    texts = [text.encode(errors="replace").decode() for text in texts]
    cache = built(folder, [Document(text, 0, line) for line, text in enumerate(texts, 1)], tokenizer)
    assert len(cache) == len(texts)
    for begin, end, text in zip(cache.begins, cache.ends, texts, strict=True):
        *ids, last = cache.tokens[begin:end].tolist()
        assert last == EOS and EOS not in ids
        assert tokenizer.decode(ids) == text


def test_more_documents_than_are_tokenised_at_a_time_keep_their_order(tokenizer, tmp_path):
    texts = [f"document {number}" for number in range(2 * BATCH + 5)]
    cache = built(tmp_path / "c", [Document(text, 0, 1) for text in texts], tokenizer)
    stream = tokenizer.decode(cache.tokens.tolist(), skip_special_tokens=False)
    assert stream.split("<|endoftext|>") == [*texts, ""]
    assert cache.about["documents"] == len(texts) and cache.about["tokens"] == len(cache.tokens)


def test_a_document_knows_its_file_and_line(tokenizer, tmp_path):
    cache = built(tmp_path / "c", [Document("x", 0, 3), Document("y", 1, 17)], tokenizer)
    assert [cache.origin(0), cache.origin(1)] == ["a.jsonl:3", "b.jsonl:17"]


@pytest.mark.parametrize(("size", "dtype"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_tokens_are_stored_in_the_smallest_type_that_holds_all_ids(size, dtype, tmp_path):
    class Counting:
        vocab_size = size

        def encode_batch(self, texts):
            return [[size - 1] for _ in texts]

    cache = built(tmp_path / "c", [Document("x", 0, 1)], Counting())
    assert cache.tokens.dtype == dtype
    assert cache.tokens.tolist() == [size - 1, EOS]


@pytest.mark.parametrize("before", [0, 1, BATCH + 3])
def test_nothing_is_left_when_reading_dies_midway(before, tokenizer, tmp_path):
    def dying():
        for number in range(before):
            yield Document(f"text {number}", 0, number)
        raise RuntimeError("the disk is on fire")

    with pytest.raises(RuntimeError, match="on fire"):
        built(tmp_path / "c", dying(), tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_behind_does_not_stand_in_the_way(tokenizer, tmp_path):
    partial = tmp_path / ".c.partial"
    partial.mkdir()
    (partial / "tokens.bin").write_bytes(b"half")
    cache = built(tmp_path / "c", [Document("x", 0, 1)], tokenizer)
    assert len(cache) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@given(st.lists(st.sampled_from([" ", "\n", "\t", "a", "b", "ä"]), max_size=12))
def test_the_digest_of_a_text_does_not_see_how_words_are_spaced(pieces):
    text = "".join(pieces)
    assert text_digest(text) == text_digest(" " + text.replace(" ", "\n  ") + "\t")
    assert len({text_digest(text), text_digest("d" + text), text_digest("d " + text.strip() + " d")}) == 3


def test_a_key_changes_with_every_part_and_with_nothing_else():
    parts = [[["d1"], ["f1"], "t", 0, "stop"], [["d2"], ["f1"], "t", 0, "stop"], [["d1"], ["f1"], "t", 0, "skip"]]
    assert len({cache_key(*part) for part in parts}) == 3
    assert cache_key(*parts[0]) == cache_key(*parts[0])


def test_a_file_digest_follows_the_content_not_the_name(tmp_path):
    for name, content in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / name).write_text(content)
    first, second, third = (file_digest(str(tmp_path / name)) for name in "abc")
    assert first == second != third
