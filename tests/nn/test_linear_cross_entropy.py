"""The chunked cross-entropy and its gradients equal torch's on full logits, for any chunk size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy as whole_cross_entropy

from bumblebee.nn.linear_cross_entropy import LossWeighting, Positions, is_uniform, linear_cross_entropy, row_slices

MODULE = "bumblebee.nn.linear_cross_entropy"
D, V = 8, 11


@pytest.fixture(params=[(1, 1), (3, V), (3, 2 * V), (2**20, 2**20)], ids=["rows", "chunks", "blocks in chunks", "one chunk"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(f"{MODULE}.ROWS", {"cpu": request.param[0]})
    monkeypatch.setattr(f"{MODULE}.SOFTMAX_LOGITS", dict.fromkeys(("cpu", "cuda"), request.param[1]))


def inputs(rows: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    hidden, weight = torch.randn(rows, D, generator=generator), torch.randn(V, D, generator=generator)
    labels = torch.randint(V, (rows,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def naive(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return whole_cross_entropy((hidden @ weight.T).float(), labels, reduction="none")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 10])
@pytest.mark.parametrize("weights", ["alike", "each its own"])
def test_losses_and_gradients_equal_those_of_the_whole_logits(chunk, rows, weights, dtype, tolerance):
    hidden, weight, labels = inputs(rows, dtype)
    slopes = torch.linspace(0.5, 0.5 if weights == "alike" else 2.0, rows)
    ours, reference = linear_cross_entropy(hidden, weight, labels), naive(hidden, weight, labels)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, reference, rtol=0, atol=1e-5)
    pairs = [torch.autograd.grad(losses, (hidden, weight), slopes) for losses in (ours, reference)]
    assert [grad.dtype for grad in pairs[0]] == [dtype, dtype]
    torch.testing.assert_close(pairs[0], pairs[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("uniform", [True, False], ids=["gradients in the forward pass", "losses only"])
def test_entropies_are_those_of_the_whole_logits(chunk, uniform, monkeypatch):
    """And change neither losses nor gradients."""
    monkeypatch.setattr(f"{MODULE}.ENTROPY_LOGITS", {"cpu": 2 * V, "cuda": 2 * V})
    hidden, weight, labels = inputs(10)
    entropies = torch.full((10,), torch.nan)
    losses = linear_cross_entropy(hidden, weight, labels, LossWeighting(uniform), entropies=entropies)
    logs = (hidden @ weight.T).double().log_softmax(-1)
    torch.testing.assert_close(entropies.double(), -(logs.exp() * logs).sum(-1).detach(), rtol=0, atol=1e-6)
    plain = linear_cross_entropy(hidden, weight, labels, LossWeighting(uniform))
    assert torch.equal(losses, plain) and not entropies.requires_grad
    pairs = [torch.autograd.grad(each.sum(), (hidden, weight)) for each in (losses, plain)]
    assert all(torch.equal(*both) for both in zip(*pairs, strict=True))


def test_no_rows_give_no_losses_and_zero_gradients(chunk):
    hidden, weight, labels = inputs(0)
    losses = linear_cross_entropy(hidden, weight, labels)
    losses.sum().backward()
    assert losses.shape == (0,) and weight.grad.eq(0).all()


def test_huge_logits_give_finite_losses_and_gradients(chunk):
    hidden, weight, labels = inputs(4)
    losses = linear_cross_entropy(1e4 * hidden, weight, labels)
    losses.sum().backward()
    assert losses.isfinite().all() and weight.grad.isfinite().all() and hidden.grad.isfinite().all()


def test_what_the_backward_passes_found_changes_no_gradient(chunk):
    """Whether slopes were taken in the forward pass, in the backward pass, or in both."""
    hidden, weight, labels = inputs(10)
    weighting = LossWeighting()
    alike, own = torch.full((10,), 0.3), torch.linspace(0.5, 2.0, 10)
    actual = []
    for slopes in (alike, own, own, alike, alike):
        losses = linear_cross_entropy(hidden, weight, labels, weighting)
        actual.append(torch.autograd.grad(losses, (hidden, weight), slopes))
        assert weighting.uniform == (slopes is alike)
    for first, second in ((0, 3), (0, 4), (1, 2)):
        assert all(torch.equal(a, b) for a, b in zip(actual[first], actual[second], strict=True))


def test_losses_of_different_weights_make_no_gpu_wait():
    weights = torch.ones(3, device="meta")  # whose values cannot be read
    assert not is_uniform(weights)
    assert is_uniform(torch.ones((), device="meta").expand(3))


def test_a_second_backward_pass_gives_the_same_gradients(chunk):
    hidden, weight, labels = inputs(10)
    losses = linear_cross_entropy(hidden, weight, labels).sum()
    once, twice = (torch.autograd.grad(losses, (hidden, weight), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def test_only_the_gradients_that_are_asked_for_are_computed(chunk):
    hidden, weight, labels = inputs(10)
    linear_cross_entropy(hidden, weight.detach(), labels).sum().backward()
    expected = torch.autograd.grad(naive(hidden, weight, labels).sum(), hidden)[0]
    torch.testing.assert_close(hidden.grad, expected)
    assert weight.grad is None


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 50), st.integers(1, 60))
def test_a_cut_has_every_row_once_and_in_order(rows, size):
    slices = row_slices(rows, size)
    assert [row for part in slices for row in range(rows)[part]] == list(range(rows))


def test_sum_of_losses_is_recognized_without_reading_its_gradient():
    """The gradient of a sum is an expanded number; reading it would make the CPU wait for a GPU."""
    hidden, weight, labels = inputs(5)
    positions = Positions(torch.tensor([6, 0, 2, 3, 9]), 10)
    weighting = LossWeighting(uniform=False)
    losses = linear_cross_entropy(hidden, weight, labels, weighting, positions)
    torch.testing.assert_close(losses[positions.index], naive(hidden, weight, labels))
    assert losses.count_nonzero() == 5
    (2 * losses.view(2, 5).sum()).backward()
    assert weighting.uniform
    other_hidden, other_weight, _ = inputs(5)
    (2 * naive(other_hidden, other_weight, labels).sum()).backward()
    torch.testing.assert_close((hidden.grad, weight.grad), (other_hidden.grad, other_weight.grad))
