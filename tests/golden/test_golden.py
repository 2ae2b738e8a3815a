"""Training reproduces the golden losses to the printed digit."""

from __future__ import annotations

from pathlib import Path

import pytest
from golden import RUNS, lines


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if "bf16" in name else []) for name in RUNS])
def test_losses_equal_the_golden_losses(name: str) -> None:
    golden = (Path(__file__).parent / f"{name}.txt").read_text().splitlines()
    for line, golden_line in zip(lines(name), golden, strict=True):
        step, *numbers = (float(word) for word in line.split())
        golden_step, *expected = (float(word) for word in golden_line.split())
        assert step == golden_step
        # The sixth digit may round the other way on another processor; bf16 sums differ in their third.
        assert numbers == pytest.approx(expected, rel=2e-6 if "fp32" in name else 2e-3), f"{name}, step {step:g}"
