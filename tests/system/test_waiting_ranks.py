"""Ranks that wait for another one's work wait as long as it takes, and not for ever where it fails."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from helpers.processes import TESTS, finish, start


@pytest.mark.slow
def test_ranks_outwait_the_timeout_and_learn_of_a_failure(tmp_path: Path) -> None:
    done = finish(start([str(TESTS / "helpers" / "waiting_ranks.py"), str(tmp_path)], ranks=2), timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (ast.literal_eval((tmp_path / f"rank-{rank}").read_text()) for rank in (0, 1))
    assert first == [(True, "complete"), ("ValueError", "no such file"), (True, "again")]
    assert second[0] == (False, "complete") and second[2] == (False, "again")
    assert second[1][0] == "OtherRankFailed" and "preparing shared files" in second[1][1]
