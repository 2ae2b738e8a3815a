"""Two ranks train a mixture of experts like one process, at all ZeRO stages, with router losses and bias."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.processes import run_jobs
from helpers.training_runs import train, weight_bytes, weights

pytestmark = pytest.mark.slow

MODEL: dict[str, Any] = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [0], "num_hidden_layers": 3,
    "router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.01, "router_bias_update_rate": 0.01, "n_shared_experts": 1,
}  # fmt: skip
RUN: dict[str, Any] = {"model": MODEL, "max_steps": 6, "data": {"samples": 22, "targets": [16, 1, 7, 0, 12]}}
EACH = {"checkpoint": ("Checkpoint", {"every": 2, "keep": None})}
# With one row for each rank and so many experts that most have no token on a rank: nothing may wait for them.
LONELY: dict[str, Any] = {
    "model": {**MODEL, "num_experts": 16, "num_experts_per_tok": 1}, "max_steps": 2, "micro_batch_size": 1, "accumulate": 1,
    "data": {"samples": 8, "targets": [1, 0]},
}  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same run in one process, each step in one micro-batch."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, train(folder, zero_stage=0, micro_batch_size=8, accumulate=1, **RUN)


@pytest.fixture(scope="module")
def adapting(alone):
    """LoRA on the experts of the model that was trained alone."""
    lora = {"rank": 2, "alpha": 4, "dropout": 0.0, "experts": True}
    return {"base": str(alone[0]), "lora": lora, "max_steps": 4, "data": RUN["data"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, adapting):
    root = tmp_path_factory.mktemp("ranks")
    stop = {**EACH, "stop": ("StopAfter", {"step": 3, "rank": 1})}
    jobs = {
        **{f"stage-{stage}": {"zero_stage": stage, **RUN} for stage in (0, 1, 2, 3)},
        **{f"lonely-{stage}": {"zero_stage": stage, **LONELY} for stage in (1, 3)},
        **{f"adapters-{stage}": {"zero_stage": stage, **adapting} for stage in (1, 3)},
        "bf16": {"zero_stage": 3, "precision": "bf16", "building": True, **RUN},
        **{f"whole-{stage}": {"zero_stage": stage, "callbacks": EACH, **RUN} for stage in (1, 3)},
        **{f"until-{stage}": {"zero_stage": stage, "callbacks": stop, "folder": f"pieces-{stage}", **RUN} for stage in (1, 3)},
        **{f"pieces-{stage}": {"zero_stage": stage, "callbacks": EACH, "resume": "auto", **RUN} for stage in (1, 3)},
    }
    named = [{**job, "folder": str(root / job.get("folder", name))} for name, job in jobs.items()]
    return root, dict(zip(jobs, run_jobs(named, 2, root, 280), strict=True))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_train_like_one_process(stage, runs, alone):
    (root, results), (folder, lines) = runs, alone
    for line, wanted in zip(results[f"stage-{stage}"]["metrics"], lines, strict=True):
        assert line.keys() == wanted.keys()
        for name, value in wanted.items():
            assert math.isclose(line[name], value, rel_tol=1e-5, abs_tol=1e-6), (line["step"], name)
    actual = weights(root / f"stage-{stage}")
    for name, tensor in weights(folder).items():
        if not name.endswith("k_proj.bias"):  # its true gradient is zero; Adam blows rounding up to whole steps
            torch.testing.assert_close(actual[name], tensor, rtol=0, atol=1e-4, msg=lambda text, n=name: f"{n} {text}")
    biases = [tensor for name, tensor in actual.items() if name.endswith("e_score_correction_bias")]
    assert len(biases) == 2 and 0.01 <= max(bias.abs().max() for bias in biases) <= 0.061


def test_updates_of_experts_are_trained_like_in_one_process(runs, adapting, tmp_path):
    wanted = train(tmp_path, zero_stage=0, micro_batch_size=8, accumulate=1, **adapting)
    for stage in (1, 3):
        for line, expected in zip(runs[1][f"adapters-{stage}"]["metrics"], wanted, strict=True):
            assert line == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert runs[1]["adapters-3"]["metrics"][-1]["loss"] < runs[1]["adapters-3"]["metrics"][0]["loss"]


@pytest.mark.parametrize("stage", [1, 3])
def test_experts_without_a_token_on_a_rank_hold_nobody_up(stage, runs):
    assert [line["step"] for line in runs[1][f"lonely-{stage}"]["metrics"]] == [1, 2]


def test_in_bf16_the_bias_stays_in_fp32(runs):
    actual = weights(runs[0] / "bf16")
    assert actual["model.layers.1.mlp.experts.gate_up_proj"].dtype == torch.bfloat16
    bias = actual["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert bias.dtype == torch.float32
    torch.testing.assert_close((100 * bias).round(), 100 * bias, rtol=0, atol=1e-4)  # whole steps of 0.01


@pytest.mark.parametrize("stage", [1, 3])
def test_a_resumed_run_ends_with_the_same_bytes(stage, runs):
    root, results = runs
    assert results[f"until-{stage}"]["metrics"][-1]["step"] == 3
    assert results[f"pieces-{stage}"]["metrics"] == results[f"whole-{stage}"]["metrics"]
    assert weight_bytes(root / f"pieces-{stage}") == weight_bytes(root / f"whole-{stage}")
