"""Attention of decode tokens by the paged kernel, on GPUs that can run it; elsewhere keys and values are gathered first."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

MAX_WIDTH = 256  # of a head


class DecodeKernel(Protocol):
    """Signature of ``bumblebee/nn/paged_attention.py``'s kernel."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keys: Tensor,
        values: Tensor,
        tables: Tensor,
        rows: Tensor,
        lengths: Tensor,
        window: int | None = None,
    ) -> Tensor: ...


@dataclass
class PagedDecode:
    """Decode tokens that the paged kernel computes: the first B tokens of a step.

    Args:
        kernel: the kernel.
        tables: (rows, width) int64, block tables.
        rows: (B,) int64, the row of each token's sequence.
        lengths: (B,) int64, positions of each sequence, the token's own included; 0 for padding.
    """

    kernel: DecodeKernel
    tables: Tensor
    rows: Tensor
    lengths: Tensor

    def to(self, device: torch.device) -> PagedDecode:
        """The tokens for layers on another device: the tables of their sequences are copied there."""
        if device == self.tables.device:
            return self
        tables = self.tables.index_select(0, self.rows).to(device)
        return PagedDecode(self.kernel, tables, torch.arange(len(tables), device=device), self.lengths.to(device))


def select_decode_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> DecodeKernel | None:
    """The paged kernel if a device can run it, else None."""
    if device.type != "cuda":
        return None
    if problem := kernel_problem(device, dtype, head_dim):
        logger.warning(
            "decoding gathers keys and values instead of reading their blocks in place, which is slower: %s", problem
        )
        return None
    from bumblebee.nn.paged_attention import paged_decode_attention

    return paged_decode_attention


def kernel_problem(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why a GPU cannot run the paged kernel; None if it can."""
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the kernel does not compute in {str(dtype).removeprefix('torch.')}"
    if head_dim > MAX_WIDTH:
        return f"heads are {head_dim} wide, the kernel takes up to {MAX_WIDTH}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the kernel needs a GPU of compute capability 8.0 (A100) or above"
    try:
        import bumblebee.nn.paged_attention  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error}); torch's CUDA builds for Linux bring it"
    return None
