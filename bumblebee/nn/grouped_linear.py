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

from bumblebee.nn.batch_invariant import is_batch_invariant, product


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
    if torch.compiler.is_compiling():
        return _grouped_linear_operator(x, weight, counts)
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
        return _product(x, weight, ctx.bounds)

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,) = grads
        x, weight = ctx.saved_tensors
        grad_x = _product(grad, weight.mT, ctx.bounds) if ctx.needs_input_grad[0] else None
        grad_weight = _outer_product(grad, x, len(weight), ctx.bounds) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None


def _product(x: Tensor, weight: Tensor, bounds: list[tuple[int, slice]]) -> Tensor:
    out = x.new_empty(len(x), weight.shape[1])
    for expert, rows in bounds:
        if is_batch_invariant():
            out[rows] = product(x[rows], weight[expert])
        else:
            torch.mm(x[rows], weight[expert].T, out=out[rows])
    return out


def _outer_product(grad: Tensor, x: Tensor, experts: int, bounds: list[tuple[int, slice]]) -> Tensor:
    """Sum of ``grad x^T`` over the rows of each expert: (E, F, D)."""
    out = x.new_zeros(experts, grad.shape[1], x.shape[1])
    for expert, rows in bounds:
        torch.mm(grad[rows].T, x[rows], out=out[expert])
    return out


def _bounds(counts: Tensor) -> list[tuple[int, slice]]:
    """(expert, slice of its rows) of each expert that has rows. Synchronizes with the GPU."""
    ends = [0, *accumulate(counts.tolist())]
    return [(expert, slice(first, last)) for expert, (first, last) in enumerate(pairwise(ends)) if first < last]


# -- the same as operators: torch.compile cannot trace a loop whose bounds are data, and does not look into these -------------


@torch.library.custom_op("bumblebee::grouped_linear", mutates_args=())
def _grouped_linear_operator(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return _product(x, weight, _bounds(counts))


@torch.library.custom_op("bumblebee::grouped_outer_product", mutates_args=())
def _outer_product_operator(grad: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    return _outer_product(grad, x, len(counts), _bounds(counts))


@_grouped_linear_operator.register_fake
def _(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@_outer_product_operator.register_fake
def _(grad: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(counts.shape[0], grad.shape[1], x.shape[1])


class _OperatorContext(FunctionCtx):
    """What the operator keeps for the backward pass."""

    saved_tensors: tuple[Tensor, Tensor, Tensor]  # x, weight and counts
    needs_input_grad: tuple[bool, bool, bool]


def _save_inputs(ctx: _OperatorContext, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _operator_backward(ctx: _OperatorContext, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, counts = ctx.saved_tensors
    grad_x = _grouped_linear_operator(grad, weight.mT, counts) if ctx.needs_input_grad[0] else None
    grad_weight = _outer_product_operator(grad, x, counts) if ctx.needs_input_grad[1] else None
    return grad_x, grad_weight, None


_grouped_linear_operator.register_autograd(_operator_backward, setup_context=_save_inputs)
