"""Cross-entropy of a linear layer's logits, a chunk of rows at a time: the full logits are never there.

For a target t with hidden state h and label y

    loss = -log softmax(W h)[y]        d loss / d logits = softmax(W h) - onehot(y)

The slopes of a chunk are taken as soon as its logits are there, in the forward pass: so the whole costs the three matrix
products of the naive loss. That supposes that all losses weigh the same in what is differentiated, as in a sum; the gradient is
then what was summed up, times that weight. Where they do not, as in DPO, the backward pass finds out and computes the chunks
again, and ``Weighing`` remembers it, so that the next forward pass takes losses only. Softmax and sums are in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ROWS = 1024  # in a chunk: each adds to the whole gradient of the weight, which is larger than any cache
CACHED = {"cpu": 2**20}  # logits that are looked at in one go: what its cache holds; on a GPU a whole chunk


@dataclass
class Weighing:
    """What the backward passes so far have found.

    Args:
        alike: whether all losses of a batch weighed the same.
    """

    alike: bool = True


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, weighing: Weighing | None = None) -> Tensor:
    """``-log softmax(weight @ hidden)[label]`` of each row.

    Args:
        hidden: (N, D).
        weight: (V, D), in the dtype of ``hidden``.
        labels: (N,) int64, each a row of ``weight``.
        weighing: kept from call to call; it changes what is computed when, never the result.

    Returns:
        (N,) in fp32.
    """
    weighing = weighing or Weighing()
    ahead = weighing.alike and torch.is_grad_enabled()
    return _LinearCrossEntropy.apply(hidden, weight, labels, weighing, ahead)


def _cut(rows: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, rows)) for first in range(0, rows, max(size, 1))]


def _look(logits: Tensor, labels: Tensor, scale: Tensor | None, slopes: bool) -> Tensor:
    """Losses (rows,) of logits (rows, V); the slopes of the losses, times ``scale`` (rows,), then take the logits' place."""
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    for rows in _cut(len(logits), max(1, CACHED.get(logits.device.type, 2**28) // logits.shape[1])):
        logs = torch.log_softmax(logits[rows], dim=-1, dtype=torch.float32)
        losses[rows] = -logs.gather(1, labels[rows, None])[:, 0]
        if slopes:
            logs.exp_().scatter_add_(1, labels[rows, None], logs.new_full((len(logs), 1), -1.0))
            logits[rows] = logs if scale is None else logs.mul_(scale[rows, None])
    return losses


class _Gradients:
    """The gradients of hidden states and weight, summed up chunk by chunk; only those that are asked for."""

    def __init__(self, hidden: Tensor, weight: Tensor, needed: tuple[bool, bool]) -> None:
        self.inputs = hidden, weight
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        self.weight = torch.zeros_like(weight, dtype=torch.float32) if needed[1] else None

    def add(self, rows: slice, slopes: Tensor) -> None:
        """The slopes (rows, V) of a chunk's losses by its logits."""
        hidden, weight = self.inputs
        if self.hidden is not None:
            torch.mm(slopes, weight, out=self.hidden[rows])
        if self.weight is not None and hidden.dtype == torch.float32:
            self.weight.addmm_(slopes.T, hidden[rows])
        elif self.weight is not None:
            self.weight += slopes.T @ hidden[rows]

    def times(self, scale: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Both, multiplied with a number, in the dtypes of what they are gradients of."""
        for gradient in (self.hidden, self.weight):
            if gradient is not None and scale is not None:
                gradient.mul_(scale)
        return self.hidden, None if self.weight is None else self.weight.to(self.inputs[1].dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, weighing: Weighing, ahead: bool) -> Tensor:
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        gradients = _Gradients(hidden, weight, ctx.needs_input_grad[:2]) if ahead else None
        for rows in _cut(len(hidden), ROWS):
            logits = hidden[rows] @ weight.T
            losses[rows] = _look(logits, labels[rows], None, slopes=ahead)
            if gradients is not None:
                gradients.add(rows, logits)
        ctx.save_for_backward(hidden, weight, labels)
        ctx.gradients, ctx.weighing = gradients, weighing
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        (grad,) = grads
        hidden, weight, labels = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None  # used once: they are scaled in place
        alike = bool((grad == grad[:1]).all())  # the GPU is waited for
        ctx.weighing.alike = alike
        if gradients is None or not alike:
            gradients = _Gradients(hidden, weight, ctx.needs_input_grad[:2])
            for rows in _cut(len(hidden), ROWS):
                logits = hidden[rows] @ weight.T
                _look(logits, labels[rows], None if alike else grad[rows], slopes=True)
                gradients.add(rows, logits)
        return *gradients.times(grad[0] if alike and len(grad) else None), None, None, None
