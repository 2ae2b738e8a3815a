"""What several ranks have found becomes one row: the worst measure, the earliest error."""

from __future__ import annotations

import json
import math

from bumblebee.verify.check_result import Finding, Measure


def found(*values: float, bound: float | None = 1.0, **others) -> list[Finding]:
    return [Finding((Measure("x", value, bound),), seconds=rank + 1.0, **others) for rank, value in enumerate(values)]


def test_of_errors_the_largest_counts_and_of_rates_the_slowest():
    assert Finding.joined(found(0.1, 2.0, 0.3)).measures[0].value == 2.0
    assert Finding.joined(found(10.0, 2.0, 30.0, bound=None)).measures[0].value == 2.0


def test_a_value_that_is_no_number_is_the_worst_and_fails():
    joined = Finding.joined(found(0.1, math.nan, 5.0))
    assert math.isnan(joined.measures[0].value) and not joined.passed


def test_a_value_at_its_bound_passes_and_one_above_fails():
    assert Finding.joined(found(1.0)).passed and not Finding.joined(found(1.0, 1.0000001)).passed
    assert Finding.joined(found(0.0, bound=0.0)).passed and not Finding.joined(found(1.0, bound=0.0)).passed


def test_a_rate_is_never_judged():
    joined = Finding.joined(found(0.0, bound=None))
    assert joined.passed and not joined.judged


def test_of_several_errors_the_earliest_is_shown_with_its_rank():
    findings = [Finding(error="connection closed", ended=7.0), Finding(error="out of memory", ended=5.0), *found(0.1)]
    assert Finding.joined(findings).error == "rank 1: out of memory"
    assert Finding.joined([Finding(error="out of memory")]).error == "out of memory"


def test_a_finding_goes_through_json_unchanged():
    finding = Finding((Measure("x", 0.25, 1.0, "s"), Measure("y", 3.0)), 2.0, None, "a note", 17.0)
    assert Finding.from_json(json.loads(json.dumps(finding.to_json()))) == finding
