"""Resuming with another number of ranks, ZeRO stage or precision ends where the uninterrupted run ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.processes import run_jobs
from helpers.training_runs import train, weights

pytestmark = pytest.mark.slow

ADAM = ("AdamW", {"lr": 1e-2, "weight_decay": 0.1})
TOTAL, CUT = 6, 3
ROUNDING = 1e-5  # another order of sums, amplified by Adam where a gradient is close to zero; six steps move weights by 2e-2
STAGES = range(4)
PAIRS = [(saved, to) for saved in STAGES for to in STAGES]


def job(folder: Path, ranks: int, stage: int, **changes: Any) -> dict[str, Any]:
    """A run with four samples per step at any number of ranks."""
    save = ("Checkpoint", {"every": CUT, "keep": None})
    common = {"folder": str(folder), "micro_batch_size": 1, "accumulate": 4 // ranks, "zero_stage": stage}
    return {**common, "max_steps": TOTAL, "optimizer": ADAM, "callbacks": {"checkpoint": save}, **changes}


def distance(folder: Path, other: Path) -> float:
    """The largest difference of a weight, except k_proj.bias, whose true gradient is zero and whose updates are rounding."""
    a, b = weights(folder), weights(other)
    return max(float((a[name].float() - b[name].float()).abs().max()) for name in b if "k_proj.bias" not in name)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Uninterrupted runs of one and of two ranks at each stage, with a checkpoint in the middle."""
    folder = tmp_path_factory.mktemp("elastic")
    for stage in STAGES:
        train(**job(folder / f"one-{stage}", 1, stage))
    run_jobs([job(folder / f"two-{stage}", 2, stage) for stage in STAGES], 2, folder)
    return folder


@pytest.mark.parametrize(("saved", "to"), PAIRS)
def test_one_rank_resumes_a_run_of_two(saved: int, to: int, runs: Path, tmp_path: Path) -> None:
    train(**job(tmp_path / "run", 1, to, resume=str(runs / f"two-{saved}" / f"checkpoint-{CUT}")))
    assert distance(tmp_path / "run", runs / f"two-{saved}") < ROUNDING


def test_two_ranks_resume_a_run_of_one(runs: Path, tmp_path: Path) -> None:
    source = {saved: str(runs / f"one-{saved}" / f"checkpoint-{CUT}") for saved in STAGES}
    jobs = [job(tmp_path / f"{saved}-{to}", 2, to, resume=source[saved]) for saved, to in PAIRS]
    assert not [result for result in run_jobs(jobs, 2, tmp_path) if "error" in result]
    for saved, to in PAIRS:
        assert distance(tmp_path / f"{saved}-{to}", runs / f"one-{saved}") < ROUNDING, f"from stage {saved} to {to}"


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
