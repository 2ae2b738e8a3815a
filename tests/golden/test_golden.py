"""A refactoring reproduces the golden losses to the printed digit."""

from __future__ import annotations

from pathlib import Path

import pytest
from golden import RUNS, lines


@pytest.mark.parametrize("name", RUNS)
def test_losses_equal_the_golden_losses(name: str) -> None:
    golden = (Path(__file__).parent / f"{name}.txt").read_text().splitlines()
    for ours, theirs in zip(lines(name), golden, strict=True):
        step, *numbers = (float(word) for word in ours.split())
        gold_step, *gold = (float(word) for word in theirs.split())
        assert step == gold_step
        # The sixth digit may round the other way on another processor; bf16 sums differ in their third.
        assert numbers == pytest.approx(gold, rel=2e-6 if "fp32" in name else 2e-3), f"{name}, step {step:g}"
