"""Router losses equal their formulas, and each term is counted as it is summed."""

from __future__ import annotations

import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

os.environ["HF_HUB_OFFLINE"] = "1"

from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func  # noqa: E402

from bumblebee.nn.moe import mixture_of_experts  # noqa: E402
from bumblebee.nn.router_losses import (  # noqa: E402
    RouterLosses,  # noqa: E402
    batch_balance_loss,
    entropy,
    expert_load,
    sequence_balance_loss,
    z_loss,
)


def routed(rows: int, positions: int, num_experts: int, top_k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.randn(rows, positions, num_experts, generator=torch.Generator().manual_seed(seed))
    return logits, logits.topk(top_k).indices


def plain_balance(logits: torch.Tensor, experts: torch.Tensor) -> float:
    """Of one sequence without padding: sum over e of f_e P_e, as DeepSeekMoE writes it."""
    length, num_experts = logits.shape
    top_k, total = experts.shape[1], 0.0
    for expert in range(num_experts):
        chosen = sum(int(expert in tokens) for tokens in experts.tolist())
        f = num_experts / (top_k * length) * chosen
        p = sum(math.exp(row[expert]) / sum(map(math.exp, row)) for row in logits.tolist()) / length
        total += f * p
    return total


@settings(max_examples=30)
@given(
    rows=st.integers(1, 3),
    positions=st.integers(1, 6),
    num_experts=st.integers(2, 5),
    top_k=st.integers(1, 2),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_balance_equals_its_formula_over_what_is_no_padding(rows, positions, num_experts, top_k, seed, data):
    logits, experts = routed(rows, positions, num_experts, top_k, seed)
    lengths = data.draw(st.lists(st.integers(0, positions), min_size=rows, max_size=rows))
    counted = torch.arange(positions) < torch.tensor(lengths)[:, None]
    actual = sequence_balance_loss(logits, experts, counted)
    for row, length in enumerate(lengths):
        expected = plain_balance(logits[row, :length], experts[row, :length]) if length else 0.0
        assert actual[row].item() == pytest.approx(expected, abs=1e-5)
    whole = plain_balance(logits[counted], experts[counted]) if counted.any() else 0.0
    assert batch_balance_loss(logits, experts, counted).item() == pytest.approx(whole, abs=1e-5)


def test_balance_loss_of_even_and_extreme_load():
    logits = torch.zeros(2, 512, 8)
    even = torch.arange(512 * 2).view(1, 512, 2).expand(2, -1, -1) % 8
    torch.testing.assert_close(sequence_balance_loss(logits, even, torch.ones(2, 512, dtype=torch.bool)), torch.ones(2))
    one = torch.full((2, 512, 8), -99.0)
    one[..., 3] = 99.0
    actual = sequence_balance_loss(one, torch.full((2, 512, 1), 3), torch.ones(2, 512, dtype=torch.bool))
    torch.testing.assert_close(actual, torch.full((2,), 8.0))


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("padded", [False, True])
def test_batch_balance_is_transformers_loss_of_one_layer_over_k(top_k, padded):
    logits, experts = routed(3, 20, 4, top_k)
    counted = torch.arange(20) < torch.tensor([[20], [7], [12]]) if padded else torch.ones(3, 20, dtype=torch.bool)
    reference = load_balancing_loss_func((logits.flatten(0, 1),), 4, top_k, counted.long() if padded else None)
    torch.testing.assert_close(top_k * batch_balance_loss(logits, experts, counted), reference)


def test_z_loss_and_entropy_equal_their_formulas():
    logits, _ = routed(2, 5, 4, 1)
    counted = torch.arange(5) < torch.tensor([[5], [2]])
    torch.testing.assert_close(z_loss(logits, counted), logits.exp().sum(-1).log() ** 2 * counted)
    p = logits.softmax(-1)
    torch.testing.assert_close(entropy(logits, counted), -(p * p.log()).sum(-1) * counted)


def test_loads_count_each_choice_of_each_token():
    experts = torch.tensor([[[0, 1], [1, 3], [2, 3]]])
    assert expert_load(experts, torch.tensor([[True, True, False]]), 4).tolist() == [[1, 2, 0, 1]]


def test_huge_logits_give_finite_losses_and_gradients():
    logits = (1e4 * routed(2, 6, 4, 2)[0]).requires_grad_()
    counted = torch.ones(2, 6, dtype=torch.bool)
    experts = logits.topk(2).indices
    (sequence_balance_loss(logits, experts, counted).sum() + 1e-9 * z_loss(logits, counted).sum()).backward()
    assert logits.grad.isfinite().all() and entropy(logits, counted).isfinite().all()


# -- over the layers of a model --------------------------------------------------------------------------------------------


def losses_of(layers: int = 2, **options) -> RouterLosses:
    torch.manual_seed(0)
    moes = [mixture_of_experts(6, 5, 4, 2, bias=options.get("bias_update_rate") is not None) for _ in range(layers)]
    for parameter in (p for moe in moes for p in moe.parameters()):
        torch.nn.init.normal_(parameter)
    return RouterLosses(moes, **{"balance": "sequence", "balance_weight": 0.1, "z_weight": 0.01, **options})


def record(losses: RouterLosses, x: torch.Tensor, counted: torch.Tensor) -> dict[str, torch.Tensor]:
    with losses.recorded():
        for layer in losses.layers:
            layer(x)
    return losses.losses(counted)


def all_of(x: torch.Tensor) -> torch.Tensor:
    return torch.ones(x.shape[:2], dtype=torch.bool)


def test_terms_are_sums_whose_means_are_the_published_losses():
    losses, x = losses_of(), torch.randn(3, 7, 6)
    counted = torch.arange(7) < torch.tensor([[7], [4], [0]])
    actual, counts = record(losses, x, counted), losses.counts(counted)
    assert {name: int(count) for name, count in counts.items()} == {"router/balance": 2 * 2, "router/z": 2 * 11}
    of_layers = [layer.gate(x.flatten(0, 1)) for layer in losses.layers]
    balance = [sequence_balance_loss(r.logits.view(3, 7, 4), r.experts.view(3, 7, 2), counted)[:2].mean() for r in of_layers]
    z = [z_loss(r.logits.view(3, 7, 4), counted).sum() / 11 for r in of_layers]
    total = sum(losses.weights[name] * actual[name] / counts[name] for name in actual)
    torch.testing.assert_close(total, 0.1 * sum(balance) + 0.01 * sum(z))


def test_batch_loss_weights_micro_batches_by_tokens():
    losses, x = losses_of(balance="batch", z_weight=0.0), torch.randn(3, 7, 6)
    counted = torch.arange(7) < torch.tensor([[7], [4], [0]])
    assert int(losses.counts(counted)["router/balance"]) == 2 * 11
    of_layers = [layer.gate(x.flatten(0, 1)) for layer in losses.layers]
    expected = sum(batch_balance_loss(r.logits.view(3, 7, 4), r.experts.view(3, 7, 2), counted) for r in of_layers)
    torch.testing.assert_close(record(losses, x, counted)["router/balance"], 11 * expected)


def test_a_weight_of_zero_leaves_the_term_out():
    losses, x = losses_of(balance_weight=0.0, z_weight=0.0), torch.randn(1, 4, 6)
    assert record(losses, x, all_of(x)) == {} and losses.counts(all_of(x)) == {} and losses.weights == {}
    assert losses.metrics(lambda loads: loads)["router/load"] >= 1, "the load is logged all the same"


def test_recording_needs_context_and_gradients():
    losses, x = losses_of(), torch.randn(1, 4, 6)
    with losses.recorded(), torch.no_grad():
        for layer in losses.layers:
            layer(x)
    for layer in losses.layers:
        layer(x)
    assert losses.metrics(lambda loads: loads) == {}
    assert record(losses, x, all_of(x)).keys() == {"router/balance", "router/z"}


def test_metrics_cover_all_micro_batches_since_last_log():
    losses, parts = losses_of(), [torch.randn(1, 9, 6), torch.randn(2, 5, 6)]
    for x in parts:
        record(losses, x, all_of(x))
    actual = losses.metrics(lambda numbers: numbers)
    tokens = torch.cat([x.flatten(0, 1) for x in parts])
    of_layers = [layer.gate(tokens) for layer in losses.layers]
    busiest = [4 * r.experts.flatten().bincount(minlength=4).max().item() / (2 * len(tokens)) for r in of_layers]
    assert actual["router/load"] == pytest.approx(sum(busiest) / 2) and actual["router/load_worst"] == pytest.approx(
        max(busiest)
    )
    all_tokens = torch.ones(1, len(tokens), dtype=torch.bool)
    entropies = [entropy(r.logits[None], all_tokens).mean().item() for r in of_layers]
    assert actual["router/entropy"] == pytest.approx(sum(entropies) / 2)
    assert losses.metrics(lambda numbers: numbers) == {}


def test_step_updates_each_bias_once_from_total_load():
    losses, parts = losses_of(bias_update_rate=0.5), [torch.randn(1, 9, 6), torch.randn(2, 5, 6)]
    before = [layer.gate.e_score_correction_bias.clone() for layer in losses.layers]
    for x in parts:
        record(losses, x, all_of(x))
    tokens = torch.cat([x.flatten(0, 1) for x in parts])
    counts = [layer.gate(tokens).experts.flatten().bincount(minlength=4) for layer in losses.layers]
    losses.after_step(lambda loads: loads)
    for layer, bias, count in zip(losses.layers, before, counts, strict=True):
        expected = bias + 0.5 * torch.sign(count.float().mean() - count)
        torch.testing.assert_close(layer.gate.e_score_correction_bias, expected, rtol=0, atol=0)
    after = [layer.gate.e_score_correction_bias.clone() for layer in losses.layers]
    losses.after_step(lambda loads: loads)
    assert all(torch.equal(layer.gate.e_score_correction_bias, bias) for layer, bias in zip(losses.layers, after, strict=True))


def test_the_bias_of_a_frozen_router_stays():
    losses, x = losses_of(bias_update_rate=0.5), torch.randn(1, 9, 6)
    losses.layers[0].gate.requires_grad_(False)
    record(losses, x, all_of(x))
    losses.after_step(lambda loads: loads)
    assert not losses.layers[0].gate.e_score_correction_bias.any() and losses.layers[1].gate.e_score_correction_bias.any()


def test_the_bias_evens_out_what_a_lopsided_router_chooses():
    losses = losses_of(layers=1, balance_weight=0.0, z_weight=0.0, bias_update_rate=0.004)
    gate = losses.layers[0].gate
    x = torch.randn(1, 400, 6, generator=torch.Generator().manual_seed(1))
    x[..., 0] = 1.0
    with torch.no_grad():
        gate.weight[0, 0] = 3.0  # whatever the token
    uneven = []
    for _ in range(300):
        record(losses, x, all_of(x))
        losses.after_step(lambda loads: loads)
        uneven.append(losses.metrics(lambda numbers: numbers)["router/load"])
    assert uneven[0] > 1.5 and uneven[-1] < 1.15
