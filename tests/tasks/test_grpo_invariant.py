"""GRPO with ``batch_invariant``: log-probabilities of sampler and training are equal bit for bit, on any ranks and stages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.processes import run_jobs
from helpers.training_runs import small_model, train

from bumblebee.rl.invariance import check_invariant_run
from bumblebee.transforms import Compile

SLOW = pytest.mark.slow
MODEL = {"vocab_size": 320, "initializer_range": 0.3}
JOB: dict[str, Any] = {"data": ("Questions", {}), "model": MODEL, "max_steps": 3, "optimizer": ("AdamW", {"lr": 1e-3})}


def invariant(enabled: bool = True, **options: Any) -> tuple[str, dict[str, Any]]:
    return "RewardedGRPO", {"batch_invariant": enabled, "max_new_tokens": 9, **options}


@pytest.mark.parametrize(
    "run",
    [
        {},
        {"zero_stage": 3, "model": {**MODEL, "attention_bias": True}},
        pytest.param({"zero_stage": 1, "task": invariant(steps_per_rollout=2)}, marks=SLOW),
        pytest.param({"zero_stage": 2, "precision": "bf16"}, marks=SLOW),
        pytest.param({"zero_stage": 3, "precision": "bf16"}, marks=SLOW),
    ],
    ids=str,
)
def test_sampler_and_training_agree_bit_for_bit(run, tmp_path):
    lines = train(tmp_path, **{**JOB, "task": invariant(), **run})
    assert [line["rl/logprob_drift"] for line in lines] == [0.0] * 3
    assert all(line["grad_norm"] > 0 for line in lines)


@pytest.mark.slow
def test_without_it_they_differ(tmp_path):
    assert all(0 < line["rl/logprob_drift"] < 1e-4 for line in train(tmp_path, **{**JOB, "task": invariant(False)}))


@pytest.mark.slow
def test_adapters_agree_bit_for_bit(tmp_path):
    small_model(**MODEL).save_pretrained(tmp_path / "base")
    adapted = {"base": str(tmp_path / "base"), "lora": {"rank": 4, "alpha": 64, "dropout": 0.0}, "task": invariant()}
    lines = train(tmp_path / "run", **{**{name: JOB[name] for name in ("data", "max_steps", "optimizer")}, **adapted})
    assert [line["rl/logprob_drift"] for line in lines] == [0.0] * 3


@pytest.mark.slow
def test_two_ranks_agree_bit_for_bit(tmp_path):
    job = {**JOB, "task": invariant(), "micro_batch_size": 1}
    jobs = [{**job, "folder": str(tmp_path / f"{stage}"), "zero_stage": stage} for stage in (1, 3)]
    for result in run_jobs(jobs, 2, tmp_path):
        assert [line["rl/logprob_drift"] for line in result["metrics"]] == [0.0] * 3


@pytest.mark.parametrize(
    ("device", "precision", "stage", "message"),
    [
        ("cuda", "bf16", 1, "computes on a CPU only, and this run on cuda"),
        ("cpu", "bf16", 0, "needs trainer.precision fp32, or bf16 at zero_stage 1 to 3; got bf16 at zero_stage 0"),
        ("cpu", "fp16", 2, "got fp16 at zero_stage 2"),
    ],
)
def test_other_devices_and_precisions_are_refused(device, precision, stage, message):
    with pytest.raises(ValueError, match=message):
        check_invariant_run(torch.device(device), precision, stage)


def test_compiled_blocks_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"task.batch_invariant: does not support compiled blocks, such as model.layers.0"):
        train(tmp_path, **{**JOB, "task": invariant(transforms=[Compile()])})


def test_attention_dropout_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"task.batch_invariant: does not support attention_dropout, which is 0.1"):
        train(tmp_path, **{**JOB, "task": invariant(), "model": {**MODEL, "attention_dropout": 0.1}})
