"""Each fault of the loop, the optimizer, checkpoints and methods fails the check that is about it."""

from __future__ import annotations

import pytest
from helpers.loop_faults import FAULTS, Runner, assert_named

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    return Runner(tmp_path_factory.mktemp("one-rank"))


@pytest.mark.parametrize("fault", [pytest.param(one, id=one.name) for one in FAULTS if 1 in one.ranks])
def test_fault_is_named_on_one_rank(fault, runner):
    assert_named(fault, *runner.run(fault))


def test_at_least_60_faults_are_planted():
    assert len({fault.plant for fault in FAULTS}) >= 60
