"""Streamed text joins to the decoded bytes, and no character is emitted before its last byte has arrived."""

from __future__ import annotations

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models

from bumblebee import Tokenizer
from bumblebee.inference.detokenizer import Detokenizer


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return Tokenizer.from_pretrained(tokenizer_folder)


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*map(detokenizer.add, ids), detokenizer.finish()]


def test_any_ids_decode_to_their_bytes(tokenizer):
    """Including special tokens, invalid UTF-8, and ids beyond the tokenizer's vocabulary."""

    @settings(deadline=None, max_examples=300)
    @given(st.lists(st.integers(0, tokenizer.vocab_size + 5)))
    def check(ids):
        known = [index for index in ids if index < tokenizer.vocab_size]
        expected = b"".join(tokenizer.token_bytes[index] for index in known).decode("utf-8", errors="replace")
        assert "".join(pieces(tokenizer, ids)) == expected

    check()


def test_streamed_text_is_always_a_prefix_of_the_text(tokenizer):
    """One byte per token, so that every multi-byte character is split."""
    one_byte = {data: index for index, data in enumerate(tokenizer.token_bytes) if len(data) == 1}

    @settings(deadline=None)
    @given(st.text(st.characters(exclude_categories=["Cs"])))
    def check(text):
        detokenizer, so_far = Detokenizer(tokenizer), ""
        for number, byte in enumerate(text.encode(), start=1):
            so_far += detokenizer.add(one_byte[bytes([byte])])
            assert so_far == text.encode()[:number].decode("utf-8", errors="ignore"), "complete characters only"
        assert detokenizer.finish() == "" and so_far == text

    check()


def test_incomplete_character_becomes_replacement_character(tokenizer):
    first = tokenizer.token_bytes.index("🐝".encode()[:1])
    assert pieces(tokenizer, [first]) == ["", "\ufffd"]
    letter = tokenizer.token_bytes.index(b"a")
    assert pieces(tokenizer, [first, letter]) == ["", "\ufffda", ""]


def test_special_tokens_have_no_text(tokenizer):
    assert pieces(tokenizer, [0, 1, 2]) == ["", "", "", ""]


# -- stop strings --------------------------------------------------------------------------------------------------------


def test_spelled_special_tokens_are_text(tokenizer):
    start, end = (tokenizer.token_to_id(token) for token in ("<|im_start|>", "<|im_end|>"))
    detokenizer = Detokenizer(tokenizer, ["_start|>!"], [start])
    ids = [start, *tokenizer.encode("a"), end, start, *tokenizer.encode("!")]
    assert "".join(map(detokenizer.add, ids)) == "<|im_start|>a<|im" and detokenizer.stopped


def cut(text: str, stop: list[str], unchecked: int = 0, include_stop: bool = False) -> tuple[str, bool]:
    """Reference: search after every character that is checked; cut before the longest stop string that is complete first."""
    for end in range(unchecked + 1, len(text) + 1):
        if matches := [each for each in stop if text[:end].endswith(each)]:
            return text[: end if include_stop else end - len(max(matches, key=len))], True
    return text, False


def partial_stop(text: str, stop: list[str]) -> int:
    """Length of the longest suffix that is a proper prefix of a stop string."""
    return max((size for each in stop for size in range(len(each)) if text.endswith(each[:size])), default=0)


# A small alphabet, so that stop strings match often, overlap and almost match; some characters have several bytes.
TEXTS = st.text("ab 🐝é", max_size=30)
STOPS = st.lists(st.text("ab 🐝é", min_size=1, max_size=5), max_size=4)


def byte_level(tokenizer: Tokenizer, data: bytes, sizes: list[int]) -> list[int]:
    """Split into tokens of the given sizes in bytes where the vocabulary has them, otherwise the longest up to 4."""
    table = {piece: index for index, piece in enumerate(tokenizer.token_bytes) if piece}
    ids = []
    while data:
        size = next(n for n in [*(sizes[:1]), *range(4, 0, -1)] if 0 < n <= len(data) and data[:n] in table)
        ids.append(table[data[:size]])
        data, sizes = data[size:], sizes[1:]
    return ids


