"""Cross-entropy in chunks equals torch's over the whole logits, with its gradients, however small the chunks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy as whole_cross_entropy

from bumblebee.nn import cross_entropy
from bumblebee.nn.cross_entropy import linear_cross_entropy

D, V = 8, 11


@pytest.fixture(params=[1, 3 * V, 2**20], ids=["one row a chunk", "three rows a chunk", "one chunk"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_ELEMENTS", request.param)


def inputs(rows: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    hidden, weight = torch.randn(rows, D, generator=generator), torch.randn(V, D, generator=generator)
    labels = torch.randint(V, (rows,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def naive(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return whole_cross_entropy((hidden @ weight.T).float(), labels, reduction="none")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 10])
def test_losses_and_gradients_equal_those_of_the_whole_logits(chunk, rows, dtype, tolerance):
    hidden, weight, labels = inputs(rows, dtype)
    slopes = torch.linspace(0.5, 2.0, rows)  # each row's loss is weighted in its own way
    ours, theirs = linear_cross_entropy(hidden, weight, labels), naive(hidden, weight, labels)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    pairs = [torch.autograd.grad(losses, (hidden, weight), slopes) for losses in (ours, theirs)]
    assert [grad.dtype for grad in pairs[0]] == [dtype, dtype]
    torch.testing.assert_close(pairs[0], pairs[1], rtol=tolerance, atol=tolerance)


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


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 50), st.integers(1, 2**21))
def test_chunks_cover_every_row_once_and_in_order(rows, vocabulary):
    slices = cross_entropy._chunks(rows, vocabulary)
    assert [row for part in slices for row in range(rows)[part]] == list(range(rows))
