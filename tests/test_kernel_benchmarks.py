"""Each kernel benchmark runs on a CPU, agrees with its formula, and does not time a variant that is wrong."""

from __future__ import annotations

import importlib
import json
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers.documents import ROOT, commands

from benchmarks.kernels import __main__ as all_kernels
from benchmarks.kernels import harness, linear_cross_entropy, rms_norm, rope, swiglu

SIZES = {
    "attention": "1x32x4x2x8", "decode_attention": "2x32x4x2x8", "rms_norm": "8x16", "rope": "1x8x2x8", "qk_norm": "1x8x2x8",
    "swiglu": "8x16", "linear_cross_entropy": "16x8x64", "experts": "64x16x16x4", "sampler": "4x512", "optimizer_step": "1000",
}  # fmt: skip
WITHOUT_BACKWARD = ("decode_attention", "sampler", "optimizer_step")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No compiler, and no measurement of the machine."""
    monkeypatch.setattr(harness.shutil, "which", lambda name: None)
    monkeypatch.setattr(harness, "measure_peaks", lambda device, dtype: harness.Peaks(1e12, 1e10))


def run(name: str, *words: str) -> int:
    module = importlib.import_module(f"benchmarks.kernels.{name}")
    words = ("--device", "cpu", "--rounds", "1", "--sizes", SIZES[name], *words)
    return harness.main(f"{name} (sizes)", module.cases, module.SIZES, words)


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", all_kernels.KERNELS)
def test_all_variants_agree_with_the_formula_and_are_timed(name, dtype, tmp_path, capsys):
    assert run(name, "--dtype", dtype, "--output", str(tmp_path)) == 0
    printed = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "kernels.jsonl").read_text().splitlines()]
    timed = [row for row in rows if "error" in row]
    kind = "forward" if name in WITHOUT_BACKWARD else "forward_backward"
    assert len(timed) > 1 and all(row["variant"] in printed for row in rows)
    for row in timed:
        assert row["error"] <= row["bound"] and row[f"{kind}_ms"] > 0 and 0 < row[f"{kind}_share"] < 1
        assert {"kernel", "case", "dtype", "device", "torch", "commit", "date"} <= row.keys()
    assert (tmp_path / f"{name}_{dtype}_cpu.png").stat().st_size > 0


def test_wrong_variant_is_not_timed_and_fails(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(swiglu, "naive", lambda gate, up: 1.1 * gate * gate.sigmoid() * up)
    assert run("swiglu", "--output", str(tmp_path)) == 1
    assert "| naive | 1.0e-01 | WRONG |" in capsys.readouterr().out
    row = next(json.loads(line) for line in (tmp_path / "kernels.jsonl").read_text().splitlines())
    assert row["variant"] == "naive" and "forward_ms" not in row


def test_nan_is_wrong_and_written_as_null(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(swiglu, "naive", lambda gate, up: gate * up * float("nan"))
    assert run("swiglu", "--output", str(tmp_path)) == 1
    assert "| naive | nan | WRONG |" in capsys.readouterr().out
    first = (tmp_path / "kernels.jsonl").read_text().splitlines()[0]
    row = json.loads(first, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert row["error"] is None and "forward_ms" not in row and not row["device"].endswith("of ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is visible")
def test_cuda_without_a_gpu_is_refused_in_one_line(capsys):
    with pytest.raises(SystemExit) as refusal:
        run("swiglu", "--device", "cuda")
    assert refusal.value.code == 2 and "--device: cuda, but no GPU is visible" in capsys.readouterr().err


def test_wrong_gradient_is_found():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, gate, up):
            ctx.save_for_backward(gate, up)
            return torch.nn.functional.silu(gate) * up

        @staticmethod
        def backward(ctx, grad):
            gate, up = ctx.saved_tensors
            return grad * up, grad * torch.nn.functional.silu(gate)

    (case,) = swiglu.cases(torch.device("cpu"), torch.float32, "8x16")
    assert harness.error_of(case, Wrong.apply) > 0.1


def test_variant_that_cannot_run_is_listed_with_the_reason(tmp_path, capsys):
    run("attention", "--output", "")
    printed = capsys.readouterr().out
    assert "- not run: varlen: no GPU is visible" in printed and "| varlen" not in printed


def test_unexpected_error_of_a_variant_fails_and_a_refusal_does_not(monkeypatch, tmp_path, capsys):
    def broken(gate, up):
        raise RuntimeError("CUDA error: misaligned address\nCUDA kernel errors might be asynchronous")

    def refused(gate, up):
        raise NotImplementedError("no kernel for this dtype")

    monkeypatch.setattr(swiglu, "naive", refused)
    assert run("swiglu", "--output", str(tmp_path)) == 0
    assert "- not run: naive: no kernel for this dtype" in capsys.readouterr().out
    monkeypatch.setattr(swiglu, "naive", broken)
    assert run("swiglu", "--output", str(tmp_path)) == 1
    assert "- FAILED: naive: RuntimeError: CUDA error: misaligned address\n" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "kernels.jsonl").read_text().splitlines()]
    assert [row["failed"] for row in rows if "failed" in row] == ["RuntimeError: CUDA error: misaligned address"]
    assert harness.refusal(RuntimeError("No available kernel. Aborting execution.")) and not harness.refusal(TypeError("x"))


def test_cuda_is_timed_between_events_after_the_caches_are_emptied(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def elapsed_time(self, end):
            return 2.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    monkeypatch.setattr(harness, "_filler", lambda device: SimpleNamespace(zero_=lambda: log.append("filler")))
    assert harness.seconds_of(lambda: log.append("call"), torch.device("cuda")) == 0.0025
    assert log == ["filler", "event", "call", "event", "wait"]


def test_liger_variants_equal_the_formulas(monkeypatch):
    """With stand-ins that have the signatures of liger-kernel's functions, and rotate in place as its RoPE does."""

    def norm(x, weight, eps, offset, casting_mode, in_place):
        assert (offset, casting_mode, in_place) == (0.0, "llama", False)
        return rms_norm.naive(x, weight)

    def rotate(queries, keys, cos, sin, position_ids=None, unsqueeze_dim=1):
        rotated = rope.rotate_half(queries, cos[:, None, :, : cos.shape[-1] // 2], sin[:, None, :, : sin.shape[-1] // 2])
        queries.data.zero_()  # what the caller keeps must be a copy
        return rotated, keys

    def loss(hidden, weight, labels, bias, ce_weight, ignore_index, lse_square_scale, label_smoothing, reduction):
        assert (bias, ce_weight, ignore_index, lse_square_scale, label_smoothing, reduction) == (
            None,
            None,
            -100,
            0.0,
            0.0,
            "sum",
        )
        return linear_cross_entropy.naive(hidden, weight, labels), None

    for module, apply in ((rms_norm, norm), (rope, rotate), (linear_cross_entropy, loss)):
        monkeypatch.setattr(module, "liger", lambda *names, apply=apply: (apply, {}))
        (case,) = module.cases(torch.device("cpu"), torch.float32, SIZES[module.__name__.rpartition(".")[2]])
        assert harness.error_of(case, case.variants["liger"]) < 1e-5


def test_size_of_another_kernel_is_refused():
    with pytest.raises(SystemExit, match="--sizes: expected ROWSxWIDTH, got '8'"):
        run("swiglu", "--sizes", "8")


@pytest.mark.slow
def test_module_runs_the_named_kernels_and_reports_a_failure(tmp_path):
    """With the command of docs/kernels.md, on small sizes."""
    command = next(line for line in commands(ROOT / "docs" / "kernels.md") if "--only" in line)
    small = "--device cpu --rounds 1 --sizes 8x16"
    done = subprocess.run(
        [sys.executable, *shlex.split(f"{command.removeprefix('python ')} {small} --output {tmp_path}")],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and "failed: rope" in done.stderr  # a size of rope has four numbers
    assert {json.loads(line)["kernel"] for line in (tmp_path / "kernels.jsonl").read_text().splitlines()} == {"swiglu"}
    assert "# swiglu (rows x width), fp32 on cpu" in done.stdout
