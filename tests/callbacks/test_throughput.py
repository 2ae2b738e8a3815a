from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from bumblebee.config import BumblebeeConfig
from bumblebee.hardware import flops
from bumblebee.lora import LoRA
from bumblebee.model import Bumblebee
from callbacks import MetricsHistory, Throughput, Validation

FIGURES = {"tokens_per_second", "tflops", "mfu", "memory_gb"}


# -- counting ----------------------------------------------------------------------------------------------------------


def meta(**changes):
    with torch.device("meta"):
        return Bumblebee(BumblebeeConfig.preset("0.5b", **changes))


@pytest.mark.parametrize("tied", [True, False])
def test_weights_count_six_for_each_token_the_head_once_and_the_table_not_at_all(tied):
    model = meta(tie_word_embeddings=tied)
    table = model.config.vocab_size * model.config.hidden_size
    blocks = model.num_parameters() - table * (1 if tied else 2)
    assert flops.weight_flops_per_token(model) == 6 * (blocks + table)


def test_frozen_weights_need_no_gradient_of_their_own():
    model = meta()
    whole = flops.weight_flops_per_token(model)
    model.requires_grad_(False)
    assert flops.weight_flops_per_token(model) == pytest.approx(whole * 4 / 6)
    model.model.layers[0].mlp.requires_grad_(True)
    trained = sum(p.numel() for p in model.model.layers[0].mlp.parameters())
    assert flops.weight_flops_per_token(model) == pytest.approx(whole * 4 / 6 + 2 * trained)


def test_adapters_count_six_and_the_weights_beside_them_four(tiny, tmp_path):
    Bumblebee(tiny()).save_pretrained(tmp_path)
    model = Bumblebee.from_pretrained(tmp_path)
    whole = flops.weight_flops_per_token(model)
    LoRA(rank=4)(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert flops.weight_flops_per_token(model) == pytest.approx(whole * 4 / 6 + 6 * trained)


def test_attention_is_twelve_times_layers_width_and_sequence():
    assert flops.attention_flops_per_token(meta(), 100) == 12 * 24 * 896 * 100
    windows = {"sliding_window": 30, "layer_types": ["sliding_attention"] * 20 + ["full_attention"] * 4}
    assert flops.attention_flops_per_token(meta(**windows), 100) == 12 * 896 * (20 * 30 + 4 * 100)
    assert flops.attention_flops_per_token(meta(**windows), 20) == flops.attention_flops_per_token(meta(), 20)
    assert flops.attention_flops_per_token(torch.nn.Linear(2, 2), 100) == 0  # whose shape is not known


def test_the_count_is_what_torch_counts_for_matrix_products(tiny):
    """Forward and backward of a real model; torch's counter knows no causal mask either."""
    from torch.utils.flop_counter import FlopCounterMode

    model = Bumblebee(tiny(), attention="naive")
    ids = torch.arange(64).expand(3, 64)
    with FlopCounterMode(display=False) as counter:
        logits = model(ids)
        logits.sum().backward()
    norms = sum(p.numel() for name, p in model.named_parameters() if p.dim() < 2)  # no matrix product: elementwise
    ours = ids.numel() * (flops.weight_flops_per_token(model) - 6 * norms + flops.attention_flops_per_token(model, 64))
    assert counter.get_total_flops() == pytest.approx(ours, rel=1e-6)


def test_of_routed_experts_only_those_that_a_token_goes_to_count():
    class Moe(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = SimpleNamespace(num_experts_per_tok=2, num_experts=8)
            self.mlp = torch.nn.ModuleDict({"experts": torch.nn.ModuleList(torch.nn.Linear(4, 4, False) for _ in range(8))})

    assert flops.weight_flops_per_token(Moe()) == 6 * 2 * 16


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA H200 NVL", 836.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("Tesla T4", None),
    ],
)
def test_peaks_are_looked_up_by_the_devices_name(name, peak):
    assert flops.peak_tflops(name) == peak


def test_the_peak_of_a_cpu_is_measured_and_the_random_state_left_alone():
    before = torch.get_rng_state()
    assert 1e-4 < flops.measure_peak_tflops(torch.float32, seconds=0.05) < 100
    assert flops.measure_peak_tflops(torch.bfloat16, seconds=0.0, size=64) > 0
    assert torch.equal(torch.get_rng_state(), before)


# -- in a run ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(fit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    uses = {"throughput": Throughput(every=2, peak_tflops=0.5), "history": MetricsHistory(), "validation": Validation(every=3)}
    return fit(folder, uses, max_steps=6)


