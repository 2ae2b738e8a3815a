"""Keeps user text that spells a special token from becoming one, whatever a template does with the text.

A template only concatenates strings, so in its output a user's "<|im_end|>" cannot be distinguished from the one that ends
the turn. Before rendering, each such spelling in user text is therefore broken up by inserting an escape character that occurs
nowhere else; any spelling that is intact after rendering is the template's own. The escape character is removed again when the
text is tokenized.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import TypeVar, cast

# Unicode's noncharacters for internal use; the private-use planes follow in case a text contains all of them.
ESCAPE_CANDIDATES = (range(0xFDD0, 0xFDF0), range(0xF0000, 0x10FFFE))
Value = TypeVar("Value")


def any_of(spellings: Iterable[str]) -> str:
    """A regular expression that matches any of the spellings, the longest first, or nothing if there are none."""
    longest_first = sorted(spellings, key=len, reverse=True)
    return "|".join(map(re.escape, longest_first)) or r"(?!)"


def replace_surrogates(text: str) -> str:
    """Replace lone surrogates by U+FFFD: they cannot be encoded as UTF-8, and tokenizers reject them."""
    try:
        text.encode()  # much faster than the repair, which almost no text needs
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


class SpecialTokenGuard:
    """Escapes the spellings of special tokens in the strings of a JSON value.

    Args:
        spellings: the special tokens, each at least two characters long.
    """

    def __init__(self, spellings: Iterable[str]) -> None:
        pattern = any_of(spellings)
        self._spelling = re.compile(pattern)
        # A lookahead, because one spelling may begin inside another one.
        self._first_character = re.compile(f"(?=(?:{pattern}))(.)", re.DOTALL)

    def escape(self, value: Value, marks: int = 0) -> tuple[Value, str, str]:
        """Break up all spellings of special tokens.

        Args:
            value: a JSON value; it is not modified.
            marks: number of further characters to return that do not occur in the value.

        Returns:
            The escaped value, the escape character ("" if nothing had to be escaped), and the marks.
        """
        text = "\n".join(_strings(value))
        found = self._spelling.search(text) is not None
        if not (found or marks):
            return value, "", ""
        unused = "".join(itertools.islice(_unused_characters(text), 1 + marks))
        escaped = cast(Value, self._insert(value, rf"\1{unused[0]}")) if found else value
        return escaped, unused[0] if found else "", unused[1:]

    def _insert(self, value: object, replacement: str) -> object:
        if isinstance(value, str):
            return self._first_character.sub(replacement, value)
        if isinstance(value, list | tuple):
            return [self._insert(item, replacement) for item in value]
        if isinstance(value, dict):
            return {self._insert(key, replacement): self._insert(item, replacement) for key, item in value.items()}
        return value


def unescape(text: str, escape: str) -> str:
    """Remove the escape character, also where a template has written it as a JSON escape sequence."""
    if not escape:
        return text
    return text.replace(escape, "").replace(_as_json(escape), "")


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)


def _unused_characters(text: str) -> Iterator[str]:
    characters = map(chr, itertools.chain(*ESCAPE_CANDIDATES))
    return (character for character in characters if character not in text and _as_json(character) not in text)


def _as_json(character: str) -> str:
    return json.dumps(character)[1:-1]
