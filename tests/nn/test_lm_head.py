"""The head's losses equal the cross-entropy of its logits; positions without a target are skipped."""

from __future__ import annotations

import pytest
import torch

from bumblebee.nn import IGNORE_INDEX
from bumblebee.nn.lm_head import LMHead

B, T, C, V = 2, 5, 8, 11


@pytest.fixture
def head():
    torch.manual_seed(0)
    return LMHead(C, V)


@pytest.fixture
def hidden(head):
    return torch.randn(B, T, C, requires_grad=True)


LABELS = torch.tensor([[1, 2, IGNORE_INDEX, 4, 10], [IGNORE_INDEX, 0, IGNORE_INDEX, 3, IGNORE_INDEX]])


def test_losses_are_minus_the_log_probability_of_each_label(head, hidden):
    losses = head(hidden, LABELS)
    log_probabilities = head(hidden).log_softmax(-1)
    for b, t in torch.cartesian_prod(torch.arange(B), torch.arange(T)).tolist():
        expected = 0.0 if LABELS[b, t] == IGNORE_INDEX else -log_probabilities[b, t, LABELS[b, t]].item()
        assert losses[b, t].item() == pytest.approx(expected, abs=1e-5)


def test_hidden_states_without_a_target_get_no_gradient(head, hidden):
    head(hidden, LABELS).sum().backward()
    assert (hidden.grad[LABELS == IGNORE_INDEX] == 0).all()
    assert (hidden.grad[LABELS != IGNORE_INDEX].abs().sum(-1) > 0).all()


def test_batch_without_targets_has_zero_loss_and_gradients(head, hidden):
    losses = head(hidden, torch.full((B, T), IGNORE_INDEX))
    losses.sum().backward()
    assert losses.tolist() == [[0.0] * T] * B
    assert head.weight.grad.abs().sum() == 0 and hidden.grad.abs().sum() == 0  # NaN would not equal 0


def test_losses_of_bf16_hidden_states_are_computed_in_fp32(head, hidden):
    losses = head.bfloat16()(hidden.bfloat16(), LABELS)
    logits = head(hidden.bfloat16())
    assert losses.dtype == torch.float32 and logits.dtype == torch.bfloat16
    expected = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), LABELS.flatten(), reduction="none")
    torch.testing.assert_close(losses.flatten(), expected, rtol=0, atol=1e-6)
