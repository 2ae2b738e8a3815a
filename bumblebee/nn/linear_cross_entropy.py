"""Fused linear layer and cross-entropy, computed in chunks of rows: the full logits are never materialized.

For a target with hidden state h and label y

    loss = -log softmax(W h)[y]        d loss / d logits = softmax(W h) - onehot(y)

The gradient of a chunk is computed in the forward pass, while its logits are in memory, so that the total cost is the three
matmuls of the naive loss. This assumes that all losses have the same weight in the scalar that is differentiated, as in a sum;
the accumulated gradient is then scaled by that weight. If they do not, as in DPO, the backward pass detects it and recomputes
the chunks, and ``LossWeighting`` remembers it, so that the next forward pass computes losses only. Softmax and sums are fp32.
The entropy of the distribution, -sum_v p(v) log p(v), is computed from the same logits on request, without gradient.

A sum is seen from the strides of the losses' gradient, an expanded number. Other gradients are compared number by number on a
CPU; on a GPU that would make the host wait, so that they count as different there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

# Rows per chunk, by device: each chunk accumulates into the full weight gradient in fp32. On a CPU its cost is measured
# (docs/lab-log.md). On a GPU, by arithmetic, the accumulation takes as long as a product at 1,024 rows, and an eighth at 8,192.
ROWS = {"cpu": 1024, "cuda": 8192}
SOFTMAX_LOGITS = {"cpu": 2**20, "cuda": 2**28}  # logits per softmax block in fp32; on a CPU they fit the cache
ENTROPY_LOGITS = {"cpu": 2**20, "cuda": 2**24}  # the same for entropies, which need a second tensor of this size


@dataclass
class LossWeighting:
    """What previous backward passes observed.

    Args:
        uniform: whether all losses of a batch had the same weight.
    """

    uniform: bool = True


@dataclass(frozen=True)
class Positions:
    """Where losses go in a larger tensor.

    Args:
        index: (N,) int64, distinct positions.
        size: of the tensor, P.
    """

    index: Tensor
    size: int


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, weighting: LossWeighting | None = None,
    positions: Positions | None = None, entropies: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``-log softmax(weight @ hidden)[label]`` of each row.

    Args:
        hidden: (N, D).
        weight: (V, D), in the dtype of ``hidden``.
        labels: (N,) int64, each a row of ``weight``.
        weighting: state kept between calls; it affects when gradients are computed, never the result.
        positions: where the losses go; the rest is zero.
        entropies: (N,) fp32, overwritten by the entropy of each row's distribution in nats.

    Returns:
        (N,) in fp32, or (P,) with ``positions``.
    """
    weighting = weighting or LossWeighting()
    eager_gradients = weighting.uniform and torch.is_grad_enabled()
    return _LinearCrossEntropy.apply(hidden, weight, labels, weighting, eager_gradients, positions, entropies)


def is_uniform(grad: Tensor) -> bool:
    """Whether losses with this gradient (N,) are known to have the same weight; does not synchronize with a GPU."""
    return grad.stride() == (0,) or (grad.device.type == "cpu" and bool((grad == grad[:1]).all()))


def chunk_rows(device_type: str) -> int:
    """Rows of logits that are in memory at a time on a device."""
    return ROWS.get(device_type, ROWS["cpu"])


def softmax_logits(device_type: str) -> int:
    """Logits that are in memory in fp32 at a time on a device."""
    return SOFTMAX_LOGITS.get(device_type, SOFTMAX_LOGITS["cuda"])


def row_slices(rows: int, size: int) -> list[slice]:
    """Consecutive slices of at most ``size`` rows."""
    return [slice(first, min(first + size, rows)) for first in range(0, rows, max(size, 1))]


