"""Linear layers of several experts over rows that lie expert by expert: no loop over rows, none left out.

In bf16 on an H100 or newer this is torch's grouped matrix product, one kernel for all experts. Elsewhere it is one plain
product for each expert that has rows, written straight into the result: on a CPU as fast as a dense layer of the same
work, up to a tenth, where torch's own fallback copies.
Shapes: R rows, E experts, D inputs, F outputs.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """``x @ weight[e].T`` for the rows of each expert e.

    Args:
        x: (R, D), the rows of expert 0 first, then those of expert 1 and so on.
        weight: (E, F, D), in the dtype of ``x``.
        counts: (E,) int64, how many rows each expert has; they add up to R.

    Returns:
        (R, F) in the dtype of ``x``.
    """
    if has_grouped_kernel(x, weight):
        return torch.nn.functional.grouped_mm(x, weight.mT, offs=counts.cumsum(0).to(torch.int32))
    return _GroupedLinear.apply(x, weight, counts)


def has_grouped_kernel(x: Tensor, weight: Tensor) -> bool:
    """Whether torch has one kernel for all experts here: on a GPU of compute capability 9.0 (H100) or above, in bf16, for rows
    of whole 16 bytes."""
    if x.device.type != "cuda" or x.dtype != torch.bfloat16 or not hasattr(torch.nn.functional, "grouped_mm"):
        return False
    return torch.cuda.get_device_capability(x.device) >= (9, 0) and not any(size % 8 for size in weight.shape[1:])


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
        ctx.bounds = _bounds(counts)
        ctx.save_for_backward(x, weight)
        out = x.new_empty(len(x), weight.shape[1])
        for expert, rows in ctx.bounds:
            torch.mm(x[rows], weight[expert].T, out=out[rows])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        of_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        of_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for expert, rows in ctx.bounds:
            if of_x is not None:
                torch.mm(grad[rows], weight[expert], out=of_x[rows])
            if of_weight is not None:
                torch.mm(grad[rows].T, x[rows], out=of_weight[expert])
        return of_x, of_weight, None


def _bounds(counts: Tensor) -> list[tuple[int, slice]]:
    """(expert, its rows) of the experts that have any. A GPU is waited for."""
    ends = [0, *accumulate(counts.tolist())]
    return [(expert, slice(first, last)) for expert, (first, last) in enumerate(pairwise(ends)) if first < last]
