"""``bumblebee verify`` on two ranks: it passes, finds what only ranks can get wrong, and never hangs when one of them fails."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers.processes import finish, run_command, start
from helpers.verify_rows import ATTENTION, CURVE, LOSS, RESUME, STEP, results

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("launcher", "stage"), [("torchrun", "1"), ("deepspeed", "2"), ("torchrun", "3")])
def test_it_passes(launcher, stage, tmp_path):
    done = run_command("verify", "--folder", str(tmp_path), "--zero_stage", stage, ranks=2, launcher=launcher, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("all passed") == 1 and "all-reduce" in results(done.stdout)
    assert list(tmp_path.iterdir()) == []


def faulty(fault: str, folder: Path) -> tuple[dict[str, str], str]:
    """Results and output of a run with a planted fault."""
    script = str(Path(__file__).parents[1] / "helpers" / "planted_faults.py")
    done = finish(start([script, fault, "--precision", "fp32", "--folder", str(folder)], ranks=2), 280)
    assert done.returncode == 1, done.stdout + done.stderr[-3000:]
    assert list(folder.iterdir()) == []
    return results(done.stdout), " ".join(done.stdout.split())


@pytest.mark.parametrize("fault", ["counts_of_one_rank", "averaged_once_too_often"])
def test_gradients_that_are_averaged_wrongly_over_ranks_are_found(fault, tmp_path):
    rows, printed = faulty(fault, tmp_path)
    assert rows == {ATTENTION: "pass", LOSS: "pass", STEP: "FAIL", CURVE: "FAIL", RESUME: "pass"}
    assert "do not trust runs with several ranks" in printed


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("one_rank_breaks", "rank 1: RuntimeError: uncorrectable ECC error"),
        ("one_rank_hangs", r"rank 1 is still in .*hangs \(faults\.py"),
        ("one_rank_dies", "stage and precision not run"),
    ],
)
def test_a_rank_that_fails_alone_ends_the_verification_and_the_report_tells(fault, told, tmp_path):
    rows, printed = faulty(fault, tmp_path)
    assert rows == {ATTENTION: "pass", LOSS: "pass", STEP: "FAIL", CURVE: "not run", RESUME: "not run"}
    assert re.search(told, printed)


def test_an_error_on_all_ranks_does_not_keep_the_others_from_running(tmp_path):
    rows, printed = faulty("every_step_breaks", tmp_path)
    assert rows == {ATTENTION: "pass", LOSS: "pass", STEP: "FAIL", CURVE: "FAIL", RESUME: "FAIL"}
    assert printed.count("RuntimeError: out of memory") == 3
