"""Rewards for the form of a completion: its format and its length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from bumblebee.rewards.passage import compiled
from bumblebee.rewards.reward import InputReward, Record, RewardInput


class Matches:
    """1 if a regular expression is found in the completion, else 0; for formats such as ``<think>.*</think>``.

    Args:
        pattern: the expression; ``.`` also matches line breaks. ``^`` and ``$`` are the beginning and end of the completion.
    """

    def __init__(self, pattern: str) -> None:
        self.pattern = compiled("pattern", pattern)

    def __call__(self, prompts: list[str], completions: list[str], records: list[Record]) -> list[float]:
        return [float(bool(self.pattern.search(text))) for text in completions]


class Brevity(InputReward):
    """0 up to a length, then falling linearly to -1, as the overlong penalty of DAPO (arXiv 2503.14476, equation 13).

    Args:
        free: length without a penalty.
        limit: length from which on the reward is -1.
        unit: of the lengths: characters or tokens. DAPO's are tokens.
    """

    def __init__(self, free: int, limit: int, unit: Literal["characters", "tokens"] = "characters") -> None:
        if not 0 <= free < limit:
            raise ValueError(f"free must be at least 0 and less than limit, got free {free} and limit {limit}")
        self.free, self.limit, self.unit = free, limit, unit

    def score(self, inputs: Sequence[RewardInput]) -> list[float]:
        """See the class."""
        return [-min(max(self._length(each) - self.free, 0) / (self.limit - self.free), 1.0) for each in inputs]

    def _length(self, each: RewardInput) -> int:
        if self.unit == "characters":
            return len(each.completion)
        if each.tokens is None:
            raise ValueError("unit tokens needs the number of tokens, which calls with texts and records do not have")
        return each.tokens
