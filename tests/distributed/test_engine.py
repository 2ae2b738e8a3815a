"""The engine against the loop of a textbook: every ZeRO stage, in fp32 and bf16. Two ranks: ``system/test_two_ranks.py``."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import training_runs
from helpers.reference_loop import plain_adamw
from helpers.training_runs import Rows, train, weights

from bumblebee.optim import Cosine

STEPS = 8
SCHEDULE = ("Cosine", {"warmup_ratio": 0.3})
TARGETS = (16, 1, 7, 0, 12)
UNTRAINED = "k_proj.bias"  # its true gradient is zero; Adam blows rounding up to whole steps


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def reference(request):
    """A plain run and the changes of the config that it was made with."""
    changes = {"tie_word_embeddings": request.param}
    schedule = Cosine(**SCHEDULE[1])
    return changes, *plain_adamw(Rows(22, TARGETS), per_step=4, steps=STEPS, schedule=schedule, clip=1.0, **changes)


def check_against(lines, final, metrics, folder, tolerance):
    """Losses, norms and weights of a run against those of the plain one."""
    ours = [line for line in metrics if "loss" in line]
    assert len(ours) == len(lines)
    for line, plain in zip(ours, lines, strict=True):
        for name in ("loss", "grad_norm"):
            assert math.isclose(line[name], plain[name], rel_tol=tolerance), (line["step"], name)
    for name, tensor in weights(folder).items():
        if not name.endswith(UNTRAINED):
            torch.testing.assert_close(tensor, final[name], rtol=0, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_trains_like_plain_adamw_with_clipping_schedule_and_decay_groups(stage, reference, tmp_path):
    changes, lines, final = reference
    assert max(line["grad_norm"] for line in lines) > 1.0  # or nothing is clipped
    run = {"max_steps": STEPS, "zero_stage": stage, "schedule": SCHEDULE, "data": {"samples": 22, "targets": TARGETS}}
    metrics = train(tmp_path / "run", model=changes, **run)
    check_against(lines, final, metrics, tmp_path / "run", tolerance=1e-6)


BF16 = {"max_steps": 24, "schedule": ("Cosine", {}), "data": {"samples": 8, "targets": (16,)}}


def distance(ours, theirs):
    """The largest difference between two loss curves."""
    return max(abs(line["loss"] - plain["loss"]) for line, plain in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def memorised():
    """The loss curve in fp32 of a run that learns its few samples by heart."""
    lines, _ = plain_adamw(Rows(8, (16,)), per_step=4, steps=24, schedule=Cosine(), clip=1.0)
    assert lines[0]["loss"] - lines[-1]["loss"] > 1.5
    return lines


def test_bf16_without_fp32_weights_in_the_optimizer_leaves_the_curve(memorised):
    """What the tolerance of the next test has to tell apart."""
    wrong, _ = plain_adamw(Rows(8, (16,)), 4, 24, Cosine(), clip=1.0, dtype=torch.bfloat16)
    assert distance(wrong, memorised) > 0.02


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_stays_near_the_curve_of_fp32_at_every_stage(stage, memorised, tmp_path):
    metrics = train(tmp_path / "run", zero_stage=stage, precision="bf16", **BF16)
    assert 1e-5 < distance(metrics, memorised) < 0.004  # at zero it would not be bf16
    kinds = {tensor.dtype for tensor in weights(tmp_path / "run").values()}
    assert kinds == {torch.float32 if stage == 0 else torch.bfloat16}


def test_many_micro_batches_in_bf16_add_up_without_losing_bits(tmp_path):
    """256 equal micro-batches have the gradient norm of one; adding up in bf16 gives 2 % more."""
    options = {"max_steps": 1, "precision": "bf16", "zero_stage": 2, "micro_batch_size": 1}
    [one] = train(tmp_path / "one", data={"samples": 1, "targets": (16,)}, accumulate=1, **options)

    class Same(Rows):
        def setup(self, seed):
            super().setup(seed)
            self.train = self.train[:1] * 256

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_runs, "Rows", Same)
        [many] = train(tmp_path / "many", data={"samples": 1, "targets": (16,)}, accumulate=256, **options)
    assert math.isclose(many["grad_norm"], one["grad_norm"], rel_tol=2e-3)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_without_clipping_the_norm_is_still_measured_and_the_step_is_the_plain_one(stage, tmp_path):
    lines, final = plain_adamw(Rows(22, TARGETS), 4, 4, Cosine(warmup_ratio=0.0), clip=math.inf)
    run = {"max_steps": 4, "zero_stage": stage, "gradient_clip": None, "schedule": ("Cosine", {"warmup_ratio": 0.0})}
    metrics = train(tmp_path / "run", data={"samples": 22, "targets": TARGETS}, **run)
    check_against(lines, final, metrics, tmp_path / "run", tolerance=1e-6)


@pytest.mark.parametrize("stage", [1, 2])
def test_overrides_reach_deepspeed_without_changing_what_is_learned(stage, tmp_path):
    small = {"zero_optimization": {"reduce_bucket_size": 1000, "allgather_bucket_size": 1000}}
    plain = train(tmp_path / "a", zero_stage=stage)
    bucketed = train(tmp_path / "b", zero_stage=stage, deepspeed=small)
    for ours, theirs in zip(plain, bucketed, strict=True):
        assert math.isclose(ours.get("loss", 0), theirs.get("loss", 0), rel_tol=1e-6)
