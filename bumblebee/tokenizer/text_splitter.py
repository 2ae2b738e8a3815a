"""Splits a long text into pieces whose ids, concatenated, are exactly those of the whole text.

The library needs more than a hundred bytes for each character that it encodes, so a long text is encoded in pieces. A text
may be split between x and y if each step of its tokenizer treats both sides alone as it does together:

1. x, the character before it and the one after y are letters that no normalization form composes with what precedes them,
   and y is a blank, a line feed or a CJK comma or full stop. Normalization then changes nothing across the boundary.
2. No added token contains "xy".
3. Some pre-tokenizer always splits between x and y, and those before it do not look across. For a regular expression this is
   proven from the pattern (regex_pairs.py): no match contains "xy". If none splits, as in Llama 2, no token of the BPE contains
   "xy", so no merge crosses.

Here, x and y are what the earlier steps have made of them. A tokenizer with a step that is not listed here is not split, and
neither is a text without such a boundary: these are encoded whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cached_property, lru_cache
from itertools import islice
from typing import Any, Literal

import tokenizers
from tokenizers import models, normalizers

from bumblebee.tokenizer.regex_pairs import RegexPairs, UnsupportedPatternError
from bumblebee.tokenizer.template_tokenizer import get_state, with_parts

# Letters since Unicode 3.2, none of which is the second part of a canonical composition: Latin, Greek, Cyrillic, Hebrew,
# Arabic, Devanagari and Thai consonants, kana, CJK, Hangul syllables.
LETTER = (
    r"[A-Za-z\u00C0-\u00D6\u00D8-\u00F6\u00F8-\u0220\u0391-\u03A1\u03A3-\u03C9\u0410-\u044F\u05D0-\u05EA\u0627-\u063A\u0641-\u064A"
    r"\u0915-\u0928\u0E01-\u0E2E\u3042-\u3094\u30A2-\u30FA\u4E00-\u9FA5\uAC00-\uD7A3]"
)
BOUNDARY = re.compile(rf"(?<={LETTER}{{2}})[ \n\u3001\u3002\uFF0C](?={LETTER})")
PIECE = 1 << 14  # characters; a few more up to the next boundary
ATTEMPTS = 10_000  # boundaries to look at, of which none may do, before the rest of a text stays whole
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # of the library's ByteLevel
WORDS_PATTERN = r"\w+|[^\w\s]+"  # of its Whitespace

Part = Mapping[str, Any]  # a normalizer, pre-tokenizer or model in its JSON form
Effect = Literal["splits", "joins", "unsafe"]  # of a pre-tokenizer on a boundary; "joins": it neither splits nor looks across


class TextSplitter:
    """Splits texts for a tokenizer.

    Args:
        backend: the library's tokenizer, which encodes spelled special tokens as text.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._allows = lru_cache(maxsize=None)(self._decide)

    def split(self, text: str, size: int = PIECE) -> Iterator[str]:
        """Yield the pieces of a text, each of about ``size`` characters; the text itself if it has no safe boundary."""
        begin = 0
        while len(text) - begin > size and (end := self._next_boundary(text, begin + size)):
            yield text[begin:end]
            begin = end
        yield text[begin:] if begin else text

    @cached_property
    def continuation(self) -> tokenizers.Tokenizer:
        """The tokenizer of all pieces but the first: it prepends nothing."""
        return with_parts(self._backend, lambda part: None if part["type"] == "Prepend" else part)

    def _next_boundary(self, text: str, at: int) -> int | None:
        boundaries = islice(BOUNDARY.finditer(text, at), ATTEMPTS)
        return next((found.start() for found in boundaries if self._allows(text[found.start() - 1], found[0])), None)

    def _decide(self, x: str, y: str) -> bool:
        if len(x.casefold()) != 1 or not self._is_supported:
            return False
        if (normalized := self._normalize(x, y)) is None:
            return False
        return self._spares_added_tokens((x, y), normalized) and self._separates(*normalized)

    # -- the tokenizer's parts -----------------------------------------------------------------------------------------

    @cached_property
    def _normalizers(self) -> list[Part]:
        return _flat(get_state(self._backend.normalizer))

    @cached_property
    def _pre_tokenizers(self) -> list[Part]:
        return _flat(get_state(self._backend.pre_tokenizer))

    @cached_property
    def _is_supported(self) -> bool:
        """Whether the tokenizer is deterministic, keeps every token, and prepends to a text at most once."""
        added = [token for token in self._backend.get_added_tokens_decoder().values() if not token.special]
        prepends = any(part["type"] == "Prepend" for part in self._normalizers)
        return (
            self._backend.truncation is None
            and self._backend.padding is None
            and self._backend.encode_special_tokens
            and not getattr(self._backend.model, "dropout", None)
            and not any(token.single_word or token.rstrip for token in added)
            and not (prepends and added)
        )

    def _spares_added_tokens(self, pair: tuple[str, str], normalized: tuple[str, str]) -> bool:
        """Whether no added token contains the pair, in the form in which the library searches it."""
        for token in self._backend.get_added_tokens_decoder().values():
            content, (x, y) = token.content, pair
            if token.normalized and self._backend.normalizer is not None:
                content, (x, y) = self._backend.normalizer.normalize_str(content), normalized
            if x + y in content:
                return False
        return True

    def _normalize(self, x: str, y: str) -> tuple[str, str] | None:
        """The characters before and after the boundary in the normalized text; None if they may depend on others."""
        for part in self._normalizers:
            if not _is_local(part, x, y):
                return None
            if part["type"] not in ("Prepend", "Strip"):
                step = normalizers.Sequence([])
                step.__setstate__(json.dumps(part).encode())
                x, y = step.normalize_str(x)[-1:], step.normalize_str(y)[:1]
            if not (x and y):
                return None
        return x, y

    def _separates(self, x: str, y: str) -> bool:
        """Whether no token reaches across the boundary."""
        is_split = False
        for index, part in enumerate(self._pre_tokenizers):
            effect = _effect(part, x, y)
            if effect == "unsafe" or (part["type"] in ("ByteLevel", "Metaspace") and index + 1 < len(self._pre_tokenizers)):
                return False
            is_split = is_split or effect == "splits"
            if part["type"] == "Metaspace":
                y = part["replacement"]
        is_bytes = any(part["type"] == "ByteLevel" for part in self._pre_tokenizers)
        return is_split or (not is_bytes and self._is_unmergeable(x, y))

    def _is_unmergeable(self, x: str, y: str) -> bool:
        """Whether a BPE of whole texts never merges x with y."""
        model = self._backend.model
        if not isinstance(model, models.BPE) or model.ignore_merges:
            return False
        if model.continuing_subword_prefix or model.end_of_word_suffix:
            return False
        return x in self._vocab and y in self._vocab and x + y not in self._token_text

    @cached_property
    def _vocab(self) -> Mapping[str, int]:
        return self._backend.get_vocab(with_added_tokens=False)

    @cached_property
    def _token_text(self) -> str:
        return "\0".join(self._vocab)


