"""QK-norm (arXiv 2302.05442) as in Qwen3: RMSNorm of each query head (B, T, H, D), then the rotation.

python -m benchmarks.kernels.qk_norm [--device cuda] [--dtype bf16] [--sizes BxTxHxD ...]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.kernels import rms_norm, rope
from benchmarks.kernels.harness import Case, compiled, dimensions, main
from bumblebee.nn.rope import RotaryEmbedding, apply_rotary

SIZES = {"cpu": ["2x1024x14x64"], "cuda": ["8x2048x32x128"]}


def formula(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rope.formula(rms_norm.formula(x, weight), cos, sin)


def naive(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return apply_rotary(rms_norm.naive(x, weight), cos, sin)


def cases(device: torch.device, dtype: torch.dtype, size: str) -> Iterator[Case]:
    rows, length, heads, width = dimensions(size, "BxTxHxD")
    x = torch.randn(rows, length, heads, width, device=device, dtype=dtype, requires_grad=True)
    weight = (1 + 0.1 * torch.randn(width, device=device)).to(dtype).requires_grad_()
    cos, sin = RotaryEmbedding(width, 10_000.0).to(device)(torch.arange(length, device=device).expand(rows, -1))
    variants, missing = compiled(naive, device)
    norm = rms_norm.module(width, device)
    variants = {"naive": naive, "bumblebee": lambda x, w, cos, sin: apply_rotary(norm(x, w), cos, sin), **variants}
    yield Case(size, (x, weight, cos, sin), formula, variants, missing, bytes=2 * x.nbytes, backward_work=2.5)


if __name__ == "__main__":
    sys.exit(main("qk_norm (rows x tokens x heads x width)", cases, SIZES))
