"""Each fault of the loop, the optimizer, checkpoints and methods is found on two ranks; some exist only there."""

from __future__ import annotations

import json

import pytest
from helpers.loop_faults import FAULTS, assert_named
from helpers.processes import TESTS, finish, start

from bumblebee.verify.check_result import CheckResult

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Results of all faults, planted in the same two processes one after another."""
    folder = tmp_path_factory.mktemp("two-ranks")
    done = finish(start([str(TESTS / "helpers" / "loop_faults.py"), str(folder)], ranks=2), 840)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads((folder / "results.json").read_text())


@pytest.mark.timeout(900)  # the first one waits for all of them, on cores that other tests share
@pytest.mark.parametrize("fault", [pytest.param(one, id=one.name) for one in FAULTS if 2 in one.ranks])
def test_fault_is_named_on_two_ranks(fault, two_ranks):
    reported = two_ranks[fault.name]
    assert_named(fault, CheckResult.from_json(reported["result"]), reported["line"])