def _flat(part: Part | None) -> list[Part]:
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [inner for items in part.values() if isinstance(items, list) for item in items for inner in _flat(item)]


def _is_local(part: Part, x: str, y: str) -> bool:
    """Whether a normalizer treats the text up to x and that from y on as it does alone."""
    match part:
        case {"type": "NFC" | "NFD" | "NFKC" | "NFKD" | "Lowercase" | "StripAccents" | "BertNormalizer" | "Prepend"}:
            return True
        case {"type": "Strip", "strip_left": strip_left}:
            return not x.isspace() and not (strip_left and y.isspace())
        case {"type": "Replace", "pattern": {"String": str(text)}}:
            return len(text) == 1 or not (x in text or y in text)
        case {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " " | "\u2581"}:
            return x != " "  # y is a single blank
    return False


def _effect(part: Part, x: str, y: str) -> Effect:
    """What a pre-tokenizer does at a boundary."""
    match part:
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated" | "Removed"}:
            return _effect_of_pattern(pattern, x, y)
        case {"type": "Split", "pattern": {"String": text}}:
            return "unsafe" if x in text or y in text else "joins"
        case {"type": "ByteLevel", "add_prefix_space": prefix, "use_regex": use_regex}:
            if prefix and y != " ":
                return "unsafe"
            return _effect_of_pattern(GPT2_PATTERN, x, y) if use_regex else "joins"
        case {"type": "Metaspace", "replacement": replacement, "split": split}:
            return "unsafe" if y not in (" ", replacement) else "splits" if split else "joins"
        case {"type": "Whitespace"}:
            return _effect_of_pattern(WORDS_PATTERN, x, y)
        case {"type": "WhitespaceSplit" | "BertPreTokenizer"}:
            return "splits" if y.isspace() else "unsafe"
        case {"type": "Digits"}:
            return "joins" if x.isalpha() and not y.isnumeric() else "unsafe"
        case {"type": "Punctuation"}:
            return "joins" if x.isalpha() and y.isspace() else "unsafe"
    return "unsafe"


@lru_cache(maxsize=64)
def _pairs_of(pattern: str) -> RegexPairs | None:
    try:
        return RegexPairs(pattern)
    except UnsupportedPatternError:
        return None


def _effect_of_pattern(pattern: str, x: str, y: str) -> Effect:
    pairs = _pairs_of(pattern)
    if pairs is None or pairs.join(x, y):
        return "unsafe"
    return "splits" if pairs.covers(x) or pairs.covers(y) else "joins"
