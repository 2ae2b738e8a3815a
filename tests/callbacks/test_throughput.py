from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from bumblebee.hardware import flops
from bumblebee.hardware.gpu_utilization import UtilizationMeter
from callbacks import MetricsHistory, Throughput, Validation

METRICS = {"tokens_per_second", "tflops", "mfu", "memory_gb"}


@pytest.fixture(scope="module")
def run(fit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    uses = {"throughput": Throughput(every=2, peak_tflops=0.5), "history": MetricsHistory(), "validation": Validation(every=3)}
    return fit(folder, uses, max_steps=6)


def test_throughput_is_logged_every_n_steps(run, read_lines):
    lines = [line for line in read_lines(run.folder / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines if METRICS <= set(line)] == [2, 4, 6]
    assert not any(METRICS & set(line) for line in lines if line["step"] % 2)


def test_throughput_metrics_are_consistent(run, read_lines):
    model = run.trainer.task.model
    # Rows of eight tokens, all of them targets.
    flops_per_token = flops.weight_flops_per_token(model) + flops.attention_flops_per_token(model, 8)
    for line in read_lines(run.folder / "metrics.jsonl"):
        if "tflops" in line:
            assert line["tflops"] * 1e12 == pytest.approx(flops_per_token * line["tokens_per_second"])
            assert line["mfu"] == pytest.approx(line["tflops"] / 0.5)
            assert 0.05 < line["memory_gb"] < 20
            assert "gpu_utilization" not in line  # on a CPU


def test_run_ends_with_a_throughput_line(run):
    line = run.text.splitlines()[-1]
    assert re.fullmatch(
        r"throughput: \S+( k)? tokens/s · \S+ TFLOP/s per device · MFU \S+% of 0\.5 TFLOP/s · peak memory \S+ GB", line
    )


def test_hook_is_removed_from_the_model(run):
    hooks = run.trainer.task.model._forward_pre_hooks.values()
    assert not [hook for hook in hooks if isinstance(getattr(hook, "__self__", None), Throughput)]


def test_flops_count_tokens_without_targets(fit, tmp_path, monkeypatch):
    """With half of the targets, half the tokens per second and the same FLOPs."""
    callback = Throughput(every=1, peak_tflops=1.0)

    class Half(MetricsHistory):
        def on_fit_start(self, trainer):
            all_counts = trainer.task.counts
            trainer.task.counts = lambda batch: {name: count // 2 for name, count in all_counts(batch).items()}

        def on_log(self, trainer, metrics):
            if "tflops" in metrics:
                ratios.append(metrics["tflops"] * 1e12 / metrics["tokens_per_second"])

    ratios: list[float] = []
    run = fit(tmp_path / "run", {"half": Half(), "throughput": callback}, max_steps=2)
    model = run.trainer.task.model
    assert ratios == [pytest.approx(2 * (flops.weight_flops_per_token(model) + flops.attention_flops_per_token(model, 8)))]


def test_zero_3_counts_whole_parameters(fit, run, tmp_path):
    callback = Throughput(peak_tflops=1.0)
    fit(tmp_path / "run", {"throughput": callback}, max_steps=1, zero_stage=3)
    assert callback._flops_per_token == flops.weight_flops_per_token(run.trainer.task.model)


# -- timing -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr("callbacks.throughput.time.perf_counter", lambda: now.seconds)
    return now


def test_only_steps_are_timed(stub_trainer, clock):
    trainer = stub_trainer([Throughput(every=4, peak_tflops=1.0)], steps=8)
    trainer.call("on_fit_start")
    for step in range(1, 5):
        trainer.call("on_step_start")
        clock.seconds += 100.0 if step == 1 else 2.0  # compiles and allocates
        trainer.step, trainer.tokens = step, trainer.tokens + 100
        if step == 3:
            clock.seconds += 1000.0
            trainer.call("on_validation_end", {"validation_loss": 1.0})  # from an earlier callback
        trainer.call("on_step_end")
        clock.seconds += 5000.0
        trainer.call("on_save")
    assert trainer.logged["tokens_per_second"] == 50.0


def test_validation_after_the_step_is_not_timed(stub_trainer, clock):
    trainer = stub_trainer([Throughput(every=2, peak_tflops=1.0)], steps=8)
    trainer.call("on_fit_start")
    for step in (1, 2):
        trainer.call("on_step_start")
        clock.seconds += 2.0
        trainer.step, trainer.tokens = step, trainer.tokens + 100
        trainer.call("on_step_end")
        clock.seconds += 1000.0
        trainer.call("on_validation_end", {"validation_loss": 1.0})
    assert trainer.logged["tokens_per_second"] == 50.0


def test_run_of_one_step_reports_nothing(stub_trainer, capsys):
    trainer = stub_trainer([Throughput(every=1, peak_tflops=1.0)], steps=1).run()
    assert trainer.logged == {} and capsys.readouterr().out == ""


def test_gpu_utilization_is_averaged_over_samples(stub_trainer, monkeypatch, capsys):
    percent = iter([40, 60, 100])
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: next(percent))
    trainer = stub_trainer([throughput := Throughput(every=4, peak_tflops=1.0)], steps=4)
    trainer.call("on_fit_start")
    throughput._utilization = UtilizationMeter(torch.device("cuda"), interval=0.0)
    for trainer.step in range(1, 5):
        trainer.call("on_step_start")
        trainer.tokens += 100
        trainer.call("on_step_end")
    assert trainer.logged["gpu_utilization"] == pytest.approx(2 / 3)  # the first step is not measured
    trainer.call("on_fit_end")
    assert "GPU utilization 67%" in capsys.readouterr().out


def test_without_nvml_nothing_is_sampled(monkeypatch):
    calls = []

    def missing(device: torch.device) -> int:
        calls.append(device)
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed")

    monkeypatch.setattr(torch.cuda, "utilization", missing)
    for device, asked in (("cpu", 0), ("cuda", 1)):
        meter = UtilizationMeter(torch.device(device), interval=0.0)
        for _ in range(3):
            meter.sample()
        assert meter.pop() == (0.0, 0) and len(calls) == asked


def test_samples_are_at_least_the_interval_apart(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("bumblebee.hardware.gpu_utilization.time.monotonic", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 50)
    meter = UtilizationMeter(torch.device("cuda"), interval=1.0)
    for _ in range(10):
        meter.sample()
        now[0] += 0.25
    assert meter.pop() == (1.5, 3) and meter.pop() == (0.0, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"peak_tflops": 0.0}, "peak_tflops must be greater than 0 or null, got 0.0"),
    ],
)
def test_invalid_options_raise(options, message):
    with pytest.raises(ValueError, match=message):
        Throughput(**options)


@pytest.mark.gpu
def test_gpu_memory_and_mfu(fit, tmp_path):
    callback = Throughput(every=1)
    run = fit(tmp_path / "run", {"throughput": callback}, max_steps=3, precision="bf16", device="cuda")
    assert run.error is None and 0 < callback._memory < 10
    known = flops.peak_tflops(torch.cuda.get_device_name()) is not None
    assert "TFLOP/s per device" in run.text and ("MFU" in run.text) == known
