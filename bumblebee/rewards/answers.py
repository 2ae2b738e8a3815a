"""Rewards that compare a completion with the record's answer."""

from __future__ import annotations

import re

from bumblebee.rewards.passage import Passage
from bumblebee.rewards.reward import Record

_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


class ExactAnswer:
    r"""1 if the completion is the record's answer, ignoring surrounding whitespace, else 0.

    Args:
        key: of the answer in the record.
        within: regular expression of the passage to compare instead of the whole completion, such as
            ``<answer>(.*?)</answer>``; the last match counts, or its group. A completion without a match gets 0.
    """

    def __init__(self, key: str = "answer", within: str | None = None) -> None:
        self.key, self.passage = key, Passage(within)

    def __call__(self, prompts: list[str], completions: list[str], records: list[Record]) -> list[float]:
        answers = [str(answer_of(record, self.key)) for record in records]
        texts = [self.passage.of(completion) for completion in completions]
        return [float(text is not None and text.strip() == answer.strip()) for text, answer in zip(texts, answers, strict=True)]


class NumericAnswer:
    r"""1 if the last number in the completion equals the last number in the record's answer, else 0.

    Thousands may be separated by commas. A completion without a number gets 0.

    Args:
        key: of the answer in the record: a number, or a text that ends with one, as in GSM8K.
        tolerance: largest difference, relative to the answer.
        within: regular expression of the passage to compare instead of the whole completion, such as
            ``<answer>(.*?)</answer>``; the last match counts, or its group. A completion without a match gets 0.
    """

    def __init__(self, key: str = "answer", tolerance: float = 1e-6, within: str | None = None) -> None:
        if not tolerance >= 0:
            raise ValueError(f"tolerance must be at least 0, got {tolerance}")
        self.key, self.tolerance, self.passage = key, tolerance, Passage(within)

    def __call__(self, prompts: list[str], completions: list[str], records: list[Record]) -> list[float]:
        return [self._score(text, record) for text, record in zip(completions, records, strict=True)]

    def _score(self, completion: str, record: Record) -> float:
        given, expected = last_number(self.passage.of(completion) or ""), last_number(str(answer_of(record, self.key)))
        if expected is None:
            raise ValueError(f"the record's {self.key!r} has no number: {record[self.key]!r}")
        return float(given is not None and abs(given - expected) <= self.tolerance * max(abs(expected), 1.0))


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
