"""One projection of all experts: rows (N, D), sorted by expert, times the weights (E, F, D) of their experts.

    python -m benchmarks.kernels.experts [--device cuda] [--dtype bf16] [--sizes NxDxFxE ...]

The experts have unequal numbers of rows, as after routing. ``dense`` is one matrix product of the same size, the limit.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.kernels.harness import Case, dimensions, main
from bumblebee.nn.grouped_linear import _GroupedLinear

SIZES = {"cpu": ["2048x512x704x8"], "cuda": ["131072x2048x768x128"]}


def rows_of(x: Tensor, counts: Tensor) -> list[Tensor]:
    return list(x.split(counts.tolist()))


def loop(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return torch.cat([rows @ matrix.T for rows, matrix in zip(rows_of(x, counts), weight, strict=True)])


def grouped_mm(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return torch.nn.functional.grouped_mm(x, weight.mT, offs=counts.cumsum(0).to(torch.int32))


def bumblebee(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """A product per expert, written directly into the output."""
    return _GroupedLinear.apply(x, weight, counts)


def cases(device: torch.device, dtype: torch.dtype, size: str) -> Iterator[Case]:
    tokens, width, inner, experts = dimensions(size, "NxDxFxE")
    x = torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True)
    weight = (0.05 * torch.randn(experts, inner, width, device=device)).to(dtype).requires_grad_()
    chosen = (experts * torch.rand(tokens) ** 1.5).long()
    counts = torch.bincount(chosen, minlength=experts).to(device)
    variants = {"loop": loop, "bumblebee": bumblebee, "grouped_mm": grouped_mm}
    flops = 2.0 * tokens * width * inner
    yield Case(size, (x, weight, counts), loop, variants, flops=flops)
    dense = (0.05 * torch.randn(inner, width, device=device)).to(dtype).requires_grad_()
    yield Case(f"{size} dense", (x, dense), lambda x, w: x @ w.T, {"one matmul": lambda x, w: x @ w.T}, flops=flops)


if __name__ == "__main__":
    sys.exit(main("experts (rows x width x inner width x experts)", cases, SIZES))
