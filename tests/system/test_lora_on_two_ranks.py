"""LoRA on two ranks: every stage saves complete adapters, resumes byte-identically, and resumes at other stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.processes import run_jobs
from helpers.training_runs import adapter_bytes, small_model, train
from safetensors.torch import load_file

STAGES = range(4)
TOTAL, CUT = 6, 3
ROUNDING = 1e-5


def job(folder: Path, base: Path, ranks: int, stage: int, **changes: Any) -> dict[str, Any]:
    """A job with four samples per step on any number of ranks."""
    lora = {"rank": 4, "alpha": 8, "dropout": changes.pop("dropout", 0.0), "dora": changes.pop("dora", False)}
    save = {"checkpoint": ("Checkpoint", {"every": CUT, "keep": None})}
    adam = ("AdamW", {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-4})
    common = {"folder": str(folder), "base": str(base), "lora": lora, "zero_stage": stage, "callbacks": save, "optimizer": adam}
    return {**common, "micro_batch_size": 1, "accumulate": 4 // ranks, "max_steps": TOTAL, **changes}


def distance(first: Path, second: Path) -> float:
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    assert a.keys() == b.keys() and all(tensor.numel() for tensor in a.values())
    return max(float((a[name].float() - b[name].float()).abs().max()) for name in b)


@pytest.mark.slow
def test_two_ranks_save_and_resume_adapters_exactly(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path / "base")
    base = tmp_path / "base"
    run = {"base": base, "ranks": 2}
    noisy: dict[str, Any] = {"dropout": 0.2, "precision": "bf16"}
    jobs = [job(tmp_path / f"{stage}", stage=stage, **run) for stage in STAGES]
    jobs += [job(tmp_path / f"dora-{stage}", stage=stage, dora=True, **run) for stage in (1, 3)]
    jobs += [job(tmp_path / f"noisy-{stage}", stage=stage, **noisy, **run) for stage in STAGES]
    for stage in STAGES:
        checkpoint = str(tmp_path / f"noisy-{stage}" / f"checkpoint-{CUT}")
        jobs.append(job(tmp_path / f"noisy-again-{stage}", stage=stage, resume=checkpoint, **noisy, **run))
    pairs = [(0, 3), (3, 0), (3, 1), (1, 2), (2, 3)]
    for saved, to in pairs:
        checkpoint = str(tmp_path / f"{saved}" / f"checkpoint-{CUT}")
        jobs.append(job(tmp_path / f"{saved}-{to}", stage=to, resume=checkpoint, **run))
    jobs.append(job(tmp_path / "on-top", stage=3, **{**run, "base": tmp_path / "dora-3"}))
    assert not [result for result in run_jobs(jobs, 2, tmp_path) if "error" in result]

    train(**job(tmp_path / "one", base, 1, 0))
    train(**job(tmp_path / "one-dora", base, 1, 0, dora=True))
    train(**job(tmp_path / "one-on-top", tmp_path / "one-dora", 1, 0))
    for stage in STAGES:
        assert distance(tmp_path / f"{stage}", tmp_path / "one") < ROUNDING, stage
        assert adapter_bytes(tmp_path / f"noisy-again-{stage}") == adapter_bytes(tmp_path / f"noisy-{stage}"), stage
        train(**job(tmp_path / f"two-to-one-{stage}", base, 1, stage, resume=str(tmp_path / f"{stage}" / f"checkpoint-{CUT}")))
        assert distance(tmp_path / f"two-to-one-{stage}", tmp_path / "one") < ROUNDING, stage
    for stage in (1, 3):
        assert distance(tmp_path / f"dora-{stage}", tmp_path / "one-dora") < ROUNDING, stage
    for saved, to in pairs:
        assert distance(tmp_path / f"{saved}-{to}", tmp_path / "one") < ROUNDING, (saved, to)
    assert distance(tmp_path / "on-top", tmp_path / "one-on-top") < ROUNDING
