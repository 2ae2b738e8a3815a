"""The gated activation ``silu(gate) * up`` of SwiGLU (arXiv 2002.05202), without its matrix products.

python -m benchmarks.kernels.swiglu [--device cuda] [--dtype bf16] [--sizes ROWSxWIDTH ...]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.kernels.harness import Case, compiled, dimensions, liger, main

SIZES = {"cpu": ["2048x4864"], "cuda": ["16384x8192"]}


def formula(gate: Tensor, up: Tensor) -> Tensor:
    return gate / (1 + (-gate).exp()) * up


def naive(gate: Tensor, up: Tensor) -> Tensor:
    return gate * gate.sigmoid() * up


def bumblebee(gate: Tensor, up: Tensor) -> Tensor:
    """As ``bumblebee/nn/mlp.py`` writes it."""
    return torch.nn.functional.silu(gate) * up


def cases(device: torch.device, dtype: torch.dtype, size: str) -> Iterator[Case]:
    shape = dimensions(size, "ROWSxWIDTH")
    gate, up = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    variants, missing = compiled(bumblebee, device)
    apply, reason = liger("swiglu", "LigerSiLUMulFunction", device)
    variants = {"naive": naive, "bumblebee": bumblebee, **variants, **({"liger": apply} if apply else {})}
    yield Case(size, (gate, up), formula, variants, {**missing, **reason}, bytes=3 * gate.nbytes, backward_work=8 / 3)


if __name__ == "__main__":
    sys.exit(main("swiglu (rows x width)", cases, SIZES))