def test_stop_strings_are_found_across_token_boundaries(tokenizer):
    """After every token, exactly the text is emitted that the reference can be certain of."""

    @settings(max_examples=400)
    @given(TEXTS, STOPS, st.lists(st.integers(1, 4)), st.integers(0, 6), st.booleans())
    def check(text, stop, sizes, min_tokens, include_stop):
        detokenizer, so_far, read = Detokenizer(tokenizer, stop, (), min_tokens, include_stop), "", b""
        unchecked = 0  # characters of the first tokens, in which no stop string may end
        for number, index in enumerate(byte_level(tokenizer, text.encode(), sizes), start=1):
            so_far += detokenizer.add(index)
            read += tokenizer.token_bytes[index]
            complete = read.decode("utf-8", errors="ignore")
            unchecked = len(complete) if number <= min_tokens else unchecked
            expected, stopped = cut(complete, stop, unchecked, include_stop)
            assert detokenizer.stopped == stopped
            held_back = 0 if stopped else partial_stop(complete, stop)
            assert so_far == expected[: len(expected) - held_back], "exactly what is certain"
        assert so_far + detokenizer.finish() == cut(text, stop, unchecked, include_stop)[0]
        assert detokenizer.finish() == "", "nothing is left after finish"

    check()


def test_nothing_is_emitted_after_a_stop_string(tokenizer):
    detokenizer = Detokenizer(tokenizer, ["b"])
    assert [detokenizer.add(index) for index in byte_level(tokenizer, b"abc", [1, 1, 1])] == ["a", "", ""]
    assert detokenizer.stopped and detokenizer.finish() == ""


def test_held_back_text_is_emitted_once_no_stop_can_match(tokenizer):
    ids = byte_level(tokenizer, b"x###y", [1] * 5)
    detokenizer = Detokenizer(tokenizer, ["####"])
    assert [detokenizer.add(index) for index in ids] == ["x", "", "", "", "###y"]
    detokenizer = Detokenizer(tokenizer, ["####"])
    assert [detokenizer.add(index) for index in ids[:3]] == ["x", "", ""] and detokenizer.finish() == "##"


def test_special_tokens_do_not_break_a_stop_string(tokenizer):
    first, second = byte_level(tokenizer, b"ab", [1, 1])
    detokenizer = Detokenizer(tokenizer, ["ab"])
    assert [detokenizer.add(first), detokenizer.add(0), detokenizer.add(second)] == ["", "", ""]
    assert detokenizer.stopped


def test_invalid_utf8_can_complete_a_stop_string(tokenizer):
    first = tokenizer.token_bytes.index("🐝".encode()[:1])
    detokenizer = Detokenizer(tokenizer, ["\ufffd"])
    assert detokenizer.add(first) == "" and not detokenizer.stopped, "it may still become a complete character"
    assert detokenizer.finish() == "" and detokenizer.stopped


# -- sentencepiece -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    """As in Llama 2: U+2581 for a space, and byte fallback."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁ab", "▁a", "ab", "▁ab", "é"]
    backend = tokenizers.Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, [], byte_fallback=True))
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(backend, {"eos_token": "</s>"})


def test_sentencepiece_tokens_and_byte_fallback(sentencepiece):
    @settings(max_examples=200)
    @given(TEXTS, STOPS, st.lists(st.integers(1, 4)))
    def check(text, stop, sizes):
        ids = byte_level(sentencepiece, text.encode(), sizes)
        detokenizer = Detokenizer(sentencepiece, stop)
        assert "".join([*map(detokenizer.add, ids), detokenizer.finish()]) == cut(text, stop)[0]

    check()
    ids = [sentencepiece.token_to_id(piece) for piece in ["▁ab", "<0xF0>", "<0x9F>", "</s>", "<0x90>", "<0x9D>", "▁a"]]
    assert pieces(sentencepiece, ids) == [" ab", "", "", "", "", "🐝", " a", ""]
