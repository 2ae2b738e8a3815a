"""Escaping breaks every spelling of a special token and can be undone."""

from __future__ import annotations

import json

from helpers.chat_folders import SPECIAL
from hypothesis import given
from hypothesis import strategies as st

from bumblebee.tokenizer.special_token_guard import SpecialTokenGuard, unescape

SPELLED = st.sampled_from([*SPECIAL, "<|im_", "end|>", "<<|im_end|>", "<s", ">", "\ufdd0", "\ufdd1", "\\ufdd0", " "])
TEXTS = st.lists(SPELLED | st.text(st.characters(exclude_categories=["Cs"]), max_size=4), max_size=6).map("".join)


@given(st.recursive(TEXTS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=5))
def test_escape_and_unescape_are_inverse(value):
    escaped, escape, marks = SpecialTokenGuard(SPECIAL).escape(value, marks=2)
    text = json.dumps(escaped, ensure_ascii=False)
    assert not any(token in text for token in SPECIAL)
    assert unescape(text, escape) == json.dumps(value, ensure_ascii=False)
    assert len(set(marks)) == 2 and not set(marks) & set(text)
