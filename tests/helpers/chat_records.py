"""Distinct conversations and preference pairs of realistic lengths, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

WORDS = "the a list file return value tuple dict string raises if is None and not of to".split()


def conversations(count: int, longest: int = 60, seed: int = 0) -> list[dict[str, Any]]:
    """Distinct conversations of one to three turns, with answers of one to ``longest`` words."""
    random = np.random.default_rng(seed)

    def words(most: int) -> str:
        return " ".join(random.choice(WORDS, random.integers(1, most)))

    records = []
    for number in range(count):
        messages = []
        for turn in range(random.integers(1, 4)):
            messages.append({"role": "user", "content": f"question {number}.{turn}: {words(12)}"})
            messages.append({"role": "assistant", "content": f"{words(longest)} {number}.{turn}"})
        records.append({"messages": messages})
    return records


def preferences(count: int, longest: int = 40, seed: int = 0) -> list[dict[str, Any]]:
    """Distinct pairs with prompts and answers of different lengths."""
    random = np.random.default_rng(seed)

    def words(most: int) -> str:
        return " ".join(random.choice(WORDS, random.integers(1, most)))

    return [
        {
            "messages": [{"role": "user", "content": f"question {number}: {words(longest)}"}],
            "chosen": {"role": "assistant", "content": f"good {words(longest)} {number}"},
            "rejected": {"role": "assistant", "content": f"bad {words(longest)} {number}"},
        }
        for number in range(count)
    ]


def write(path: Path, records: list[dict[str, Any]]) -> str:
    """Write JSON Lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)
