"""The chunked distillation loss and its gradients equal those of full logits, for any chunk size and vocabulary."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from bumblebee.nn.linear_distillation import SUMS, HeadInput, Objective, linear_distillation

N, D, V = 10, 8, 11
EXACT, ROUNDED = (torch.float32, 1e-5), (torch.bfloat16, 5e-2)


@pytest.fixture(params=[(1, 1), (3, 2 * V), (2**20, 2**20)], ids=["rows", "blocks in chunks", "one chunk"])
def chunk(request, monkeypatch):
    monkeypatch.setattr("bumblebee.nn.linear_cross_entropy.ROWS", {"cpu": request.param[0]})
    monkeypatch.setattr("bumblebee.nn.linear_distillation.BLOCK_LOGITS", {"cpu": request.param[1], "cuda": 1})


def heads(rows: int, teacher_ids: int, dtype: torch.dtype) -> tuple[HeadInput, HeadInput, torch.Tensor]:
    """A student of V ids, a wider teacher, and labels."""
    generator = torch.Generator().manual_seed(0)
    sizes = (rows, D), (V, D), (rows, 2 * D), (teacher_ids, 2 * D)
    tensors = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    for tensor in tensors[:2]:
        tensor.requires_grad_()
    return HeadInput(*tensors[:2]), HeadInput(*tensors[2:]), torch.randint(min(V, teacher_ids), (rows,), generator=generator)


def naive(student: HeadInput, teacher: HeadInput, labels: torch.Tensor, objective: Objective) -> list[torch.Tensor]:
    """The sums from full logits."""
    whole = [(each.hidden @ each.weight.T).float() for each in (student, teacher)]
    common = min(logits.shape[1] for logits in whole)
    q, p = ((logits[:, :common] / objective.temperature).softmax(1) for logits in whole)
    m, beta = objective.beta * p + (1 - objective.beta) * q, objective.beta
    kl = {name: (a * (a / b).log()).sum() for name, a, b in (("pq", p, q), ("qp", q, p), ("pm", p, m), ("qm", q, m))}
    divergence = {0.0: kl["pq"], 1.0: kl["qp"]}.get(beta, beta * kl["pm"] + (1 - beta) * kl["qm"])
    lm_loss = cross_entropy(whole[0], labels, reduction="sum")
    agreement = (whole[0][:, :common].argmax(1) == whole[1][:, :common].argmax(1)).sum()
    return [divergence + objective.lm_weight * lm_loss, divergence, lm_loss, agreement.float(), -(p * p.log()).sum()]


@pytest.mark.parametrize("teacher_ids", [V, V + 3, V - 3])
@pytest.mark.parametrize(("dtype", "tolerance"), [EXACT, ROUNDED], ids=str)
@pytest.mark.parametrize(("beta", "temperature", "lm_weight"), [(0, 1, 0), (1, 2, 0), (0.3, 1, 0.5), (0.5, 0.7, 0), (0, 2, 1)])
def test_sums_and_gradients_equal_those_of_full_logits(chunk, teacher_ids, dtype, tolerance, beta, temperature, lm_weight):
    student, teacher, labels = heads(N, teacher_ids, dtype)
    objective = Objective(float(beta), temperature, lm_weight)
    ours, reference = linear_distillation(student, teacher, labels, objective), naive(student, teacher, labels, objective)
    torch.testing.assert_close(list(ours), reference, rtol=1e-5, atol=1e-5)
    pairs = [torch.autograd.grad(3 * loss, (student.hidden, student.weight)) for loss in (ours[0], reference[0])]
    torch.testing.assert_close(pairs[0], pairs[1], rtol=tolerance, atol=3 * tolerance)


def test_no_targets_give_zero_sums_and_gradients():
    student, teacher, labels = heads(0, V, torch.float32)
    sums = linear_distillation(student, teacher, labels, Objective(0.5))
    sums[0].backward()
    assert sums.tolist() == [0.0] * len(SUMS) and student.weight.grad.eq(0).all()


def test_huge_logits_give_finite_sums_and_gradients():
    student, teacher, labels = heads(N, V, torch.float32)
    for beta in (0.0, 0.5, 1.0):
        far = HeadInput(1e4 * student.hidden, student.weight), HeadInput(1e4 * teacher.hidden, teacher.weight)
        sums = linear_distillation(*far, labels, Objective(beta))
        gradients = torch.autograd.grad(sums[0], (student.hidden, student.weight))
        assert sums.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)


def test_weights_that_are_not_trained_get_no_gradient():
    student, teacher, labels = heads(N, V, torch.float32)
    student.weight.requires_grad_(False)
    linear_distillation(student, teacher, labels, Objective(0.5))[0].backward()
    assert student.hidden.grad is not None and student.weight.grad is None
