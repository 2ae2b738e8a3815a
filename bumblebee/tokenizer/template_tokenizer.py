"""From a template's text to ids: special tokens where they are spelled, everything between them encoded as text.

The ids are those that ``tokenizers`` gives for the whole text. It is done piece by piece because a spelling that a guard
broke must be mended and still be text, and because borders between prompt and answer cut the text anywhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import tokenizers
from tokenizers import normalizers, pre_tokenizers

from bumblebee.tokenizer.special_token_guard import alternatives, mend, replace_surrogates

# Unicode's White_Space, which the library strips; Python's str.strip takes away four more.
BLANKS = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
LONG = 10_000  # characters of a text that takes some milliseconds


class TemplateTokenizer:
    """Ids of templates' texts.

    Args:
        backend: the library's tokenizer, which takes spelled special tokens for text (``encode_special_tokens``).
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        added = backend.get_added_tokens_decoder()
        # A token of one character cannot be broken, and so not be told from a user's: it is text here.
        self.special = {token.content: index for index, token in added.items() if token.special and len(token.content) > 1}
        self.pattern = re.compile(f"({alternatives(self.special)})")
        self._eats_behind = {token.content for token in added.values() if token.special and token.rstrip}
        self._eats_before = {token.content for token in added.values() if token.special and token.lstrip}
        # Sentencepiece's tokenizers put a blank before a text. Where a text goes on, they must not.
        self._encode_at_start = partial(encode_text, backend)
        self._encode_after_special = partial(encode_text, _rewritten(backend, _not_first))
        self._encode_after_text = partial(encode_text, _rewritten(backend, _no_prefix))

    def encode(self, segments: list[tuple[str, bool]], breaker: str = "") -> tuple[list[int], list[bool]]:
        """Ids and flags of segments of one text, each segment tokenised by itself.

        Args:
            segments: (text, flag of its tokens), in order.
            breaker: the guard's character, to be taken out of the text.
        """
        ids: list[int] = []
        flags: list[bool] = []
        encode, eats = self._encode_at_start, False
        for segment, flag in segments:
            for piece, is_special in self._pieces(segment):
                if is_special:
                    ids.append(self.special[piece])
                    encode, eats = self._encode_after_special, piece in self._eats_behind
                elif text := mend(piece.lstrip(BLANKS) if eats else piece, breaker):
                    ids += encode(replace_surrogates(text))
                    encode, eats = self._encode_after_text, False
                flags += [flag] * (len(ids) - len(flags))
        return ids, flags

    def _pieces(self, segment: str) -> list[tuple[str, bool]]:
        """(piece, whether it is a special token) in order; blanks that a special token eats before itself are gone."""
        pieces = self.pattern.split(segment)  # text and special tokens in turn
        if self._eats_before:
            for index in range(1, len(pieces), 2):
                if pieces[index] in self._eats_before:
                    pieces[index - 1] = pieces[index - 1].rstrip(BLANKS)
        return [(piece, index % 2 == 1) for index, piece in enumerate(pieces) if piece]


def encode_text(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    """Ids of a text. While a long one is encoded other threads go on: ``backend.encode`` would hold them up for seconds."""
    if len(text) < LONG:
        return backend.encode(text, add_special_tokens=False).ids
    return backend.encode_batch_fast([text], add_special_tokens=False)[0].ids


# A part of the backend in its JSON form, to what it has to be; None removes it.
Change = Callable[[dict[str, Any]], dict[str, Any] | None]


def _not_first(part: dict[str, Any]) -> dict[str, Any] | None:
    return {**part, "prepend_scheme": "never"} if part.get("prepend_scheme") == "first" else part


def _no_prefix(part: dict[str, Any]) -> dict[str, Any] | None:
    if part["type"] == "Prepend":
        return None
    off = {"prepend_scheme": "never", "add_prefix_space": False}
    return {**part, **{key: value for key, value in off.items() if key in part}}


def _rewritten(backend: tokenizers.Tokenizer, change: Change) -> tokenizers.Tokenizer:
    """The backend itself where the change changes nothing, else a changed copy."""
    normalizer, pre_tokenizer = _state(backend.normalizer), _state(backend.pre_tokenizer)
    changed = [_changed(normalizer, change), _changed(pre_tokenizer, change)]
    if changed == [normalizer, pre_tokenizer]:
        return backend
    copy = tokenizers.Tokenizer.from_str(backend.to_str())
    copy.encode_special_tokens = True
    copy.normalizer = _built(changed[0], normalizers.Sequence([]))
    copy.pre_tokenizer = _built(changed[1], pre_tokenizers.Sequence([]))
    return copy


def _changed(part: dict[str, Any] | None, change: Change) -> dict[str, Any] | None:
    if part is None or part["type"] != "Sequence":
        return part and change(part)
    inner = {key: [_changed(item, change) for item in items] for key, items in part.items() if isinstance(items, list)}
    return {**part, **{key: [item for item in items if item] for key, items in inner.items()}}


def _state(part: Any) -> dict[str, Any] | None:
    return None if part is None else json.loads(part.__getstate__())


def _built(state: dict[str, Any] | None, part: Any) -> Any:
    if state is None:
        return None
    part.__setstate__(json.dumps(state).encode())
    return part
