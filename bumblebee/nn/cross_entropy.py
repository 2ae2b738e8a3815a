"""Cross-entropy of a linear layer's logits, a chunk of rows at a time: the full logits are never there.

For a target t with hidden state h and label y:  loss = logsumexp(W h) - (W h)[y].  Kept for the backward pass is one number a
target, the logsumexp; a chunk's logits are computed again there. That costs a third matrix product and saves writing and
reading (targets, V) numbers several times, in memory and in time. The arithmetic on logits is fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**20  # logits at a time: large enough for a matrix product, small enough to stay in a cache


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """``-log softmax(weight @ hidden)[label]`` of each row.

    Args:
        hidden: (N, D).
        weight: (V, D), in the dtype of ``hidden``.
        labels: (N,) int64, each a row of ``weight``.

    Returns:
        (N,) in fp32.
    """
    return _LinearCrossEntropy.apply(hidden, weight, labels)


def _chunks(rows: int, vocabulary: int) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        totals = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        losses = torch.empty_like(totals)
        for rows in _chunks(len(hidden), len(weight)):
            logits = (hidden[rows] @ weight.T).float()
            totals[rows] = logits.logsumexp(dim=-1)
            losses[rows] = totals[rows] - logits.gather(1, labels[rows, None])[:, 0]
        ctx.save_for_backward(hidden, weight, labels, totals)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grads
        hidden, weight, labels, totals = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for rows in _chunks(len(hidden), len(weight)):
            # d loss / d logits = softmax - onehot
            slopes = (hidden[rows] @ weight.T).float().sub_(totals[rows, None]).exp_()
            slopes.scatter_add_(1, labels[rows, None], -torch.ones_like(totals[rows, None]))
            slopes = slopes.mul_(grad[rows, None]).to(hidden.dtype)
            grad_hidden[rows] = slopes @ weight
            grad_weight += slopes.T @ hidden[rows]
        return grad_hidden, grad_weight.to(weight.dtype), None
