"""Targets of a batch: which positions have a label, found on the host before a batch is moved to its device.

Like the documents of packed rows, see ``documents.py``: a GPU would have to be waited for in every forward and backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from bumblebee.nn import IGNORE_INDEX


def move_with_targets(labels: Tensor, device: torch.device) -> Tensor:
    """Move labels from the host to a device, without waiting, with the index of their targets."""
    index = _find(labels)
    moved = labels.to(device, non_blocking=True)
    moved.targets = (moved._version, index.to(device, non_blocking=True))  # type: ignore[attr-defined]
    return moved


def target_index(labels: Tensor) -> Tensor:
    """Positions (N,) int64 of the targets in the flattened labels. Synchronizes with a GPU unless the labels came with them."""
    version, index = getattr(labels, "targets", (None, None))
    return index if index is not None and version == labels._version else _find(labels)  # not if changed in place


def _find(labels: Tensor) -> Tensor:
    return (labels.flatten() != IGNORE_INDEX).nonzero().flatten()


def select_rows(x: Tensor, index: Tensor) -> Tensor:
    """Return rows (N, D) of ``x`` (R, D) at distinct indices (N,). Neither direction synchronizes with the GPU."""
    return _SelectRows.apply(x, index)


class _Context(FunctionCtx):
    """What ``_SelectRows`` keeps for the backward pass."""

    saved_tensors: tuple[Tensor]  # index
    rows: int  # R


class _SelectRows(torch.autograd.Function):
    """``index_select``, whose own backward pass adds row by row, since its indices may repeat."""

    @staticmethod
    def forward(ctx: _Context, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = len(x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return grads[0].new_zeros(ctx.rows, grads[0].shape[1]).index_copy_(0, index, grads[0]), None


def scatter_rows(x: Tensor, index: Tensor, rows: int) -> Tensor:
    """The reverse: ``x`` (N, D) at distinct indices (N,) of zeros (rows, D)."""
    return x.new_zeros(rows, x.shape[1]).index_copy(0, index, x)
