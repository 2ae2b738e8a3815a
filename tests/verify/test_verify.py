"""``bumblebee verify`` passes on this machine, detects each injected fault and removes its temporary files."""

from __future__ import annotations

import json
import re

import pytest
import torch
from helpers import planted_faults as faults
from helpers.verify_rows import ATTENTION, CURVE, DATA, GRADIENT, LOSS, MODEL, RESUME, statuses

from bumblebee.cli.main import main
from bumblebee.verify import check
from bumblebee.verify.checks import machine_throughput
from bumblebee.verify.checks.attention_check import attention_formula
from bumblebee.verify.checks.loss_curve_check import skipped_steps


@pytest.fixture
def verify(tmp_path, capsys):
    """Runs the command in a fresh folder; returns the exit code, the status of each check, and the printed report."""

    def run(*words: str) -> tuple[int, dict[str, str], str]:
        with pytest.raises(SystemExit) as exit_:
            main(["verify", "--device", "cpu", "--folder", str(tmp_path), *words])
        left = [file.name for file in tmp_path.iterdir()]
        assert left in ([], ["verify.json"]), "the temporary folder still exists"
        printed = capsys.readouterr().out
        return int(exit_.value.code or 0), statuses(printed), printed

    return run


@pytest.mark.slow
def test_all_checks_pass_and_are_reported(verify, monkeypatch, tmp_path):
    monkeypatch.setattr(machine_throughput, "MATMUL_SIZES", {"cpu": (256, 512)})
    monkeypatch.setattr(machine_throughput, "TIME_BUDGET", 0.05)
    code, rows, printed = verify()
    assert code == 0 and printed.rstrip().endswith("all checks passed")
    passed = [one.name for one in (*check.KERNELS, check.MODEL, *check.TRAINING, *check.METHODS)]
    measured = ("matmul throughput", "memory bandwidth", "disk write")
    assert rows == {**dict.fromkeys(passed, "pass"), **dict.fromkeys(measured, "measured")}
    assert all(re.search(rf"^{name} .* \d+\.\d$", printed, flags=re.MULTILINE) for name in rows)
    record = json.loads((tmp_path / "verify.json").read_text())
    assert {row["name"]: row["status"] for row in record["checks"]} == rows and record["passed"]
    assert record["settings"] == {"precision": "bf16", "zero_stage": 1, "attention": "sdpa"}
    assert all(
        measurement["passed"] and measurement["unit"] or measurement["bound"] is not None
        for row in record["checks"]
        for measurement in row["measurements"]
    )
    for unit in ("TFLOP/s", "GB/s", "MB/s"):
        assert float(re.search(rf"([\d.e+-]+) {unit}", printed)[1]) > 0
    assert max(map(len, printed.splitlines())) <= 128


@pytest.mark.slow
def test_recipe_names_model_data_and_settings(verify, monkeypatch, tokenizer_folder, tmp_path_factory):
    faults.only(monkeypatch, MODEL, DATA)
    words = ["--task.model", "recipes/models/tiny.yaml", "--data.tokenizer", str(tokenizer_folder)]
    words += ["--data.cache_dir", str(tmp_path_factory.mktemp("cache")), "--trainer.precision", "fp32"]
    code, rows, printed = verify("--config", "recipes/pretrain.yaml", *words)
    assert code == 0 and rows == {MODEL: "pass", DATA: "pass"}, printed
    assert "0 labels across documents" in printed and "gradient of transformers" in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "stage", "attention"),
    [(precision, stage, "auto") for precision in ("fp32", "bf16") for stage in (0, 1, 2, 3)]
    + [("fp32", 0, "naive"), ("bf16", 3, "naive")],
)
def test_passes_at_every_stage_and_precision(precision, stage, attention, verify, monkeypatch):
    methods = check.METHODS if precision == "fp32" else ()  # which train in fp32
    monkeypatch.setattr(check, "CHECKS", check.KERNELS + check.TRAINING + methods)
    code, rows, printed = verify("--precision", precision, "--zero_stage", str(stage), "--attention", attention)
    assert code == 0 and set(rows.values()) == {"pass"}, printed


# Fault, precision, checks that run, those of them that must fail, part of the verdict.
FAULTS = [
    (faults.attention_too_large, "bf16", (ATTENTION,), (ATTENTION,), "training and generation with it are unreliable"),
    (faults.attention_too_large, "fp32", (ATTENTION, LOSS, CURVE), (ATTENTION, CURVE), "possibly a consequence of the failure"),
    (faults.attention_sees_next_token, "fp32", (ATTENTION, LOSS), (ATTENTION,), "the attention kernel is wrong"),
    (faults.cache_skips_a_block, "bf16", (ATTENTION,), (ATTENTION,), "the attention kernel is wrong"),
    (faults.loss_gradient_too_large, "fp32", (LOSS, GRADIENT), (LOSS, GRADIENT), "no training on this machine is reliable"),
    (faults.loss_gradient_too_large, "bf16", (LOSS,), (LOSS,), "no training on this machine is reliable"),
    (
        faults.means_of_means,
        "fp32",
        (ATTENTION, GRADIENT, CURVE),
        (GRADIENT, CURVE),
        "the gradient of its whole batch",
    ),
    (faults.no_fp32_weights, "bf16", (GRADIENT, CURVE), (CURVE,), "its losses are unreliable"),
    (faults.schedule_is_ignored, "fp32", (CURVE, RESUME), (CURVE,), "diverges from plain PyTorch"),
]


