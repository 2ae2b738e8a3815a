"""``bumblebee verify`` passes here, names each planted fault and leaves nothing behind."""

from __future__ import annotations

import re

import pytest
import torch
from helpers import planted_faults as faults
from helpers.verify_rows import ATTENTION, CURVE, LOSS, RESUME, STEP, results

from bumblebee.cli.main import main
from bumblebee.verify import check, loss_curve


@pytest.fixture
def verify(tmp_path, capsys):
    """Runs the command in a fresh folder; gives its exit code, the result of each check, and what it printed."""

    def run(*words: str) -> tuple[int, dict[str, str], str]:
        with pytest.raises(SystemExit) as done:
            main(["verify", "--device", "cpu", "--folder", str(tmp_path), *words])
        assert list(tmp_path.iterdir()) == [], "the trial folder is still there"
        printed = capsys.readouterr().out
        return int(done.value.code or 0), results(printed), printed

    return run


def test_it_passes_here_and_shows_every_check_with_figures_and_seconds(verify):
    code, rows, printed = verify()
    assert code == 0 and printed.rstrip().endswith("all passed")
    judged, measured = (ATTENTION, LOSS, STEP, CURVE, RESUME), ("matrix product", "memory", "disk")
    assert rows == {**dict.fromkeys(judged, "pass"), **dict.fromkeys(measured, "measured")}
    assert all(re.search(rf"^{name} .* \d+\.\d$", printed, flags=re.MULTILINE) for name in rows)
    for unit in ("TFLOP/s", "GB/s", "MB/s"):
        assert float(re.search(rf"([\d.e+-]+) {unit}", printed)[1]) > 0
    assert max(map(len, printed.splitlines())) <= 128


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["auto", "naive"])
def test_it_passes_at_every_stage_and_precision(precision, stage, attention, verify, monkeypatch):
    monkeypatch.setattr(check, "CHECKS", check.KERNELS + check.TRAINING)
    code, rows, printed = verify("--precision", precision, "--zero_stage", str(stage), "--attention", attention)
    assert code == 0 and set(rows.values()) == {"pass"}, printed


# Fault, precision, the checks that are made, those of them that must fail, what the user is told.
PLANTED = [
    (faults.attention_too_large, "bf16", (ATTENTION,), (ATTENTION,), "do not trust training or generation"),
    (faults.attention_too_large, "fp32", (ATTENTION, LOSS, CURVE), (ATTENTION, CURVE), "perhaps only because of the failure"),
    (faults.attention_sees_the_next_token, "fp32", (ATTENTION, LOSS), (ATTENTION,), "do not trust training or generation"),
    (faults.cache_forgets_a_block, "bf16", (ATTENTION,), (ATTENTION,), "do not trust training or generation"),
    (faults.gradient_of_the_loss_too_large, "fp32", (LOSS, STEP), (LOSS, STEP), "do not trust any training"),
    (faults.gradient_of_the_loss_too_large, "bf16", (LOSS,), (LOSS,), "do not trust any training"),
    (faults.divided_by_micro_batches, "fp32", (STEP,), (STEP,), "do not trust runs with several ranks or"),
    (faults.means_of_means, "fp32", (ATTENTION, STEP, CURVE), (STEP, CURVE), "a step is not that of its whole batch"),
    (faults.no_fp32_weights, "bf16", (STEP, CURVE), (CURVE,), "do not trust its losses"),
    (faults.schedule_is_ignored, "fp32", (CURVE, RESUME), (CURVE,), "does not follow plain torch"),
    (faults.optimizer_state_is_lost, "fp32", (STEP, RESUME), (RESUME,), "do not trust runs that were interrupted"),
    (faults.resume_skips_a_micro_batch, "fp32", (CURVE, RESUME), (RESUME,), "resume is not exact"),
    (faults.random_numbers_are_lost, "fp32", (RESUME,), (RESUME,), "resume is not exact"),
]


