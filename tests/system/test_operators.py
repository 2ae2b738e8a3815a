"""What DeepSpeed compiles: its own optimizers, and reading and writing on NVMe. They skip themselves where that cannot be."""

from __future__ import annotations

import math
import shutil

import pytest
from helpers.training_runs import train, weight_bytes, weights

needs_a_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="DeepSpeed's operators need the C++ compiler g++")
LARGE = {"hidden_size": 256, "intermediate_size": 512}  # vectors of less than a megabyte stay in memory
OPTIONS = {"lr": 1e-3, "weight_decay": 0.1}
UNTRAINED = "k_proj.bias"  # its true gradient is zero; Adam blows rounding up to whole steps


def asynchronous_io() -> bool:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return bool(shutil.which("g++")) and AsyncIOBuilder().is_compatible(verbose=False)


needs_asynchronous_io = pytest.mark.skipif("not asynchronous_io()", reason="needs libaio (apt install libaio-dev) and g++")


def offloaded(folder, *what):
    return {"zero_optimization": {name: {"device": "nvme", "nvme_path": str(folder)} for name in what}}


def check_equal(ours, theirs, folder, other):
    for line, plain in zip(ours, theirs, strict=True):
        assert math.isclose(line.get("loss", 0), plain.get("loss", 0), rel_tol=1e-6)
    expected = weights(other)
    for name, tensor in weights(folder).items():
        assert name.endswith(UNTRAINED) or float((tensor - expected[name]).abs().max()) < 5e-6, name


@pytest.mark.slow
@needs_a_compiler
@pytest.mark.parametrize("name", ["FusedAdam", "DeepSpeedCPUAdam"])
def test_deepspeed_adam_equals_torch_and_resumes(name, tmp_path):
    plain = train(tmp_path / "plain", optimizer=("AdamW", OPTIONS))
    job = {"optimizer": (f"deepspeed.ops.adam.{name}", OPTIONS), "callbacks": {"checkpoint": ("Checkpoint", {"every": 3})}}
    for stage in (0, 1, 2, 3):
        whole = tmp_path / f"whole-{stage}"
        check_equal(train(whole, zero_stage=stage, **job), plain, whole, tmp_path / "plain")
        train(tmp_path / f"resumed-{stage}", zero_stage=stage, resume=str(whole / "checkpoint-3"), **job)
        assert weight_bytes(tmp_path / f"resumed-{stage}") == weight_bytes(whole)


@pytest.mark.slow
@needs_asynchronous_io
@pytest.mark.parametrize("what", [("offload_optimizer",), ("offload_optimizer", "offload_param")])
def test_nvme_offload_equals_training_in_memory(what, tmp_path):
    job = {"zero_stage": 3, "optimizer": ("AdamW", OPTIONS), "model": LARGE}
    job["callbacks"] = {"checkpoint": ("Checkpoint", {"every": 3})}
    plain = train(tmp_path / "plain", **job)
    ours = train(tmp_path / "run", deepspeed=offloaded(tmp_path / "nvme", *what), **job)
    assert list((tmp_path / "nvme").rglob("exp_avg-*.swp"))  # it was there
    check_equal(ours, plain, tmp_path / "run", tmp_path / "plain")
    job = {**job, "resume": str(tmp_path / "run" / "checkpoint-3")}
    train(tmp_path / "there", deepspeed=offloaded(tmp_path / "nvme2", *what), **job)
    assert weight_bytes(tmp_path / "there") == weight_bytes(tmp_path / "run")
    ours = train(tmp_path / "back", **job)
    check_equal(ours[-3:], plain[-3:], tmp_path / "back", tmp_path / "plain")
