"""The tokenizer: lossless, spelled special tokens are text, errors name the file."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bumblebee import Tokenizer
from bumblebee.tokenizer.tokenizer import SPECIAL_TOKENS

SPELLED = st.sampled_from([*SPECIAL_TOKENS, "<|im_", "end|>", "<0x0A>", "\u2581", "'ll", "  ", "\r\n", "e\u0301", "🐝"])
# Adversarial text: special tokens, whitespace, combining marks, characters of four bytes. No lone surrogates.
TEXTS = st.lists(SPELLED | st.text(st.characters(exclude_categories=["Cs"]), max_size=8), max_size=8).map("".join)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return Tokenizer.from_pretrained(tokenizer_folder)


def test_decode_inverts_encode(tokenizer):
    @settings(deadline=None)
    @given(TEXTS)
    def check(text):
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text

    check()


def test_encoding_a_long_text_does_not_block_threads(tokenizer):
    text = "an éternal 🐝 " * 40_000
    with ThreadPoolExecutor(1) as threads:
        begun = time.perf_counter()
        encoding = threads.submit(tokenizer.encode, text)
        longest = 0.0
        while not encoding.done():
            before = time.perf_counter()
            time.sleep(0.001)
            longest = max(longest, time.perf_counter() - before)
        took = time.perf_counter() - begun
    assert longest < took / 2, f"{longest:.3f} s of {took:.3f} s"
    assert encoding.result() == tokenizer.backend.encode(text, add_special_tokens=False).ids


def test_token_bytes_concatenate_to_the_text(tokenizer):
    @settings(deadline=None)
    @given(TEXTS)
    def check(text):
        assert b"".join(tokenizer.token_bytes[index] for index in tokenizer.encode(text)) == text.encode()

    check()


def test_text_never_gives_a_special_id(tokenizer):
    @settings(deadline=None)
    @given(TEXTS)
    def check(text):
        assert not tokenizer.special_ids.intersection(tokenizer.encode(text))

    check()


def test_encode_batch_equals_encode(tokenizer):
    @settings(deadline=None)
    @given(st.lists(TEXTS, max_size=4))
    def check(texts):
        assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == [tokenizer.encode(text) for text in texts]

    check()


def test_ids_and_bytes_survive_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "new")
    again = Tokenizer.from_pretrained(tmp_path / "new")

    @settings(deadline=None)
    @given(TEXTS)
    def check(text):
        assert again.encode(text) == tokenizer.encode(text)

    check()
    assert again.token_bytes == tokenizer.token_bytes and again.settings == tokenizer.settings


@pytest.mark.parametrize("text", ["\ud800", "a\udcffb", "\udc1d\ud83d"])
def test_lone_surrogates_are_replaced(tokenizer, text):
    repaired = "".join("\ufffd" if 0xD800 <= ord(c) < 0xE000 else c for c in text)
    assert tokenizer.encode(text) == tokenizer.encode(repaired)
    assert [ids.tolist() for ids in tokenizer.encode_batch([text, "b"])] == [tokenizer.encode(repaired), tokenizer.encode("b")]


def test_surrogate_pair_is_its_character(tokenizer):
    assert tokenizer.encode("\ud83d\udc1d") == tokenizer.encode("🐝")


def test_special_tokens_have_the_first_ids_and_no_bytes(tokenizer):
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == [0, 1, 2]
    assert tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.token_bytes[:3] == [b"", b"", b""]
    ids = [1, *tokenizer.encode("hi"), 2]
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>hi<|im_end|>"


def test_trained_tokenizer_has_eos_and_pad_but_no_bos(tokenizer):
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    assert tokenizer.bos_token_id is None and tokenizer.prefix_ids == []


def test_vocab_size_is_the_largest_id_plus_one(tokenizer):
    assert tokenizer.vocab_size == 400 == len(tokenizer.token_bytes)
    assert tokenizer.token_to_id("no such token") is None


def test_every_single_byte_is_a_token(tokenizer):
    assert {bytes([byte]) for byte in range(256)} <= set(tokenizer.token_bytes)


def test_invalid_utf8_decodes_to_the_replacement_character(tokenizer):
    first_byte = tokenizer.token_bytes.index("🐝".encode()[:1])
    assert tokenizer.decode([first_byte]) == "\ufffd"


def test_training_is_deterministic_and_compresses():
    texts = ["the bumblebee and the flower"] * 20
    first, second = Tokenizer.train(iter(texts), 290), Tokenizer.train(texts, 290)
    assert first.token_to_id("Ġbumblebee") is not None or first.token_to_id("Ġthe") is not None
    assert len(first.encode(texts[0])) < len(texts[0]) / 2
    assert first.backend.to_str() == second.backend.to_str()


def test_digits_are_single_tokens():
    tokenizer = Tokenizer.train(["12345 12345"] * 50, 300)
    assert [tokenizer.token_bytes[index] for index in tokenizer.encode("123")] == [b"1", b"2", b"3"]


def test_too_small_vocab_size_is_rejected():
    with pytest.raises(ValueError, match="vocab_size must be at least 259 .*, got 258"):
        Tokenizer.train(["text"], 258)
    assert Tokenizer.train(["text"], 259).vocab_size == 259


@pytest.mark.parametrize("spelling", ["<|im_end|>", {"content": "<|im_end|>", "special": True}], ids=["str", "AddedToken"])
def test_eos_token_is_read_from_tokenizer_config(tokenizer, spelling):
    assert Tokenizer(tokenizer.backend, {"eos_token": spelling}).eos_token_id == 2


def test_missing_tokenizer_config_means_no_eos_token(tokenizer_folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((tokenizer_folder / "tokenizer.json").read_bytes())
    assert Tokenizer.from_pretrained(tmp_path).eos_token_id is None


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "folder not found: {folder}"),
        ({}, "{folder} is not a tokenizer folder: it has no tokenizer.json"),
        ({"tokenizer.json": "{"}, "{folder}/tokenizer.json: "),
        ({"tokenizer.json": None, "tokenizer_config.json": "{"}, "{folder}/tokenizer_config.json: "),
        ({"tokenizer.json": None, "tokenizer_config.json": "[]"}, "{folder}/tokenizer_config.json: "),
    ],
    ids=["no folder", "no file", "damaged tokenizer", "damaged settings", "settings that are a list"],
)
def test_errors_name_the_file(tokenizer_folder, tmp_path, files, message):
    folder = tmp_path / "there"
    if files is not None:
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text((tokenizer_folder / name).read_text() if text is None else text)
    with pytest.raises(ValueError) as caught:
        Tokenizer.from_pretrained(folder)
    assert message.format(folder=folder) in str(caught.value)


def test_saved_files_are_valid_json(tokenizer_folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert json.loads((tokenizer_folder / name).read_text(encoding="utf-8"))
