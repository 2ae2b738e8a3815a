"""Passage: the part of a completion that counts, such as what follows the thinking."""

from __future__ import annotations

import re


def compiled(option: str, pattern: str) -> re.Pattern[str]:
    """A regular expression whose ``.`` also matches line breaks.

    Raises:
        ValueError: it is not one; names the option.
    """
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"{option} {pattern!r} is not a regular expression: {error}") from error


class Passage:
    """The last match of a pattern in a text, or the match's group if there is one.

    Args:
        within: the pattern; None takes the whole text.
    """

    def __init__(self, within: str | None) -> None:
        self._pattern = None if within is None else compiled("within", within)
        if self._pattern is not None and self._pattern.groups > 1:
            raise ValueError(f"within {within!r} has {self._pattern.groups} groups, expected at most 1: write (?:...)")

    def of(self, text: str) -> str | None:
        """The passage; None if there is no match."""
        if self._pattern is None:
            return text
        found = list(self._pattern.finditer(text))
        return found[-1][self._pattern.groups] if found else None