def _entropies(logs: Tensor, out: Tensor) -> None:
    """Write the entropy of log-probabilities (rows, V) into ``out`` (rows,)."""
    logits = ENTROPY_LOGITS.get(logs.device.type, ENTROPY_LOGITS["cuda"])
    for rows in row_slices(len(logs), max(1, logits // logs.shape[1])):
        torch.sum(logs[rows].exp().mul_(logs[rows]), dim=-1, out=out[rows]).neg_()


def _losses(
    logits: Tensor, labels: Tensor, scale: Tensor | None, to_gradients: bool, entropies: Tensor | None = None
) -> Tensor:
    """Losses (rows,) of logits (rows, V).

    With ``to_gradients``, the logits are overwritten by their gradients, multiplied by ``scale`` (rows,). ``entropies``
    (rows,) are overwritten.
    """
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    for rows in row_slices(len(logits), max(1, softmax_logits(logits.device.type) // logits.shape[1])):
        logs = torch.log_softmax(logits[rows], dim=-1, dtype=torch.float32)
        losses[rows] = -logs.gather(1, labels[rows, None])[:, 0]
        if entropies is not None:
            _entropies(logs, entropies[rows])
        if to_gradients:
            logs.exp_().scatter_add_(1, labels[rows, None], logs.new_full((len(logs), 1), -1.0))
            logits[rows] = logs if scale is None else logs.mul_(scale[rows, None])
    return losses


class ChunkGradients:
    """Gradients of hidden states and weight, accumulated chunk by chunk; only those that autograd needs."""

    def __init__(self, hidden: Tensor, weight: Tensor, needed: tuple[bool, bool]) -> None:
        self.inputs = hidden, weight
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        self.weight = torch.zeros_like(weight, dtype=torch.float32) if needed[1] else None

    def add(self, rows: slice, logit_gradients: Tensor) -> None:
        """Accumulate a chunk, given the gradients (rows, V) of its logits."""
        hidden, weight = self.inputs
        if self.hidden is not None:
            torch.mm(logit_gradients, weight, out=self.hidden[rows])
        if self.weight is not None and hidden.dtype == torch.float32:
            self.weight.addmm_(logit_gradients.T, hidden[rows])
        elif self.weight is not None:
            self.weight += logit_gradients.T @ hidden[rows]

    def scaled(self, scale: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Both gradients, multiplied by a scalar and cast to the dtypes of their tensors."""
        for gradient in (self.hidden, self.weight):
            if gradient is not None and scale is not None:
                gradient.mul_(scale)
        return self.hidden, None if self.weight is None else self.weight.to(self.inputs[1].dtype)


class _Context(FunctionCtx):
    """What ``_LinearCrossEntropy`` keeps for the backward pass."""

    saved_tensors: tuple[Tensor, Tensor, Tensor]  # hidden, weight and labels
    needs_input_grad: tuple[bool, bool, bool, bool, bool, bool, bool]
    positions: Positions | None
    gradients: ChunkGradients | None
    weighting: LossWeighting


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context, hidden: Tensor, weight: Tensor, labels: Tensor, weighting: LossWeighting, eager_gradients: bool,
        positions: Positions | None, entropies: Tensor | None,
    ) -> Tensor:  # fmt: skip
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        gradients = ChunkGradients(hidden, weight, ctx.needs_input_grad[:2]) if eager_gradients else None
        for rows in row_slices(len(hidden), chunk_rows(hidden.device.type)):
            logits = hidden[rows] @ weight.T
            of_rows = None if entropies is None else entropies[rows]
            losses[rows] = _losses(logits, labels[rows], None, eager_gradients, of_rows)
            if gradients is not None:
                gradients.add(rows, logits)
        ctx.save_for_backward(hidden, weight, labels)
        ctx.gradients, ctx.weighting, ctx.positions = gradients, weighting, positions
        return losses if positions is None else losses.new_zeros(positions.size).index_copy_(0, positions.index, losses)

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None, None]:
        (grad,) = grads
        if ctx.positions is not None:
            grad = grad[:1] if grad.stride() == (0,) else grad.index_select(0, ctx.positions.index)
        hidden, weight, labels = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place below, so used once
        uniform = ctx.weighting.uniform = is_uniform(grad)
        if gradients is None or not uniform:
            gradients = ChunkGradients(hidden, weight, ctx.needs_input_grad[:2])
            for rows in row_slices(len(hidden), chunk_rows(hidden.device.type)):
                logits = hidden[rows] @ weight.T
                _losses(logits, labels[rows], None if uniform else grad[rows], to_gradients=True)
                gradients.add(rows, logits)
        return *gradients.scaled(grad[0] if uniform and len(grad) else None), None, None, None, None, None
