"""Knowledge distillation at the LM heads: a divergence between teacher and student, computed in chunks of rows.

With the teacher's next-token distribution p and the student's q at a target, both at temperature T, the divergence is the
generalised Jensen-Shannon divergence of arXiv 2306.13649, equation 1,

    m = beta p + (1 - beta) q        JSD = beta KL(p || m) + (1 - beta) KL(q || m)

with the forward KL(p || q) at beta 0 and the reverse KL(q || p) at beta 1. These are the limits of JSD / (beta (1 - beta)),
while JSD itself tends to 0. For the student's logits z, with q = softmax(z / T),

    T d KL(p || q) / dz = q - p
    T d KL(q || p) / dz = q (log q - log p - KL(q || p))
    T d JSD / dz        = (1 - beta) q (log q - log m - KL(q || m))

As in ``linear_cross_entropy.py``, the gradient of a chunk is computed in the forward pass, while the logits of both models are
in memory. So the result is a sum over targets, in which all have the same weight. Softmax and sums are fp32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn.functional import nll_loss

from bumblebee.nn.linear_cross_entropy import ChunkGradients, chunk_rows, row_slices

# Logits per block in fp32; about five tensors of this size are in memory at a time.
BLOCK_LOGITS = {"cpu": 2**20, "cuda": 2**26}
SUMS = ("loss", "divergence", "lm_loss", "agreement", "teacher_entropy")  # what ``linear_distillation`` returns


@dataclass(frozen=True)
class Objective:
    """The loss of a target: the divergence + lm_weight * the cross-entropy of its label at temperature 1.

    Args:
        beta: of the generalised JSD; 0 is the forward KL, 1 the reverse KL.
        temperature: divides the logits of both models in the divergence.
        lm_weight: weight of the cross-entropy.
    """

    beta: float
    temperature: float = 1.0
    lm_weight: float = 0.0


@dataclass(frozen=True)
class HeadInput:
    """What a head multiplies.

    Args:
        hidden: (N, D).
        weight: (V, D), in the dtype of ``hidden``.
    """

    hidden: Tensor
    weight: Tensor

    def logits(self, rows: slice) -> Tensor:
        """(rows, V)."""
        return self.hidden[rows] @ self.weight.T


def linear_distillation(student: HeadInput, teacher: HeadInput, labels: Tensor, objective: Objective) -> Tensor:
    """Sums over N targets, whose logits are never in memory all at once.

    If the vocabularies differ in size, the divergence is that of the distributions over the ids that both have.

    Args:
        student: gradients go to its hidden states and weight.
        teacher: a constant; its D may be another one.
        labels: (N,) int64, each a row of the student's weight.
        objective: the loss of a target.

    Returns:
        (5,) fp32, see ``SUMS``: the loss, which has a gradient; the divergence; the cross-entropy; the number of targets at
        which both models predict the same token; the entropy of p in nats.
    """
    return _LinearDistillation.apply(
        student.hidden, student.weight, teacher.hidden.detach(), teacher.weight.detach(), labels, objective,
        torch.is_grad_enabled(),
    )  # fmt: skip


def divergence(student: Tensor, teacher: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """The divergence and its gradient, given log-probabilities (rows, V) in fp32.

    Returns:
        (rows,), and (rows, V): the gradient of the logits, already divided by the temperature, that the student's
        log-probabilities are the log-softmax of.
    """
    q, p = student.exp(), teacher.exp()
    if beta == 0:
        return (p * (teacher - student)).sum(1), q.sub_(p)
    if beta == 1:
        ratio = student - teacher
        values = (q * ratio).sum(1)
        return values, ratio.sub_(values[:, None]).mul_(q)
    mixture = torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
    ratio = student - mixture
    of_student, of_teacher = (q * ratio).sum(1), (p * (teacher - mixture)).sum(1)
    values = beta * of_teacher + (1 - beta) * of_student
    return values, ratio.sub_(of_student[:, None]).mul_(q).mul_(1 - beta)


def _block(student: Tensor, teacher: Tensor, labels: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """The sums (5,) float64 of a block of logits (rows, V), and the gradient of the student's: (rows, V) fp32."""
    common = min(student.shape[1], teacher.shape[1])
    p, q = (torch.log_softmax(z[:, :common].float() / objective.temperature, dim=1) for z in (teacher, student))
    same_token = student[:, :common].argmax(1) == teacher[:, :common].argmax(1)
    values, gradient = divergence(q, p, objective.beta)
    log_probs = torch.log_softmax(student, dim=1, dtype=torch.float32)
    lm_losses = nll_loss(log_probs, labels, reduction="none")
    losses, entropy = values + objective.lm_weight * lm_losses, -(p.exp() * p).sum(1)
    sums = torch.stack([each.double().sum() for each in (losses, values, lm_losses, same_token, entropy)])
    gradient = gradient.div_(objective.temperature)
    if objective.lm_weight or common < student.shape[1]:
        whole = log_probs.exp_().mul_(objective.lm_weight)
        whole.scatter_add_(1, labels[:, None], whole.new_full((len(labels), 1), -objective.lm_weight))
        whole[:, :common] += gradient
        gradient = whole
    return sums, gradient


class _Context(FunctionCtx):
    """What ``_LinearDistillation`` keeps for the backward pass."""

    needs_input_grad: tuple[bool, ...]
    gradients: ChunkGradients | None


class _LinearDistillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context, hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, labels: Tensor,
        objective: Objective, with_gradients: bool,
    ) -> Tensor:  # fmt: skip
        student, teacher = HeadInput(hidden, weight), HeadInput(teacher_hidden, teacher_weight)
        needed = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        gradients = ChunkGradients(hidden, weight, needed) if with_gradients else None
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=hidden.device)
        device = hidden.device.type
        block = max(1, BLOCK_LOGITS.get(device, BLOCK_LOGITS["cuda"]) // max(len(weight), len(teacher_weight)))
        for rows in row_slices(len(hidden), chunk_rows(device)):
            logits, of_teacher, targets = student.logits(rows), teacher.logits(rows), labels[rows]
            for part in row_slices(len(logits), block):
                of_part, gradient = _block(logits[part], of_teacher[part], targets[part], objective)
                sums += of_part
                logits[part] = gradient  # the student's logits are not read again
            if gradients is not None:
                gradients.add(rows, logits)
        ctx.gradients = gradients
        return sums.float()

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place, so used once
        if gradients is None:
            raise RuntimeError("linear_distillation has no second backward pass")
        return *gradients.scaled(grads[0][0]), None, None, None, None, None