@pytest.mark.parametrize(
    ("fault", "precision", "checks", "failing", "verdict"),
    [pytest.param(*row, marks=[pytest.mark.slow] if {CURVE, RESUME} & set(row[2]) else []) for row in FAULTS],
    ids=[f"{fault.__name__}-{precision}" for fault, precision, *_ in FAULTS],
)
def test_injected_fault_is_detected(fault, precision, checks, failing, verdict, verify, monkeypatch):
    faults.only(monkeypatch, *checks)
    fault(monkeypatch)
    code, rows, printed = verify("--precision", precision)
    assert code == 1
    assert rows == {name: "FAIL" if name in failing else "pass" for name in checks}, printed
    assert verdict in printed and "all checks passed" not in printed
    assert re.findall(r"^FAIL (.*?):", printed, flags=re.MULTILINE) == [name for name in checks if name in failing]


def test_check_that_raises_fails_and_the_others_run(verify, monkeypatch):
    faults.only(monkeypatch, ATTENTION, LOSS, GRADIENT)
    faults.loss_check_raises(monkeypatch)
    code, rows, printed = verify("--precision", "fp32")
    assert code == 1 and rows == {ATTENTION: "pass", LOSS: "FAIL", GRADIENT: "pass"}
    assert "RuntimeError: no kernel image is available" in printed


def test_failing_training_is_reported_for_each_check(verify, monkeypatch):
    faults.only(monkeypatch, GRADIENT, RESUME, "disk write")
    faults.every_step_raises(monkeypatch)
    code, rows, printed = verify("--precision", "fp32")
    assert code == 1 and rows == {GRADIENT: "FAIL", RESUME: "FAIL", "disk write": "measured"}
    assert printed.count("RuntimeError: out of memory") == 2


@pytest.mark.slow
def test_nondeterminism_is_distinguished_from_wrong_resume(verify, monkeypatch):
    faults.only(monkeypatch, RESUME)
    faults.not_deterministic(monkeypatch)
    code, rows, printed = verify("--precision", "fp32")
    assert code == 1 and rows == {RESUME: "FAIL"}
    assert "training is not deterministic on this machine" in " ".join(printed.split())


def test_interruption_removes_the_folder_and_prints_the_report(verify, monkeypatch, tmp_path):
    faults.only(monkeypatch, LOSS, GRADIENT, CURVE)
    faults.signal_in_training(monkeypatch)
    code, rows, printed = verify("--precision", "fp32")
    assert code == 1 and rows == {LOSS: "pass", GRADIENT: "FAIL", CURVE: "not run"}, printed
    assert not (tmp_path / "verify.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--precision", "fp16"], "precision fp16 needs a GPU"),
        (["--attention", "flsh"], "unknown attention 'flsh'"),
        (["--zero_stage", "4"], "expected 0, 1, 2 or 3, got 4"),
        (["--folder", "/proc/nowhere"], "cannot write /proc/nowhere"),
        (["--model", "/nowhere"], "model: folder not found: /nowhere"),
        (
            ["--config", "recipes/pretrain.yaml", "--data.tokenizer", "/nowhere"],
            "data.tokenizer: folder not found: /nowhere",
        ),
        (["--config", "recipes/pretrain.yaml", "--trainer.presicion", "fp32"], "did you mean 'trainer.precision'?"),
    ],
    ids=["precision", "attention", "zero_stage", "folder", "model", "tokenizer", "option of the recipe"],
)
def test_unusable_options_exit_with_code_2(words, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["verify", "--device", "cpu", *words])
    assert exit_.value.code == 2
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 1 and message in printed[0]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("stage", ["0", "1", "3"])
def test_passes_on_a_gpu(precision, stage, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["verify", "--device", "cuda", "--folder", str(tmp_path), "--precision", precision, "--zero_stage", stage])
    assert not exit_.value.code, capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["verify.json"]


def test_skipped_fp16_steps_are_read_from_the_metrics():
    """The reference loop skips the same steps. fp16 itself needs a GPU."""
    assert skipped_steps([{"skipped_steps": count} for count in (1.0, 2.0, 2.0, 3.0)]) == {0, 1, 3}
    assert skipped_steps([{"loss": 1.0}] * 3) == set()


def test_attention_formula_equals_sdpa_in_fp64():
    """Validates the reference itself, against a PyTorch function that no check uses."""
    q, k, v = (torch.randn(2, 9, heads, 16, dtype=torch.float64) for heads in (4, 2, 2))
    causal = torch.ones(9, 9, dtype=torch.bool).tril().expand(2, 9, 9)
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(attention_formula(q, k, v, causal), expected)
