"""Reward functions for reinforcement learning.

A reward is a callable ``reward(prompts, completions, records) -> list[float]``. It gets for each completion the text of the
question, the completion without special tokens, and the record of the data file that the question comes from. A function works:

    def brief(prompts: list[str], completions: list[str], records: list[dict]) -> list[float]:
        return [1.0 if len(completion) < 200 else 0.0 for completion in completions]
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

Record = Mapping[str, object]
RewardFunction = Callable[[list[str], list[str], list[Record]], Sequence[float]]

_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


class RewardError(ValueError):
    """A reward function raised, or returned what is no reward."""


class ExactAnswer:
    """1 if the completion is the record's answer, ignoring surrounding whitespace, else 0.

    Args:
        key: of the answer in the record.
    """

    def __init__(self, key: str = "answer") -> None:
        self.key = key

    def __call__(self, prompts: list[str], completions: list[str], records: list[Record]) -> list[float]:
        answers = [str(answer_of(record, self.key)) for record in records]
        return [float(text.strip() == answer.strip()) for text, answer in zip(completions, answers, strict=True)]


class NumericAnswer:
    """1 if the last number in the completion equals the last number in the record's answer, else 0.

    Thousands may be separated by commas. A completion without a number gets 0.

    Args:
        key: of the answer in the record: a number, or a text that ends with one, as in GSM8K.
        tolerance: largest difference, relative to the answer.
    """

    def __init__(self, key: str = "answer", tolerance: float = 1e-6) -> None:
        if not tolerance >= 0:
            raise ValueError(f"tolerance must be at least 0, got {tolerance}")
        self.key, self.tolerance = key, tolerance

    def __call__(self, prompts: list[str], completions: list[str], records: list[Record]) -> list[float]:
        return [self._score(text, record) for text, record in zip(completions, records, strict=True)]

    def _score(self, text: str, record: Record) -> float:
        given, expected = last_number(text), last_number(str(answer_of(record, self.key)))
        if expected is None:
            raise ValueError(f"the record's {self.key!r} has no number: {record[self.key]!r}")
        return float(given is not None and abs(given - expected) <= self.tolerance * max(abs(expected), 1.0))


class Matches:
    """1 if a regular expression is found in the completion, else 0; for formats such as ``<think>.*</think>``.

    Args:
        pattern: the expression; ``.`` also matches line breaks. ``^`` and ``$`` are the beginning and end of the completion.
    """

    def __init__(self, pattern: str) -> None:
        try:
            self.pattern = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from error

    def __call__(self, prompts: list[str], completions: list[str], records: list[Record]) -> list[float]:
        return [float(bool(self.pattern.search(text))) for text in completions]


class Brevity:
    """0 up to a length, then falling linearly to -1, as the overlong penalty of DAPO (arXiv 2503.14476, equation 13).

    Args:
        free: characters without a penalty.
        limit: characters from which on the reward is -1.
    """

    def __init__(self, free: int, limit: int) -> None:
        if not 0 <= free < limit:
            raise ValueError(f"free must be at least 0 and less than limit, got free {free} and limit {limit}")
        self.free, self.limit = free, limit

    def __call__(self, prompts: list[str], completions: list[str], records: list[Record]) -> list[float]:
        return [-min(max(len(text) - self.free, 0) / (self.limit - self.free), 1.0) for text in completions]


def answer_of(record: Record, key: str) -> object:
    """The answer in a record.

    Raises:
        ValueError: there is none.
    """
    if record.get(key) is None:
        raise ValueError(f"the record has no key {key!r}; its keys: {', '.join(map(repr, record))}")
    return record[key]


def last_number(text: str) -> float | None:
    """The last number in a text."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
