"""Grouped linear layer: one weight matrix per expert, applied to rows that are sorted by expert.

In bf16 on an H100 or newer this is torch's ``grouped_mm``, one kernel for all experts. Elsewhere it is one matmul per expert
that has rows, written directly into the output: on a CPU within a tenth of a dense layer of the same FLOPs, where torch's
own fallback copies.
Shapes: R rows, E experts, D inputs, F outputs.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Compute ``x @ weight[e].T`` for the rows of each expert e.

    Args:
        x: (R, D), rows sorted by expert.
        weight: (E, F, D), in the dtype of ``x``.
        counts: (E,) int64, number of rows of each expert; sums to R.

    Returns:
        (R, F) in the dtype of ``x``.
    """
    if has_grouped_kernel(x, weight):
        return torch.nn.functional.grouped_mm(x, weight.mT, offs=counts.cumsum(0).to(torch.int32))
    return _GroupedLinear.apply(x, weight, counts)


def has_grouped_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether ``grouped_mm`` can run: a GPU of compute capability 9.0 (H100) or above, bf16, rows of a multiple of 16 bytes."""
    if x.device.type != "cuda" or x.dtype != torch.bfloat16 or not hasattr(torch.nn.functional, "grouped_mm"):
        return False
    return torch.cuda.get_device_capability(x.device) >= (9, 0) and not any(size % 8 for size in weight.shape[1:])


class _Context(FunctionCtx):
    """What ``_GroupedLinear`` keeps for the backward pass."""

    saved_tensors: tuple[Tensor, Tensor]  # x and weight
    needs_input_grad: tuple[bool, bool, bool]
    bounds: list[tuple[int, slice]]


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        ctx.bounds = _bounds(counts)
        ctx.save_for_backward(x, weight)
        out = x.new_empty(len(x), weight.shape[1])
        for expert, rows in ctx.bounds:
            torch.mm(x[rows], weight[expert].T, out=out[rows])
        return out

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for expert, rows in ctx.bounds:
            if grad_x is not None:
                torch.mm(grad[rows], weight[expert], out=grad_x[rows])
            if grad_weight is not None:
                torch.mm(grad[rows].T, x[rows], out=grad_weight[expert])
        return grad_x, grad_weight, None


def _bounds(counts: Tensor) -> list[tuple[int, slice]]:
    """(expert, slice of its rows) of each expert that has rows. Synchronizes with the GPU."""
    ends = [0, *accumulate(counts.tolist())]
    return [(expert, slice(first, last)) for expert, (first, last) in enumerate(pairwise(ends)) if first < last]
