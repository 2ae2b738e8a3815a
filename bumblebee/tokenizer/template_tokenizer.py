"""Tokenizes rendered templates: spelled special tokens become their ids, everything between them is encoded as text.

The ids are those that ``tokenizers`` gives for the whole text. The text is nevertheless encoded in parts, because an escaped
spelling (see special_token_guard.py) must be unescaped and still be text, and because the boundaries between prompt and answer
may cut the text anywhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import tokenizers
from tokenizers import normalizers, pre_tokenizers

from bumblebee.tokenizer.special_token_guard import any_of, replace_surrogates, unescape

# Unicode's White_Space, which the library strips; Python's str.strip removes four more characters.
BLANKS = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
LONG_TEXT = 10_000  # characters; encoding a text of this length takes several milliseconds


class TemplateTokenizer:
    """Tokenizes the text that a chat template renders.

    Args:
        backend: the library's tokenizer, with ``encode_special_tokens`` set, so that it encodes spelled special tokens as text.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        added = backend.get_added_tokens_decoder()
        # A token of one character cannot be escaped, so it cannot be distinguished from a user's: it is text here.
        self.special = {token.content: index for index, token in added.items() if token.special and len(token.content) > 1}
        self._pattern = re.compile(f"({any_of(self.special)})")
        self._strips_after = {token.content for token in added.values() if token.special and token.rstrip}
        self._strips_before = {token.content for token in added.values() if token.special and token.lstrip}
        # SentencePiece tokenizers prepend a blank to a text. They must not where a text continues.
        self._encode_at_start = partial(encode_text, backend)
        self._encode_after_special = partial(encode_text, with_parts(backend, _no_prefix_unless_always))
        self._encode_after_text = partial(encode_text, with_parts(backend, _no_prefix))

    def encode(self, segments: list[tuple[str, bool]], escape: str = "") -> tuple[list[int], list[bool]]:
        """Encode the consecutive segments of a text, each one separately.

        Args:
            segments: (text, flag of its tokens), in order.
            escape: the escape character to remove from the text.

        Returns:
            Ids, and the flag of each id.
        """
        ids: list[int] = []
        flags: list[bool] = []
        encode, strips = self._encode_at_start, False
        for segment, flag in segments:
            for part, is_special in self._split(segment):
                if is_special:
                    ids.append(self.special[part])
                    encode, strips = self._encode_after_special, part in self._strips_after
                elif text := unescape(part.lstrip(BLANKS) if strips else part, escape):
                    ids += encode(replace_surrogates(text))
                    encode, strips = self._encode_after_text, False
                flags += [flag] * (len(ids) - len(flags))
        return ids, flags

    def _split(self, segment: str) -> list[tuple[str, bool]]:
        """(text, whether it is a special token) in order, without the blanks that a special token strips before itself."""
        parts = self._pattern.split(segment)  # text and special tokens alternate
        if self._strips_before:
            for index in range(1, len(parts), 2):
                if parts[index] in self._strips_before:
                    parts[index - 1] = parts[index - 1].rstrip(BLANKS)
        return [(part, index % 2 == 1) for index, part in enumerate(parts) if part]


def encode_text(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    """Encode a text without adding special tokens. A long one releases the GIL, which ``backend.encode`` would hold."""
    if len(text) < LONG_TEXT:
        return backend.encode(text, add_special_tokens=False).ids
    return backend.encode_batch_fast([text], add_special_tokens=False)[0].ids


# -- normalizer and pre-tokenizer in their JSON form ---------------------------------------------------------------------

Part = dict[str, Any]  # one normalizer or pre-tokenizer
Change = Callable[[Part], Part | None]  # None removes the part


def _no_prefix_unless_always(part: Part) -> Part | None:
    return {**part, "prepend_scheme": "never"} if part.get("prepend_scheme") == "first" else part


def _no_prefix(part: Part) -> Part | None:
    if part["type"] == "Prepend":
        return None
    off = {"prepend_scheme": "never", "add_prefix_space": False}
    return {**part, **{key: value for key, value in off.items() if key in part}}


def with_parts(backend: tokenizers.Tokenizer, change: Change) -> tokenizers.Tokenizer:
    """A copy of the backend with changed normalizer and pre-tokenizer; the backend itself if nothing changes."""
    normalizer, pre_tokenizer = get_state(backend.normalizer), get_state(backend.pre_tokenizer)
    changed = [_apply(change, normalizer), _apply(change, pre_tokenizer)]
    if changed == [normalizer, pre_tokenizer]:
        return backend
    copy = tokenizers.Tokenizer.from_str(backend.to_str())
    copy.encode_special_tokens = True
    copy.normalizer = _from_state(changed[0], normalizers.Sequence([]))
    copy.pre_tokenizer = _from_state(changed[1], pre_tokenizers.Sequence([]))
    return copy


def _apply(change: Change, part: Part | None) -> Part | None:
    if part is None or part["type"] != "Sequence":
        return part and change(part)
    inner = {key: [_apply(change, item) for item in items] for key, items in part.items() if isinstance(items, list)}
    return {**part, **{key: [item for item in items if item] for key, items in inner.items()}}


def get_state(part: Any) -> Part | None:
    """The JSON form of a normalizer or pre-tokenizer."""
    return None if part is None else json.loads(part.__getstate__())


def _from_state(state: Part | None, part: Any) -> Any:
    if state is None:
        return None
    part.__setstate__(json.dumps(state).encode())
    return part
