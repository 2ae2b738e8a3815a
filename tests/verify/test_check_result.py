"""Merging the results of several ranks: the worst measurement, the earliest error."""

from __future__ import annotations

import math

from bumblebee.verify.check_result import CheckResult, Measurement


def results(*values: float, bound: float | None = 1.0) -> list[CheckResult]:
    return [CheckResult((Measurement("x", value, bound),), seconds=rank + 1.0) for rank, value in enumerate(values)]


def test_merge_keeps_the_largest_error_and_the_slowest_throughput():
    assert CheckResult.merge(results(0.1, 2.0, 0.3)).measurements[0].value == 2.0
    assert CheckResult.merge(results(10.0, 2.0, 30.0, bound=None)).measurements[0].value == 2.0


def test_nan_is_the_worst_value_and_fails():
    merged = CheckResult.merge(results(0.1, math.nan, 5.0))
    assert math.isnan(merged.measurements[0].value) and not merged.passed


def test_value_at_its_bound_passes_and_above_fails():
    assert CheckResult.merge(results(1.0)).passed and not CheckResult.merge(results(1.0, 1.0000001)).passed
    assert CheckResult.merge(results(0.0, bound=0.0)).passed and not CheckResult.merge(results(1.0, bound=0.0)).passed


def test_throughput_has_no_verdict():
    merged = CheckResult.merge(results(0.0, bound=None))
    assert merged.passed and not merged.has_verdict


def test_earliest_error_is_reported_with_its_rank():
    failed = [
        CheckResult(error="connection closed", finished_at=7.0),
        CheckResult(error="out of memory", finished_at=5.0),
        *results(0.1),
    ]
    assert CheckResult.merge(failed).error == "rank 1: out of memory"
    assert CheckResult.merge([CheckResult(error="out of memory")]).error == "out of memory"


def test_result_survives_json():
    measurements = (Measurement("x", 0.25, 1.0, "s"), Measurement("y", 3.0))
    result = CheckResult(measurements, "a note", None, seconds=2.0, finished_at=17.0)
    assert CheckResult.from_json(result.to_json()) == result
