"""Each fault of the loop, the optimizer, checkpoints and methods fails the check that is about it, on one and on two ranks."""

from __future__ import annotations

import json

import pytest
from helpers.loop_faults import FAULTS, Fault, Runner
from helpers.processes import TESTS, finish, start

from bumblebee.verify import check
from bumblebee.verify.check_result import CheckResult

pytestmark = pytest.mark.slow


def cases(ranks: int) -> list[object]:
    return [pytest.param(fault, id=fault.name) for fault in FAULTS if ranks in fault.ranks]


def assert_named(fault: Fault, result: CheckResult, line: str) -> None:
    """The check fails, and the report names what is above its bound and what not to rely on."""
    failed = tuple(measurement.name for measurement in result.measurements if not measurement.passed)
    assert not result.passed, [str(measurement) for measurement in result.measurements]
    assert fault.measurements in ((), failed)
    consequence = next(one.consequence for one in check.CHECKS if one.name == fault.check)
    assert line.startswith(f"FAIL {fault.check}: ") and line.endswith(consequence)
    assert all(name in line for name in failed)


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    return Runner(tmp_path_factory.mktemp("one-rank"))


@pytest.mark.parametrize("fault", cases(1))
def test_fault_is_named_on_one_rank(fault, runner):
    assert_named(fault, *runner.run(fault))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Results of all faults, planted in the same two processes one after another."""
    folder = tmp_path_factory.mktemp("two-ranks")
    done = finish(start([str(TESTS / "helpers" / "loop_faults.py"), str(folder)], ranks=2), 600)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("fault", cases(2))
def test_fault_is_named_on_two_ranks(fault, two_ranks):
    reported = two_ranks[fault.name]
    assert_named(fault, CheckResult.from_json(reported["result"]), reported["line"])


def test_at_least_60_faults_are_planted():
    assert len({fault.plant for fault in FAULTS}) >= 60
