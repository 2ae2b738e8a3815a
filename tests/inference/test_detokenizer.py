"""The pieces of a stream join to the text of its bytes, and no character is given out before its last byte is there."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bumblebee import Tokenizer
from bumblebee.inference.detokenizer import Detokenizer


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return Tokenizer.from_pretrained(tokenizer_folder)


def pieces(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*map(detokenizer.add, ids), detokenizer.finish()]


def test_any_ids_give_the_text_of_their_bytes(tokenizer):
    """Ids of special tokens, of bytes that are no UTF-8, and of rows that the tokenizer does not have."""

    @settings(deadline=None, max_examples=300)
    @given(st.lists(st.integers(0, tokenizer.vocab_size + 5)))
    def check(ids):
        known = [index for index in ids if index < tokenizer.vocab_size]
        expected = b"".join(tokenizer.token_bytes[index] for index in known).decode("utf-8", errors="replace")
        assert "".join(pieces(tokenizer, ids)) == expected

    check()


def test_every_prefix_of_a_stream_is_a_prefix_of_the_text(tokenizer):
    """One byte a token, so that every character of several bytes is cut."""
    one_byte = {data: index for index, data in enumerate(tokenizer.token_bytes) if len(data) == 1}

    @settings(deadline=None)
    @given(st.text(st.characters(exclude_categories=["Cs"])))
    def check(text):
        detokenizer, so_far = Detokenizer(tokenizer), ""
        for number, byte in enumerate(text.encode(), start=1):
            so_far += detokenizer.add(one_byte[bytes([byte])])
            assert so_far == text.encode()[:number].decode("utf-8", errors="ignore"), "complete characters, and only those"
        assert detokenizer.finish() == "" and so_far == text

    check()


def test_a_character_that_is_never_completed_ends_as_the_replacement_character(tokenizer):
    first = tokenizer.token_bytes.index("🐝".encode()[:1])
    assert pieces(tokenizer, [first]) == ["", "\ufffd"]
    letter = tokenizer.token_bytes.index(b"a")
    assert pieces(tokenizer, [first, letter]) == ["", "\ufffda", ""]


def test_special_tokens_have_no_text(tokenizer):
    assert pieces(tokenizer, [0, 1, 2]) == ["", "", "", ""]
