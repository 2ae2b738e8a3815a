"""PassRates: a curriculum of prompts by how often a model solves them.

A prompt that is always or never solved teaches nothing: all rewards of its group are equal. Leaving such prompts out saves
their completions; Skywork-OR1 does so before training (arXiv 2505.22312), DAPO while sampling (arXiv 2503.14476).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np

from bumblebee.utils.formatting import number
from datamodules.records import json_type


class Rated(Protocol):
    """A sample with a record and its origin."""

    @property
    def record(self) -> dict[str, object]: ...
    @property
    def place(self) -> str: ...


Sample = TypeVar("Sample", bound=Rated)


class PassRates:
    """Selects samples whose pass rate lies in a range. Those without a rate are kept.

    Args:
        key: of the rate in a record; None selects all.
        lowest: smallest rate.
        highest: largest rate.

    Raises:
        ValueError: the range is not within 0 and 1, or limits nothing that has a key.
    """

    def __init__(self, key: str | None, lowest: float, highest: float) -> None:
        if not 0 <= lowest <= highest <= 1:
            raise ValueError(f"min_pass_rate and max_pass_rate must be in [0, 1] in this order, got {lowest} and {highest}")
        if key is None and (lowest > 0 or highest < 1):
            raise ValueError("min_pass_rate and max_pass_rate need pass_rate_key, the key of the rate in the records")
        self.key, self.lowest, self.highest = key, lowest, highest
        self.too_hard = self.too_easy = self.unrated = 0

    def select(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples in the range, and the count of others.

        Raises:
            ValueError: a rate is not a number from 0 to 1, no sample has a rate, or none is left.
        """
        if self.key is None:
            return list(samples)
        rates = [self._rate(self.key, sample) for sample in samples]
        self.unrated = sum(rate is None for rate in rates)
        if self.unrated == len(samples):
            raise ValueError(f"pass_rate_key: no record has the key {self.key!r}; bumblebee rollouts --pass_rates writes rates")
        self.too_hard = sum(rate is not None and rate < self.lowest for rate in rates)
        self.too_easy = sum(rate is not None and rate > self.highest for rate in rates)
        pairs = zip(samples, rates, strict=True)
        selected = [sample for sample, rate in pairs if rate is None or self.lowest <= rate <= self.highest]
        if not selected:
            raise ValueError(
                f"min_pass_rate, max_pass_rate: none of {len(samples)} prompts is in [{self.lowest}, {self.highest}]"
            )
        return selected

    def rates(self, samples: Sequence[Rated]) -> np.ndarray:
        """Pass rate of each sample, (samples,) float64; -1 for those without a rate."""
        rates = [None if self.key is None else self._rate(self.key, sample) for sample in samples]
        return np.array([-1.0 if rate is None else rate for rate in rates])

    def _rate(self, key: str, sample: Rated) -> float | None:
        value = sample.record.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{sample.place}: {key!r} must be a number from 0 to 1, not {json_type(value)}")
        if not 0 <= value <= 1:
            raise ValueError(f"{sample.place}: {key!r} must be from 0 to 1, got {value}")
        return float(value)

    def summary(self) -> dict[str, object]:
        """Counts, for the data's summary."""
        if self.key is None:
            return {}
        lines: dict[str, object] = {}
        if self.lowest > 0:
            lines[f"pass rate below {self.lowest:g}"] = f"{number(self.too_hard)} left out"
        if self.highest < 1:
            lines[f"pass rate above {self.highest:g}"] = f"{number(self.too_easy)} left out"
        if self.unrated:
            lines["without a pass rate"] = f"{number(self.unrated)} kept"
        return lines
