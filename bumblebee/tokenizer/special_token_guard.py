"""Text that spells a special token stays text, whatever a template does with it.

A template only joins strings: in what it gives, a user's "<|im_end|>" looks like the one that ends the turn. So before
rendering each spelling in users' text is broken by one character that occurs nowhere in it, and what is still whole in the
result is the template's own. Afterwards that character is taken out again, and the text is what it was.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

# Unicode's noncharacters for internal use, and, in case a text holds all of these, its planes of private characters.
CANDIDATES = (range(0xFDD0, 0xFDF0), range(0xF0000, 0x10FFFE))


def alternatives(spellings: Iterable[str]) -> str:
    """A pattern of any of the spellings, the longest first; of nothing at all if there are none."""
    longest_first = sorted(spellings, key=len, reverse=True)
    return "|".join(map(re.escape, longest_first)) or r"(?!)"


def replace_surrogates(text: str) -> str:
    """Half a UTF-16 pair is no character, cannot be written as UTF-8, and the tokenizers refuse it: U+FFFD instead."""
    try:
        text.encode()  # far faster than the repair, which next to no text needs
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


class Guard:
    """Breaks the spellings of some special tokens in the strings of a JSON value.

    Args:
        spellings: of the special tokens, each of two characters or more.
    """

    def __init__(self, spellings: Iterable[str]) -> None:
        pattern = alternatives(spellings)
        self._spelled = re.compile(pattern)
        # One spelling may begin within another, so it looks at every place, not behind the last find.
        self._first_character = re.compile(f"(?=(?:{pattern}))(.)", re.DOTALL)

    def protect(self, value: Any, marks: int = 0) -> tuple[Any, str, str]:
        """The value with broken spellings.

        Args:
            value: anything of JSON; it is not changed.
            marks: how many characters that do not occur in the value the caller needs for itself.

        Returns:
            (the value, the character that breaks or "" where nothing is spelled, the marks).
        """
        text = "\n".join(_strings(value))
        spelled = self._spelled.search(text) is not None
        if not (spelled or marks):
            return value, "", ""
        unused = "".join(itertools.islice(_unused(text), 1 + marks))
        broken = self._broken(value, rf"\1{unused[0]}") if spelled else value
        return broken, unused[0] if spelled else "", unused[1:]

    def _broken(self, value: Any, replacement: str) -> Any:
        if isinstance(value, str):
            return self._first_character.sub(replacement, value)
        if isinstance(value, list | tuple):
            return [self._broken(item, replacement) for item in value]
        if isinstance(value, dict):
            return {self._broken(key, replacement): self._broken(item, replacement) for key, item in value.items()}
        return value


def mend(text: str, breaker: str) -> str:
    """The text without the character that breaks, also where a template wrote it as a JSON escape."""
    if not breaker:
        return text
    return text.replace(breaker, "").replace(_escaped(breaker), "")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)


def _unused(text: str) -> Iterator[str]:
    characters = map(chr, itertools.chain(*CANDIDATES))
    return (character for character in characters if character not in text and _escaped(character) not in text)


def _escaped(character: str) -> str:
    return json.dumps(character)[1:-1]
