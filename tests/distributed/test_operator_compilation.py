"""Compiling DeepSpeed's operators: failures are errors of one line. ``system/test_operators.py`` compiles some."""

from __future__ import annotations

import pytest
import torch
from deepspeed.ops.op_builder import FusedAdamBuilder
from deepspeed.ops.op_builder.builder import MissingCUDAException, OpBuilder
from torch.utils import cpp_extension

from bumblebee.distributed.deepspeed.operators import import_deepspeed, quiet_initialization

NO_NVCC = "the CUDA toolkit, whose version must be that of torch, was not found"


@pytest.mark.parametrize(
    ("error", "gpu", "reason"),
    [
        (MissingCUDAException("CUDA_HOME does not exist"), True, NO_NVCC),
        (TypeError("expected str, bytes or os.PathLike object, not NoneType"), True, NO_NVCC),
        (RuntimeError("Command failed\nfatal error: Python.h: No such file"), False, "fatal error: Python.h: No such file"),
    ],
    ids=["no toolkit", "path is None", "no header"],
)
def test_operator_that_cannot_be_compiled_is_named(error, gpu, reason, monkeypatch):
    def load(builder, verbose=True):
        raise error

    monkeypatch.setattr(OpBuilder, "jit_load", load)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    deepspeed = import_deepspeed(torch.device("cpu"))
    with pytest.raises(ValueError, match=f"DeepSpeed's fused_adam operator cannot be compiled here: {reason}"):
        with quiet_initialization(deepspeed, {}):
            FusedAdamBuilder().jit_load()


def test_lock_of_a_killed_compilation_is_deleted(monkeypatch, tmp_path, caplog):
    left = tmp_path / "fused_adam" / "lock"
    left.parent.mkdir()
    left.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(OpBuilder, "jit_load", lambda builder, verbose=True: left.exists())
    deepspeed = import_deepspeed(torch.device("cpu"))
    with quiet_initialization(deepspeed, {}):
        assert FusedAdamBuilder().jit_load() is False
    assert "a compilation of DeepSpeed's fused_adam operator was cut off" in caplog.text
