"""``bumblebee verify`` on two ranks: passes, detects multi-rank faults, and does not hang when a single rank fails."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from helpers.processes import finish, run_command, start
from helpers.verify_rows import ATTENTION, CURVE, GRADIENT, LOSS, RESUME, statuses

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("launcher", "stage"), [("torchrun", "1"), ("deepspeed", "2"), ("torchrun", "3")])
def test_passes(launcher, stage, tmp_path):
    done = run_command("verify", "--folder", str(tmp_path), "--zero_stage", stage, ranks=2, launcher=launcher, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("all checks passed") == 1 and "all-reduce bandwidth" in statuses(done.stdout)
    assert json.loads((tmp_path / "verify.json").read_text())["hardware"]["ranks"] == 2
    assert [file.name for file in tmp_path.iterdir()] == ["verify.json"]


def run_with_fault(fault: str, folder: Path) -> tuple[dict[str, str], str]:
    """Statuses and output of a run with an injected fault."""
    script = str(Path(__file__).parents[1] / "helpers" / "planted_faults.py")
    done = finish(start([script, fault, "--precision", "fp32", "--folder", str(folder)], ranks=2), 280)
    assert done.returncode == 1, done.stdout + done.stderr[-3000:]
    assert {file.name for file in folder.iterdir()} <= {"verify.json"}  # none if the launcher ended a rank
    return statuses(done.stdout), " ".join(done.stdout.split())


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("one_rank_raises", "rank 1: RuntimeError: uncorrectable ECC error"),
        ("one_rank_hangs", r"rank 1 is still in hangs .*\(planted_faults\.py"),
        ("one_rank_dies", "loss curve not run"),
    ],
    ids=["raises", "hangs", "dies"],
)
def test_failure_of_a_single_rank_ends_with_a_report(fault, message, tmp_path):
    rows, printed = run_with_fault(fault, tmp_path)
    assert rows == {ATTENTION: "pass", LOSS: "pass", GRADIENT: "FAIL", CURVE: "not run", RESUME: "not run"}
    assert re.search(message, printed)


def test_checks_continue_after_an_error_on_all_ranks(tmp_path):
    rows, printed = run_with_fault("every_step_raises", tmp_path)
    assert rows == {ATTENTION: "pass", LOSS: "pass", GRADIENT: "FAIL", CURVE: "FAIL", RESUME: "FAIL"}
    assert printed.count("RuntimeError: out of memory") == 3
