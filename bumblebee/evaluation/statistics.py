"""Estimates of metrics with their standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Estimate(NamedTuple):
    """A metric over samples.

    Args:
        value: the metric.
        stderr: its standard error; None for fewer than two samples.
    """

    value: float
    stderr: float | None


def mean(values: Sequence[float]) -> Estimate:
    """The mean, and s / sqrt(n) with the sample standard deviation s (Bessel's correction)."""
    count = len(values)
    average = math.fsum(values) / count
    if count < 2:
        return Estimate(average, None)
    variance = math.fsum((value - average) ** 2 for value in values) / (count - 1)
    return Estimate(average, math.sqrt(variance / count))


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """R = sum(x) / sum(y), such as a loss per token of samples that differ in length.

    Its standard error is that of the linearized ratio: s / (sqrt(n) mean(y)) with the standard deviation s of x - R y (Cochran,
    Sampling Techniques, section 6.5).
    """
    count, total = len(numerators), math.fsum(denominators)
    value = math.fsum(numerators) / total
    if count < 2:
        return Estimate(value, None)
    residuals = [x - value * y for x, y in zip(numerators, denominators, strict=True)]
    variance = math.fsum(residual**2 for residual in residuals) / (count - 1)
    return Estimate(value, math.sqrt(count * variance) / total)


def scaled(estimate: Estimate, value: float, slope: float) -> Estimate:
    """A function of an estimate: its value there, and its error by the slope there (the delta method)."""
    return Estimate(value, None if estimate.stderr is None else abs(slope) * estimate.stderr)
