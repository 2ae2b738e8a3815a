"""Which two neighbouring characters a regular expression can match together, for splitting a text where it never does.

The patterns are those of pre-tokenizers, such as Qwen2's. Of their syntax, this module reads character classes, escapes,
groups, alternatives, greedy and lazy quantifiers, and a lookahead of one character at the end of an alternative. Whether a
class contains a character is asked of the engine that runs the pattern, so both have the same Unicode tables.

The positions of a pattern are its classes and literals. A match that contains "xy" takes x at some position and y at one
that can follow it (Glushkov 1961), so it is impossible if no such two positions match x and y.
"""

from __future__ import annotations

import re
from collections import defaultdict
from functools import cache
from typing import NamedTuple

from tokenizers import Regex, pre_tokenizers

CLASS = re.compile(r"\[\^?(?:\\.|(?!&&)[^\]\[\\])+\]", re.DOTALL)
ESCAPE = re.compile(r"\\(?:[pP]\{\^?\w+\}|[sSdDwWrntfv]|[^\w\s])")
GROUP = re.compile(r"\((?:\?:|\?(?P<i>i):)?(?!\?)")
LOOKAHEAD = re.compile(rf"\(\?[=!](?:{CLASS.pattern}|{ESCAPE.pattern})\)", re.DOTALL)
QUANTIFIER = re.compile(r"(?:(?P<simple>[?*+])|\{(?P<least>[01]),?(?P<most>\d*)\})\??(?!\+)")
SPECIAL = set(".^$|()[]{}*+?\\")


class UnsupportedPatternError(ValueError):
    """A pattern that this module does not read."""


class _Part(NamedTuple):
    """Part of a pattern: whether it matches the empty text, and the positions that a match can begin and end with."""

    empty: bool
    first: frozenset[int]
    last: frozenset[int]


class RegexPairs:
    """The pairs of neighbouring characters in the matches of a pattern.

    Args:
        pattern: in the syntax of Oniguruma, which ``tokenizers`` uses.

    Raises:
        UnsupportedPatternError: the pattern has other syntax, or matches the empty text.
    """

    def __init__(self, pattern: str) -> None:
        self._pattern, self._at = pattern, 0
        self._positions: list[str | None] = []  # the class or literal; None for a lookahead
        self._follow: defaultdict[int, set[int]] = defaultdict(set)
        whole = self._alternatives(ignore_case=False)
        if self._at < len(pattern) or whole.empty:
            raise UnsupportedPatternError(pattern)
        self._alone = [self._positions[i] for i in whole.first & whole.last]
        pairs = [(i, j) for i, following in self._follow.items() for j in following]
        lookaheads = {i for i, source in enumerate(self._positions) if source is None}
        if lookaheads & (whole.first | {i for i, _ in pairs}):  # anywhere but at the end of an alternative
            raise UnsupportedPatternError(pattern)
        self._pairs = {(self._positions[i], self._positions[j]) for i, j in pairs}

    def join(self, x: str, y: str) -> bool:
        """Whether a match may contain x followed by y, or depend on what follows x.

        If not, the matches of a text with "xy" are those of the text up to x and those of the text from y on: no attempt to
        match gets past x, and a lookahead never looks at y from behind x.
        """
        return any(_matches(first, x) and (second is None or _matches(second, y)) for first, second in self._pairs)

    def covers(self, x: str) -> bool:
        """Whether every x belongs to a match, because it is a match by itself if no other contains it."""
        return any(_matches(source, x) for source in self._alone)

    # -- parser --------------------------------------------------------------------------------------------------------

    def _alternatives(self, ignore_case: bool) -> _Part:
        parts = [self._sequence(ignore_case)]
        while self._pattern.startswith("|", self._at):
            self._at += 1
            parts.append(self._sequence(ignore_case))
        first, last = (frozenset().union(*sets) for sets in ([p.first for p in parts], [p.last for p in parts]))
        return _Part(any(part.empty for part in parts), first, last)

    def _sequence(self, ignore_case: bool) -> _Part:
        whole = _Part(True, frozenset(), frozenset())
        while self._at < len(self._pattern) and self._pattern[self._at] not in "|)":
            part = self._quantified(ignore_case)
            for position in whole.last:
                self._follow[position] |= part.first
            first = whole.first | part.first if whole.empty else whole.first
            whole = _Part(whole.empty and part.empty, first, part.last | whole.last if part.empty else part.last)
        return whole

    def _quantified(self, ignore_case: bool) -> _Part:
        part = self._atom(ignore_case)
        if (found := self._take(QUANTIFIER)) is None:
            return part
        simple, least, most = found.group("simple", "least", "most")
        if simple in ("*", "+") or (least and (most not in ("0", "1") if "," in found[0] else least == "0")):
            for position in part.last:
                self._follow[position] |= part.first
        return part._replace(empty=part.empty or simple in ("?", "*") or least == "0")

    def _atom(self, ignore_case: bool) -> _Part:
        if not ignore_case and self._take(LOOKAHEAD):
            return self._position(None)
        if group := self._take(GROUP):
            part = self._alternatives(ignore_case or group["i"] is not None)
            if not self._pattern.startswith(")", self._at):
                raise UnsupportedPatternError(self._pattern)
            self._at += 1
            return part
        if found := self._take(CLASS) or self._take(ESCAPE):
            if ignore_case:  # a class may match several characters then, such as "ss" for a sharp s
                raise UnsupportedPatternError(self._pattern)
            return self._position(found[0])
        literal = self._pattern[self._at]
        if literal in SPECIAL or (ignore_case and not literal.isascii()):
            raise UnsupportedPatternError(self._pattern)
        self._at += 1
        return self._position(f"(?i:{literal})" if ignore_case else literal)

    def _position(self, source: str | None) -> _Part:
        self._positions.append(source)
        index = frozenset([len(self._positions) - 1])
        return _Part(False, index, index)

    def _take(self, syntax: re.Pattern[str]) -> re.Match[str] | None:
        if found := syntax.match(self._pattern, self._at):
            self._at = found.end()
        return found


@cache
def _splitter(source: str) -> pre_tokenizers.Split:
    return pre_tokenizers.Split(Regex(source), behavior="removed")


@cache
def _matches(source: str | None, character: str) -> bool:
    """Whether a class or literal matches a character; a lookahead takes none."""
    return source is not None and not _splitter(source).pre_tokenize_str(character)
