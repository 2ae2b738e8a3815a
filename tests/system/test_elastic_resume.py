"""A checkpoint resumes on other ranks, at another ZeRO stage, in another precision, and ends where it would have ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.processes import run_jobs
from helpers.training_runs import train, weights

ADAM = ("AdamW", {"lr": 1e-2, "weight_decay": 0.1})
TOTAL, CUT = 6, 3
ROUNDING = 1e-5  # sums in another order, blown up by Adam where a gradient is next to zero; six steps move weights by 2e-2


def job(folder: Path, ranks: int, stage: int, **changes: Any) -> dict[str, Any]:
    """Four samples a step, however many ranks there are."""
    save = ("Checkpoint", {"every": CUT, "keep": None})
    common = {"folder": str(folder), "micro_batch_size": 1, "accumulate": 4 // ranks, "zero_stage": stage}
    return {**common, "max_steps": TOTAL, "optimizer": ADAM, "callbacks": {"checkpoint": save}, **changes}


def distance(ours: Path, theirs: Path) -> float:
    """The largest difference of a weight; k_proj.bias aside, whose true gradient is zero and whose updates are rounding."""
    a, b = weights(ours), weights(theirs)
    return max(float((a[name].float() - b[name].float()).abs().max()) for name in b if "k_proj.bias" not in name)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Uninterrupted runs: one rank at each stage, two ranks at each stage, all with a checkpoint in the middle."""
    folder = tmp_path_factory.mktemp("elastic")
    for stage in range(4):
        train(**job(folder / f"one-{stage}", 1, stage))
    run_jobs([job(folder / f"two-{stage}", 2, stage) for stage in range(4)], 2, folder)
    return folder


@pytest.mark.parametrize("to", range(4))
@pytest.mark.parametrize("saved", range(4))
def test_two_ranks_continue_on_one_at_any_stage(runs: Path, tmp_path: Path, saved: int, to: int) -> None:
    train(**job(tmp_path / "run", 1, to, resume=str(runs / f"two-{saved}" / f"checkpoint-{CUT}")))
    assert distance(tmp_path / "run", runs / f"two-{saved}") < ROUNDING


def test_one_rank_continues_on_two_at_any_stage(runs: Path, tmp_path: Path) -> None:
    pairs = [(saved, to) for saved in range(4) for to in range(4)]
    source = {saved: str(runs / f"one-{saved}" / f"checkpoint-{CUT}") for saved in range(4)}
    jobs = [job(tmp_path / f"{saved}-{to}", 2, to, resume=source[saved]) for saved, to in pairs]
    assert not [result for result in run_jobs(jobs, 2, tmp_path) if "error" in result]
    for saved, to in pairs:
        assert distance(tmp_path / f"{saved}-{to}", runs / f"one-{saved}") < ROUNDING, f"from stage {saved} to {to}"


@pytest.mark.parametrize(("saved", "to"), [("bf16", "fp32"), ("fp32", "bf16")])
def test_another_precision_continues_from_the_fp32_weights(tmp_path: Path, saved: str, to: str) -> None:
    train(**job(tmp_path / "whole", 1, 1))
    train(**job(tmp_path / "first", 1, 1, precision=saved))
    train(**job(tmp_path / "then", 1, 2, precision=to, resume=str(tmp_path / "first" / f"checkpoint-{CUT}")))
    whole, then, before = (weights(tmp_path / f) for f in ("whole", "then", f"whole/checkpoint-{CUT}"))
    moved = sum(float((whole[name] - before[name]).abs().sum()) for name in whole)
    apart = sum(float((whole[name] - then[name].float()).abs().sum()) for name in whole)
    assert 0 < apart < 0.3 * moved  # bf16 rounds, but it is the same road


def test_a_larger_batch_continues_without_using_a_sample_twice(tmp_path: Path) -> None:
    train(**job(tmp_path / "first", 1, 1))
    resume = str(tmp_path / "first" / f"checkpoint-{CUT}")
    metrics = train(**job(tmp_path / "then", 1, 1, accumulate=5, max_steps=None, epochs=1.0, resume=resume))
    # 22 samples: 12 are used when the first run is cut, the other 10 make two steps of five.
    assert [line["step"] for line in metrics[-2:]] == [4, 5]
    assert metrics[-1]["epoch"] == 1.0
