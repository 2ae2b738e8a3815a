"""RMSNorm and the MLPs equal their formulas; RMSNorm has fp32 statistics in bf16 too."""

from __future__ import annotations

import pytest
import torch

from bumblebee import config
from bumblebee.nn.mlp import ACTIVATIONS, MLP, GatedMLP
from bumblebee.nn.norm import NORMS, RMSNorm


def test_rms_norm_equals_its_formula():
    norm, x = RMSNorm(16, eps=1e-3), torch.randn(2, 3, 16)
    torch.nn.init.normal_(norm.weight)
    expected = norm.weight * x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-3)
    torch.testing.assert_close(norm(x), expected)


def test_rms_norm_in_bf16_has_fp32_statistics():
    """1000 equal values: their squares summed in bf16 would stop growing at 256 of them."""
    x = torch.full((1, 1000), 3.0, dtype=torch.bfloat16)
    out = RMSNorm(1000).bfloat16()(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=0)


def test_rms_norm_of_a_huge_bf16_input_is_finite():
    x = torch.tensor([[1e18, -1e18]], dtype=torch.bfloat16)
    torch.testing.assert_close(RMSNorm(2).bfloat16()(x), torch.tensor([[1.0, -1.0]], dtype=torch.bfloat16))


def test_swiglu_equals_its_formula():
    torch.manual_seed(0)
    ffn, x = GatedMLP(8, 12), torch.randn(2, 3, 8)
    gate, up, down = ffn.gate_proj.weight, ffn.up_proj.weight, ffn.down_proj.weight
    torch.testing.assert_close(ffn(x), ((x @ gate.T) * torch.sigmoid(x @ gate.T) * (x @ up.T)) @ down.T)


def test_a_config_knows_the_activations_and_norms_that_there_are():
    assert (*ACTIVATIONS,) == config.ACTIVATIONS and (*NORMS,) == config.NORMS


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_each_activation_is_transformers(name):
    from transformers.activations import ACT2FN

    x = torch.linspace(-6, 6, 1001)
    torch.testing.assert_close(ACTIVATIONS[name](x), ACT2FN[name](x), rtol=0, atol=1e-6)


def test_gated_mlp_equals_its_formula():
    torch.manual_seed(0)
    ffn, x = GatedMLP(8, 12, "relu2", bias=True), torch.randn(2, 3, 8)
    gate, up = (layer.weight @ x[..., None] + layer.bias[:, None] for layer in (ffn.gate_proj, ffn.up_proj))
    inner = (gate.clamp(min=0) ** 2 * up)[..., 0]
    torch.testing.assert_close(ffn(x), inner @ ffn.down_proj.weight.T + ffn.down_proj.bias)


def test_a_plain_ffn_equals_its_formula():
    torch.manual_seed(0)
    ffn, x = MLP(8, 12, "relu", bias=True), torch.randn(2, 3, 8)
    inner = (x @ ffn.up_proj.weight.T + ffn.up_proj.bias).clamp(min=0)
    torch.testing.assert_close(ffn(x), inner @ ffn.down_proj.weight.T + ffn.down_proj.bias)