@pytest.mark.parametrize(
    ("fault", "precision", "made", "failing", "told"), PLANTED, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_planted_fault_is_found_and_named(fault, precision, made, failing, told, verify, monkeypatch):
    faults.only(monkeypatch, *made)
    fault(monkeypatch)
    code, rows, printed = verify("--precision", precision)
    assert code == 1
    assert rows == {name: "FAIL" if name in failing else "pass" for name in made}, printed
    assert told in printed and "all passed" not in printed
    assert re.findall(r"^FAIL (.*?):", printed, flags=re.MULTILINE) == [name for name in made if name in failing]


def test_a_check_that_breaks_fails_with_its_error_and_the_others_still_run(verify, monkeypatch):
    faults.only(monkeypatch, ATTENTION, LOSS, STEP)
    faults.loss_check_breaks(monkeypatch)
    code, rows, printed = verify("--precision", "fp32")
    assert code == 1 and rows == {ATTENTION: "pass", LOSS: "FAIL", STEP: "pass"}
    assert "RuntimeError: no kernel image is available" in printed


def test_training_that_breaks_is_reported_for_each_check(verify, monkeypatch):
    faults.only(monkeypatch, STEP, RESUME, "disk")
    faults.every_step_breaks(monkeypatch)
    code, rows, printed = verify("--precision", "fp32")
    assert code == 1 and rows == {STEP: "FAIL", RESUME: "FAIL", "disk": "measured"}
    assert printed.count("RuntimeError: out of memory") == 2


def test_a_machine_that_does_not_compute_the_same_twice_is_told_apart_from_a_wrong_resume(verify, monkeypatch):
    faults.only(monkeypatch, RESUME)
    faults.runs_differ(monkeypatch)
    code, rows, printed = verify("--precision", "fp32")
    assert code == 1 and rows == {RESUME: "FAIL"}
    assert "does not compute the same twice" in " ".join(printed.split())


def test_an_interruption_removes_the_folder_and_shows_what_is_known(verify, monkeypatch):
    faults.only(monkeypatch, LOSS, STEP, CURVE)
    faults.signal_in_training(monkeypatch)
    code, rows, printed = verify("--precision", "fp32")
    assert code == 1 and rows == {LOSS: "pass", STEP: "FAIL", CURVE: "not run"}, printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--precision", "fp16"], "precision fp16 needs a GPU"),
        (["--attention", "flsh"], "unknown attention 'flsh'"),
        (["--zero_stage", "4"], "expected 0, 1, 2 or 3, got 4"),
        (["--folder", "/proc/nowhere"], "cannot write /proc/nowhere"),
    ],
    ids=lambda value: value[0][2:] if isinstance(value, list) else "",
)
def test_options_that_cannot_be_met_end_in_one_line_and_exit_code_2(words, message, capsys):
    with pytest.raises(SystemExit) as done:
        main(["verify", "--device", "cpu", *words])
    assert done.value.code == 2
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 1 and message in printed[0]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("stage", ["0", "1", "3"])
def test_it_passes_on_a_gpu(precision, stage, tmp_path, capsys):
    with pytest.raises(SystemExit) as done:
        main(["verify", "--device", "cuda", "--folder", str(tmp_path), "--precision", precision, "--zero_stage", stage])
    assert not done.value.code, capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_steps_that_fp16_leaves_out_are_read_from_the_metrics():
    """The reference leaves the same ones out. fp16 itself needs a GPU."""
    assert loss_curve._skipped([{"skipped_steps": count} for count in (1.0, 2.0, 2.0, 3.0)]) == {0, 1, 3}
    assert loss_curve._skipped([{"loss": 1.0}] * 3) == set()


def test_the_formulas_own_attention_equals_torchs():
    """The reference is right: against torch's function in fp64, which no check uses."""
    from bumblebee.verify.attention_check import formula

    q, k, v = (torch.randn(2, 9, heads, 16, dtype=torch.float64) for heads in (4, 2, 2))
    seen = torch.ones(9, 9, dtype=torch.bool).tril().expand(2, 9, 9)
    a, b, c = (x.transpose(1, 2) for x in (q, k, v))
    wanted = torch.nn.functional.scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(formula(q, k, v, seen), wanted)
