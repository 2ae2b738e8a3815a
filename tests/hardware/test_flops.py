"""FLOP counts of models, and the peak FLOP/s of devices."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from bumblebee.config import BumblebeeConfig
from bumblebee.hardware import flops
from bumblebee.lora import LoRA
from bumblebee.model import Bumblebee


def meta_model(**changes):
    with torch.device("meta"):
        return Bumblebee(BumblebeeConfig.preset("0.5b", **changes))


@pytest.mark.parametrize("tied", [True, False])
def test_weights_need_6_flops_per_token_without_the_embedding(tied):
    model = meta_model(tie_word_embeddings=tied)
    table = model.config.vocab_size * model.config.hidden_size
    blocks = model.num_parameters() - table * (1 if tied else 2)
    assert flops.weight_flops_per_token(model) == 6 * (blocks + table)


def test_frozen_weights_need_4_flops_per_token():
    model = meta_model()
    full = flops.weight_flops_per_token(model)
    model.requires_grad_(False)
    assert flops.weight_flops_per_token(model) == pytest.approx(full * 4 / 6)
    model.model.layers[0].mlp.requires_grad_(True)
    trained = sum(p.numel() for p in model.model.layers[0].mlp.parameters())
    assert flops.weight_flops_per_token(model) == pytest.approx(full * 4 / 6 + 2 * trained)


def test_lora_needs_6_flops_for_adapters_and_4_for_the_base(tiny, tmp_path):
    Bumblebee(tiny()).save_pretrained(tmp_path)
    model = Bumblebee.from_pretrained(tmp_path)
    full = flops.weight_flops_per_token(model)
    LoRA(rank=4)(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert flops.weight_flops_per_token(model) == pytest.approx(full * 4 / 6 + 6 * trained)


def test_attention_flops_with_and_without_sliding_window():
    assert flops.attention_flops_per_token(meta_model(), 100) == 12 * 24 * 896 * 100
    windows = {"sliding_window": 30, "layer_types": ["sliding_attention"] * 20 + ["full_attention"] * 4}
    assert flops.attention_flops_per_token(meta_model(**windows), 100) == 12 * 896 * (20 * 30 + 4 * 100)
    assert flops.attention_flops_per_token(meta_model(**windows), 20) == flops.attention_flops_per_token(meta_model(), 20)
    assert flops.attention_flops_per_token(torch.nn.Linear(2, 2), 100) == 0  # unknown shape


def test_count_equals_torch_flop_counter(tiny):
    """Forward and backward of a real model. Like ours, PyTorch's counter ignores the causal mask."""
    from torch.utils.flop_counter import FlopCounterMode

    model = Bumblebee(tiny(), attention="naive")
    ids = torch.arange(64).expand(3, 64)
    with FlopCounterMode(display=False) as counter:
        logits = model(ids)
        logits.sum().backward()
    norms = sum(p.numel() for name, p in model.named_parameters() if p.dim() < 2)  # elementwise, not matrix products
    expected = ids.numel() * (flops.weight_flops_per_token(model) - 6 * norms + flops.attention_flops_per_token(model, 64))
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-6)


def test_only_active_experts_count():
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
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA B300 SXM6 AC", 2250.0),
        ("NVIDIA H20", 148.0),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla T4", None),
    ],
)
def test_peak_is_looked_up_by_device_name(name, peak):
    assert flops.peak_tflops(name) == peak


def test_measuring_the_cpu_peak_keeps_the_random_state():
    before = torch.get_rng_state()
    assert 1e-4 < flops.measure_peak_tflops(torch.float32, seconds=0.05) < 100
    assert flops.measure_peak_tflops(torch.bfloat16, seconds=0.0, size=64) > 0
    assert torch.equal(torch.get_rng_state(), before)
