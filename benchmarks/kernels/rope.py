"""Rotary embeddings (arXiv 2104.09864) of queries (B, T, H, D), pairs half a head apart.

python -m benchmarks.kernels.rope [--device cuda] [--dtype bf16] [--sizes BxTxHxD ...]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.kernels.harness import Case, Variant, compiled, dimensions, liger, main
from bumblebee.nn.rope import RotaryEmbedding, apply_rotary

SIZES = {"cpu": ["2x1024x14x64"], "cuda": ["8x2048x32x128"]}


def formula(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turns = torch.complex(cos, sin)
    pairs = torch.complex(*x.chunk(2, -1)) * turns
    return torch.cat((pairs.real, pairs.imag), -1)


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As transformers writes it, in the dtype of x."""
    first, second = x.chunk(2, -1)
    cos, sin = (torch.cat((part, part), -1).to(x.dtype) for part in (cos, sin))
    return x * cos + torch.cat((-second, first), -1) * sin


def liger_rope(apply: Callable[..., tuple[Tensor, Tensor]]) -> Variant:
    """Liger's rotation of queries and keys in place; the copy that keeps the input is measured too, and so is one key head."""

    def variant(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        queries, keys = x.clone().transpose(1, 2), x[:, :, :1].detach().clone().transpose(1, 2)
        whole = (torch.cat((part, part), -1).reshape(x.shape[0], x.shape[1], -1) for part in (cos, sin))
        return apply(queries, keys, *whole)[0].transpose(1, 2)

    return variant


def cases(device: torch.device, dtype: torch.dtype, size: str) -> Iterator[Case]:
    rows, length, heads, width = dimensions(size, "BxTxHxD")
    x = torch.randn(rows, length, heads, width, device=device, dtype=dtype, requires_grad=True)
    positions = torch.arange(length, device=device).expand(rows, -1)
    cos, sin = RotaryEmbedding(width, 10_000.0).to(device)(positions)
    variants, missing = compiled(apply_rotary, device)
    variants = {"rotate_half": rotate_half, "bumblebee": apply_rotary, **variants}
    apply, reason = liger("rope", "LigerRopeFunction", device)
    if apply:
        variants["liger"] = liger_rope(apply)
    yield Case(size, (x, cos, sin), formula, variants, {**missing, **reason}, bytes=2 * x.nbytes, backward_work=2.0)


if __name__ == "__main__":
    sys.exit(main("rope (rows x tokens x heads x width)", cases, SIZES))
