"""Resuming with another number of ranks, ZeRO stage or precision ends where the uninterrupted run ends.

Stages 0 and 3 are in the fast suite, all other pairs of stages in the slow suite.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.processes import run_jobs
from helpers.training_runs import train, weights

ADAM = ("AdamW", {"lr": 1e-2, "weight_decay": 0.1})
TOTAL, CUT = 6, 3
ROUNDING = 1e-5  # another order of sums, amplified by Adam where a gradient is close to zero; six steps move weights by 2e-2
FAST, SLOW = (0, 3), (1, 2)
FAST_PAIRS = [(saved, to) for saved in FAST for to in FAST]
SLOW_PAIRS = [(saved, to) for saved in range(4) for to in range(4) if {saved, to} & set(SLOW)]
PAIRS = [*FAST_PAIRS, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW_PAIRS)]


def job(folder: Path, ranks: int, stage: int, **changes: Any) -> dict[str, Any]:
    """A run with four samples per step at any number of ranks."""
    save = ("Checkpoint", {"every": CUT, "keep": None})
    common = {"folder": str(folder), "micro_batch_size": 1, "accumulate": 4 // ranks, "zero_stage": stage}
    return {**common, "max_steps": TOTAL, "optimizer": ADAM, "callbacks": {"checkpoint": save}, **changes}


def distance(folder: Path, other: Path) -> float:
    """The largest difference of a weight, except k_proj.bias, whose true gradient is zero and whose updates are rounding."""
    a, b = weights(folder), weights(other)
    return max(float((a[name].float() - b[name].float()).abs().max()) for name in b if "k_proj.bias" not in name)


def uninterrupted(folder: Path, stages: tuple[int, ...]) -> Path:
    """Uninterrupted runs of one and of two ranks at each stage, with a checkpoint in the middle."""
    for stage in stages:
        train(**job(folder / f"one-{stage}", 1, stage))
    jobs_folder = folder / f"jobs-{stages[0]}"  # one per call: the ranks' stores must not be reused
    jobs_folder.mkdir()
    run_jobs([job(folder / f"two-{stage}", 2, stage) for stage in stages], 2, jobs_folder)
    return folder


def resume_on_two_ranks(runs: Path, folder: Path, pairs: list[tuple[int, int]]) -> None:
    """Resume runs of one rank on two, and compare with the uninterrupted run."""
    source = {saved: str(runs / f"one-{saved}" / f"checkpoint-{CUT}") for saved, _ in pairs}
    jobs = [job(folder / f"{saved}-{to}", 2, to, resume=source[saved]) for saved, to in pairs]
    assert not [result for result in run_jobs(jobs, 2, folder) if "error" in result]
    for saved, to in pairs:
        assert distance(folder / f"{saved}-{to}", runs / f"one-{saved}") < ROUNDING, f"from stage {saved} to {to}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uninterrupted(tmp_path_factory.mktemp("elastic"), FAST)


@pytest.fixture(scope="module")
def all_runs(runs: Path) -> Path:
    return uninterrupted(runs, SLOW)


@pytest.mark.parametrize(("saved", "to"), PAIRS)
def test_one_rank_resumes_a_run_of_two(saved: int, to: int, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    runs = request.getfixturevalue("runs" if (saved, to) in FAST_PAIRS else "all_runs")
    train(**job(tmp_path / "run", 1, to, resume=str(runs / f"two-{saved}" / f"checkpoint-{CUT}")))
    assert distance(tmp_path / "run", runs / f"two-{saved}") < ROUNDING


def test_two_ranks_resume_a_run_of_one(runs: Path, tmp_path: Path) -> None:
    resume_on_two_ranks(runs, tmp_path, FAST_PAIRS)


@pytest.mark.slow
def test_two_ranks_resume_a_run_of_one_at_other_stages(all_runs: Path, tmp_path: Path) -> None:
    resume_on_two_ranks(all_runs, tmp_path, SLOW_PAIRS)


@pytest.mark.parametrize(("saved", "to"), [("bf16", "fp32"), ("fp32", "bf16")])
def test_another_precision_resumes_from_the_fp32_weights(tmp_path: Path, saved: str, to: str) -> None:
    train(**job(tmp_path / "whole", 1, 1))
    train(**job(tmp_path / "first", 1, 1, precision=saved))
    train(**job(tmp_path / "then", 1, 2, precision=to, resume=str(tmp_path / "first" / f"checkpoint-{CUT}")))
    whole, then, before = (weights(tmp_path / f) for f in ("whole", "then", f"whole/checkpoint-{CUT}"))
    moved = sum(float((whole[name] - before[name]).abs().sum()) for name in whole)
    difference = sum(float((whole[name] - then[name].float()).abs().sum()) for name in whole)
    assert 0 < difference < 0.3 * moved  # bf16 rounds, but learns the same


def test_a_larger_batch_resumes_without_repeating_samples(tmp_path: Path) -> None:
    train(**job(tmp_path / "first", 1, 1))
    resume = str(tmp_path / "first" / f"checkpoint-{CUT}")
    metrics = train(**job(tmp_path / "then", 1, 1, accumulate=5, max_steps=None, epochs=1.0, resume=resume))
    # 22 samples: 12 are used when the first run is cut, the other 10 make two steps of five.
    assert [line["step"] for line in metrics[-2:]] == [4, 5]
    assert metrics[-1]["epoch"] == 1.0
