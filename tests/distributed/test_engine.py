"""The engine against the reference loop at every ZeRO stage, in fp32 and bf16. Two ranks: ``system/test_two_ranks.py``."""

from __future__ import annotations

import math
import os

import pytest
import torch
from deepspeed.runtime import torch_autocast
from helpers import training_runs
from helpers.training_runs import Rows, train, train_reference, weights
from helpers.zero_stages import EACH_STAGE

from bumblebee.nn.documents import Documents
from bumblebee.optim import Cosine

STEPS = 8
SCHEDULE = ("Cosine", {"warmup_ratio": 0.3})
TARGETS = (16, 1, 7, 0, 12)
UNTRAINED = "k_proj.bias"  # its true gradient is zero; Adam amplifies rounding errors to full steps


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def reference(request):
    """(config overrides, metrics, weights) of the reference loop."""
    changes = {"tie_word_embeddings": request.param}
    schedule = Cosine(**SCHEDULE[1])
    return changes, *train_reference(Rows(22, TARGETS), per_step=4, steps=STEPS, schedule=schedule, clip=1.0, **changes)


def check_against(lines, final, metrics, folder, tolerance):
    """Compare losses, norms and weights of a run with those of the reference loop."""
    trained = [line for line in metrics if "loss" in line]
    assert len(trained) == len(lines)
    for line, expected in zip(trained, lines, strict=True):
        for name in ("loss", "grad_norm"):
            assert math.isclose(line[name], expected[name], rel_tol=tolerance), (line["step"], name)
    for name, tensor in weights(folder).items():
        if not name.endswith(UNTRAINED):
            torch.testing.assert_close(tensor, final[name], rtol=0, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("stage", EACH_STAGE)
def test_training_equals_the_reference_loop(stage, reference, tmp_path):
    changes, lines, final = reference
    assert max(line["grad_norm"] for line in lines) > 1.0  # something is clipped
    run = {"max_steps": STEPS, "zero_stage": stage, "schedule": SCHEDULE, "data": {"samples": 22, "targets": TARGETS}}
    metrics = train(tmp_path / "run", model=changes, **run)
    check_against(lines, final, metrics, tmp_path / "run", tolerance=1e-6)


BF16 = {"max_steps": 24, "schedule": ("Cosine", {}), "data": {"samples": 8, "targets": (16,)}}


def distance(metrics, reference):
    """The largest difference between two loss curves."""
    return max(abs(a["loss"] - b["loss"]) for a, b in zip(metrics, reference, strict=True))


@pytest.fixture(scope="module")
def memorised():
    """The fp32 loss curve of a run that memorises its few samples."""
    lines, _ = train_reference(Rows(8, (16,)), per_step=4, steps=24, schedule=Cosine(), clip=1.0)
    assert lines[0]["loss"] - lines[-1]["loss"] > 1.5
    return lines


def test_bf16_without_fp32_weights_deviates_from_fp32(memorised):
    """The tolerance of the next test detects this error."""
    wrong, _ = train_reference(Rows(8, (16,)), 4, 24, Cosine(), clip=1.0, dtype=torch.bfloat16)
    assert distance(wrong, memorised) > 0.02


@pytest.mark.slow
@pytest.mark.parametrize("stage", EACH_STAGE)
def test_bf16_stays_close_to_fp32(stage, memorised, tmp_path):
    metrics = train(tmp_path / "run", zero_stage=stage, precision="bf16", **BF16)
    assert 1e-5 < distance(metrics, memorised) < 0.004  # 0 would mean that it ran in fp32
    dtypes = {tensor.dtype for tensor in weights(tmp_path / "run").values()}
    assert dtypes == {torch.float32 if stage == 0 else torch.bfloat16}


@pytest.mark.slow
def test_many_bf16_micro_batches_accumulate_in_fp32(tmp_path):
    """256 equal micro-batches have the gradient norm of one; accumulated in bf16 it would be 2 % larger."""
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


@pytest.mark.parametrize("stage", EACH_STAGE)
def test_without_clipping_the_norm_is_still_measured(stage, tmp_path):
    lines, final = train_reference(Rows(22, TARGETS), 4, 4, Cosine(warmup_ratio=0.0), clip=math.inf)
    run = {"max_steps": 4, "zero_stage": stage, "gradient_clip": None, "schedule": ("Cosine", {"warmup_ratio": 0.0})}
    metrics = train(tmp_path / "run", data={"samples": 22, "targets": TARGETS}, **run)
    check_against(lines, final, metrics, tmp_path / "run", tolerance=1e-6)


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_bucket_sizes_do_not_change_the_loss(stage, tmp_path):
    small = {"zero_optimization": {"reduce_bucket_size": 1000, "allgather_bucket_size": 1000}}
    plain = train(tmp_path / "a", zero_stage=stage)
    bucketed = train(tmp_path / "b", zero_stage=stage, deepspeed=small)
    for a, b in zip(plain, bucketed, strict=True):
        assert math.isclose(a.get("loss", 0), b.get("loss", 0), rel_tol=1e-6)


RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def test_training_works_after_deepspeed_refused_another_configuration(tmp_path, monkeypatch):
    """And neither run leaves the environment of a launcher."""
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_RANK", "7")
    with pytest.raises(ValueError, match="DeepSpeed refuses"):
        train(tmp_path / "refused", zero_stage=1, deepspeed={"zero_optimization": {"allgather_bucket_size": 7}}, max_steps=1)
    assert {name: os.environ[name] for name in RANK_VARIABLES if name in os.environ} == {"LOCAL_RANK": "7"}
    assert train(tmp_path / "run", zero_stage=1, max_steps=1)[0]["step"] == 1
    assert {name: os.environ[name] for name in RANK_VARIABLES if name in os.environ} == {"LOCAL_RANK": "7"}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_autocast_of_stage_0_does_not_reach_later_engines(stage, tmp_path):
    """DeepSpeed keeps it in a module; stages 1 to 3 would reduce in its dtype and, after fp16, scale the loss twice."""
    run = {"zero_stage": stage, "precision": "bf16", "max_steps": 2}
    before = train(tmp_path / "before", **run)
    train(tmp_path / "stage0", zero_stage=0, precision="bf16", max_steps=1)
    assert not torch_autocast.is_autocast_initialized() and torch_autocast.TORCH_AUTOCAST_DTYPE is None
    assert train(tmp_path / "after", **run) == before


@pytest.mark.slow
@pytest.mark.parametrize("stage", EACH_STAGE)
def test_documents_are_found_once_per_micro_batch_on_the_host(stage, tmp_path, monkeypatch):
    """DeepSpeed hands the model the tensor that they travel with; on a GPU, finding them in the forward pass would wait."""
    found: list[torch.device] = []
    find = Documents.of_starts
    monkeypatch.setattr(Documents, "of_starts", lambda starts: found.append(starts.device) or find(starts))
    train(tmp_path / "run", zero_stage=stage, precision="bf16", max_steps=1, micro_batch_size=2, accumulate=3)
    assert found == [torch.device("cpu")] * 3