def test_figures_are_in_every_second_line_of_metrics(run, read_lines):
    lines = [line for line in read_lines(run.folder / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in lines if FIGURES <= set(line)] == [2, 4, 6]
    assert not any(FIGURES & set(line) for line in lines if line["step"] % 2)


def test_figures_agree_with_each_other(run, read_lines):
    model = run.trainer.task.model
    each = flops.weight_flops_per_token(model) + flops.attention_flops_per_token(
        model, 8
    )  # rows of eight tokens, all of them targets
    for line in read_lines(run.folder / "metrics.jsonl"):
        if "tflops" in line:
            assert line["tflops"] * 1e12 == pytest.approx(each * line["tokens_per_second"])
            assert line["mfu"] == pytest.approx(line["tflops"] / 0.5)
            assert 0.05 < line["memory_gb"] < 20


def test_the_run_ends_with_one_line_about_all_of_it(run):
    line = run.text.splitlines()[-1]
    assert re.fullmatch(
        r"throughput: \S+( k)? tokens/s · \S+ TFLOP/s per device · MFU \S+% of 0\.5 TFLOP/s · peak memory \S+ GB", line
    )


def test_the_model_keeps_no_hook(run):
    hooks = run.trainer.task.model._forward_pre_hooks.values()
    assert not [hook for hook in hooks if isinstance(getattr(hook, "__self__", None), Throughput)]


def test_rows_without_targets_are_work_but_no_tokens(fit, tmp_path, monkeypatch):
    """Half of the targets taken away: half the tokens a second, the same operations."""
    callback = Throughput(every=1, peak_tflops=1.0)

    class Half(MetricsHistory):
        def on_fit_start(self, trainer):
            whole = trainer.task.counts
            trainer.task.counts = lambda batch: {name: count // 2 for name, count in whole(batch).items()}

        def on_log(self, trainer, metrics):
            if "tflops" in metrics:
                ratios.append(metrics["tflops"] * 1e12 / metrics["tokens_per_second"])

    ratios: list[float] = []
    run = fit(tmp_path / "run", {"half": Half(), "throughput": callback}, max_steps=2)
    model = run.trainer.task.model
    assert ratios == [pytest.approx(2 * (flops.weight_flops_per_token(model) + flops.attention_flops_per_token(model, 8)))]


def test_parameters_are_counted_whole_under_zero_3(fit, run, tmp_path):
    callback = Throughput(peak_tflops=1.0)
    fit(tmp_path / "run", {"throughput": callback}, max_steps=1, zero_stage=3)
    assert callback._flops_per_token == flops.weight_flops_per_token(run.trainer.task.model)


# -- the clock ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr("callbacks.throughput.time.perf_counter", lambda: now.seconds)
    return now


def test_only_steps_are_timed_and_not_what_lies_between_them(fake, clock):
    trainer = fake([Throughput(every=4, peak_tflops=1.0)], steps=8)
    trainer.call("on_fit_start")
    for step in range(1, 5):
        trainer.call("on_step_start")
        clock.seconds += 100.0 if step == 1 else 2.0  # the first one compiles and allocates
        trainer.step, trainer.tokens = step, trainer.tokens + 100
        if step == 3:
            clock.seconds += 1000.0
            trainer.call("on_validation_end", {"validation_loss": 1.0})  # of a callback that comes first
        trainer.call("on_step_end")
        clock.seconds += 5000.0
        trainer.call("on_save")
    assert trainer.logged["tokens_per_second"] == 50.0


def test_a_validation_after_the_step_was_timed_costs_nothing(fake, clock):
    trainer = fake([Throughput(every=2, peak_tflops=1.0)], steps=8)
    trainer.call("on_fit_start")
    for step in (1, 2):
        trainer.call("on_step_start")
        clock.seconds += 2.0
        trainer.step, trainer.tokens = step, trainer.tokens + 100
        trainer.call("on_step_end")
        clock.seconds += 1000.0
        trainer.call("on_validation_end", {"validation_loss": 1.0})
    assert trainer.logged["tokens_per_second"] == 50.0


def test_a_run_of_one_step_has_nothing_to_say(fake, capsys):
    trainer = fake([Throughput(every=1, peak_tflops=1.0)], steps=1).run()
    assert trainer.logged == {} and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"peak_tflops": 0.0}, "peak_tflops must be greater than 0 or null, got 0.0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Throughput(**options)


@pytest.mark.gpu
def test_a_gpus_memory_and_share_of_its_peak(fit, tmp_path):
    callback = Throughput(every=1)
    run = fit(tmp_path / "run", {"throughput": callback}, max_steps=3, precision="bf16", device="cuda")
    assert run.error is None and 0 < callback._memory < 10
    known = flops.peak_tflops(torch.cuda.get_device_name()) is not None
    assert "TFLOP/s per device" in run.text and ("MFU" in run.text) == known
