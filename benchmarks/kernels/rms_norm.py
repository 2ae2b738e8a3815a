"""RMSNorm (arXiv 1910.07467) of (rows, width), with its weight.

python -m benchmarks.kernels.rms_norm [--device cuda] [--dtype bf16] [--sizes ROWSxWIDTH ...]
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.kernels.harness import Case, Variant, compiled, dimensions, liger, main
from bumblebee.nn.norm import RMSNorm

SIZES = {"cpu": ["2048x896"], "cuda": ["16384x2048", "16384x8192"]}


def formula(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def naive(x: Tensor, weight: Tensor) -> Tensor:
    y = x.float()
    return weight * (y * (y.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype)


def torch_kernel(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x, (x.shape[-1],), weight, eps=1e-6)


def module(width: int, device: torch.device) -> Variant:
    """The project's module, with the weight as an argument."""
    norm = RMSNorm(width).to(device)
    return lambda x, weight: torch.func.functional_call(norm, {"weight": weight}, (x,))


def cases(device: torch.device, dtype: torch.dtype, size: str) -> Iterator[Case]:
    rows, width = dimensions(size, "ROWSxWIDTH")
    x = torch.randn(rows, width, device=device, dtype=dtype, requires_grad=True)
    weight = (1 + 0.1 * torch.randn(width, device=device)).to(dtype).requires_grad_()
    variants, missing = compiled(naive, device)
    variants = {"naive": naive, "bumblebee": module(width, device), "torch": torch_kernel, **variants}
    apply, reason = liger("rms_norm", "LigerRMSNormFunction", device)
    if apply:  # no offset, the cast of Llama, and gradients in memory of their own: the harness reads the output's again
        variants["liger"] = lambda x, weight: apply(x, weight, 1e-6, 0.0, "llama", False)
    yield Case(size, (x, weight), formula, variants, {**missing, **reason}, bytes=2 * x.nbytes, backward_work=2.5)


if __name__ == "__main__":
    sys.exit(main("rms_norm (rows x width)", cases, SIZES))
