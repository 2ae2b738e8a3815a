"""A mixture of experts and its gradients equal a loop over tokens, for any routing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import silu

from bumblebee.nn.moe import Experts, MixtureOfExperts, mixture_of_experts

D, INNER = 6, 5


def naive(moe: MixtureOfExperts, x: torch.Tensor) -> torch.Tensor:
    """One token at a time, with the formulas as in the papers."""
    gate, rows = moe.gate, []
    for token in x.flatten(0, 1):
        scores = (gate.weight @ token).softmax(0)
        bias = 0.0 if gate.e_score_correction_bias is None else gate.e_score_correction_bias
        chosen = (scores + bias).argsort(descending=True)[: gate.top_k]
        whole = scores[chosen].sum() if gate.normalise else 1.0
        row = torch.zeros_like(token)
        for expert in chosen:
            first, second = (moe.experts.gate_up_proj[expert] @ token).split(INNER)
            row = row + scores[expert] / whole * (moe.experts.down_proj[expert] @ (silu(first) * second))
        if moe.shared_experts is not None:
            shared = moe.shared_experts(token)
            row = row + (shared if moe.shared_expert_gate is None else moe.shared_expert_gate(token).sigmoid() * shared)
        rows.append(row)
    return torch.stack(rows).view(x.shape)


def build(seed: int = 0, **options) -> MixtureOfExperts:
    moe = mixture_of_experts(D, INNER, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(std=0.5, generator=generator)
        if moe.gate.e_score_correction_bias is not None:
            moe.gate.e_score_correction_bias.normal_(std=0.5, generator=generator)
    return moe


def assert_equal_to_naive(moe: MixtureOfExperts, x: torch.Tensor) -> None:
    x = x.requires_grad_()
    slopes = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    inputs = [x, *moe.parameters()]
    ours, reference = moe(x), naive(moe, x)
    torch.testing.assert_close(ours, reference, rtol=1e-5, atol=5e-6)
    actual, wanted = (torch.autograd.grad(out, inputs, slopes, allow_unused=True) for out in (ours, reference))
    for grad, expected in zip(actual, wanted, strict=True):
        torch.testing.assert_close(grad, torch.zeros_like(grad) if expected is None else expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=60)
@given(
    rows=st.integers(1, 3), positions=st.integers(1, 9), num_experts=st.integers(1, 7), data=st.data(),
    normalise=st.booleans(), bias=st.booleans(), shared=st.integers(0, 2), gated=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_outputs_and_gradients_equal_a_loop_over_tokens(
    rows, positions, num_experts, data, normalise, bias, shared, gated, seed
):
    moe = build(
        seed, num_experts=num_experts, top_k=data.draw(st.integers(1, num_experts)), normalise=normalise, bias=bias,
        n_shared_experts=shared, shared_expert_gate=gated,
    )  # fmt: skip
    assert_equal_to_naive(moe, torch.randn(rows, positions, D, generator=torch.Generator().manual_seed(seed)))


def test_an_expert_may_have_no_token_or_all_of_them():
    moe = build(num_experts=4, top_k=2)
    with torch.no_grad():
        moe.gate.weight[0], moe.gate.weight[1] = 4.0, 3.0  # of tokens with positive entries these two get all
    x = torch.rand(2, 8, D)
    assert moe.gate(x.flatten(0, 1)).experts.flatten().bincount(minlength=4).tolist() == [16, 16, 0, 0]
    assert_equal_to_naive(moe, x)
    moe(x).sum().backward()
    assert moe.experts.gate_up_proj.grad[2:].eq(0).all(), "there is a gradient, of zeros, for experts without tokens"


def test_no_token_is_dropped_when_all_choose_one_expert():
    moe = build(num_experts=3, top_k=1, normalise=False)
    with torch.no_grad():
        moe.gate.weight[0] = 9.0
    assert_equal_to_naive(moe, torch.rand(1, 50, D))


def test_bias_affects_selection_but_not_output_weights():
    moe = build(num_experts=4, top_k=1, normalise=False, bias=True)
    x = torch.randn(20, D)
    moe.gate.e_score_correction_bias = torch.tensor([0.0, 0.0, 9.0, 0.0])
    routed = moe.gate(x)
    assert routed.experts.eq(2).all()
    torch.testing.assert_close(routed.weights[:, 0], routed.logits.softmax(-1)[:, 2])


def test_casting_the_model_leaves_the_bias_in_fp32():
    moe = build(num_experts=4, top_k=1, bias=True)
    before = moe.gate.e_score_correction_bias.clone()
    moe.to(torch.bfloat16)
    assert moe.gate.weight.dtype == torch.bfloat16
    assert moe.gate.e_score_correction_bias.equal(before)


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_in_bf16_the_router_is_computed_in_fp32(how):
    moe, x = build(num_experts=4, top_k=2), torch.randn(1, 30, D).bfloat16()
    exact = moe.bfloat16().float()(x.float())
    if how == "weights":
        out = moe.bfloat16()(x)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            out = moe(x.float())
    assert out.dtype == torch.bfloat16 and moe.gate(x[0]).logits.dtype == torch.float32
    torch.testing.assert_close(out.float(), exact, rtol=0.05, atol=0.05)


def test_shared_experts_are_as_wide_as_all_of_them_together():
    assert mixture_of_experts(D, INNER, num_experts=2, top_k=1, n_shared_experts=3).shared_experts.up_proj.weight.shape == (
        3 * INNER,
        D,
    )
    assert mixture_of_experts(D, INNER, num_experts=2, top_k=1).shared_experts is None


def test_experts_with_a_grouped_kernel_never_wait_for_the_gpu(monkeypatch):
    """A meta tensor has no values, so that whatever reads one, such as bincount, raises."""
    monkeypatch.setattr("bumblebee.nn.grouped_linear.has_grouped_kernel", lambda x, weight: True)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # it does not know meta
    with torch.device("meta"):
        experts = Experts(4, 32, 16).to(torch.bfloat16)
        x = torch.empty(16, 32, dtype=torch.bfloat16, requires_grad=True)
        chosen, weights = torch.empty(16, 2, dtype=torch.int64), torch.empty(16, 2)
    experts(x, chosen, weights).sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
