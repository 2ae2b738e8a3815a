"""A step of AdamW (arXiv 1711.05101) on N parameters in fp32, in tensors of a small model's sizes.

    python -m benchmarks.kernels.optimizer_step [--device cuda] [--sizes N ...]

Bound by memory: parameter, gradient and two moments are read, all but the gradient are written: 28 bytes per parameter.
``--dtype`` is that of the peak only. Each variant has parameters and moments of its own and steps with the same gradients.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.kernels.harness import Case, Variant, dimensions, main

SIZES = {"cpu": ["20000000"], "cuda": ["1000000000"]}
TENSORS = 50
OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def formula(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The parameter after the first step."""
    beta1, beta2 = OPTIONS["betas"]  # type: ignore[misc]
    decayed = parameter * (1 - OPTIONS["lr"] * OPTIONS["weight_decay"])  # type: ignore[operator]
    first, second = (1 - beta1) * gradient / (1 - beta1), (1 - beta2) * gradient.square() / (1 - beta2)
    return decayed - OPTIONS["lr"] * first / (second.sqrt() + OPTIONS["eps"])  # type: ignore[operator]


class Stepper:
    """A variant: the first call returns the updated parameters, later calls go on stepping."""

    def __init__(self, **options: bool) -> None:
        self.options, self.optimizer = options, None

    def __call__(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        if self.optimizer is None:
            self.flat = parameter.clone()
            self.weights = [part.requires_grad_() for part in self.flat.detach().chunk(TENSORS)]
            for weight, part in zip(self.weights, gradient.chunk(TENSORS), strict=True):
                weight.grad = part
            self.optimizer = torch.optim.AdamW(self.weights, **OPTIONS, **self.options)  # type: ignore[arg-type]
        self.optimizer.step()
        return self.flat


def cases(device: torch.device, dtype: torch.dtype, size: str) -> Iterator[Case]:
    (count,) = dimensions(size, "N")
    parameter, gradient = 0.02 * torch.randn(count, device=device), torch.randn(count, device=device)
    variants: dict[str, Variant] = {
        "for loop": Stepper(foreach=False), "foreach": Stepper(foreach=True), "fused": Stepper(fused=True),
    }  # fmt: skip
    yield Case(size, (parameter, gradient), formula, variants, bytes=28.0 * count, dtype=torch.float32)


if __name__ == "__main__":
    sys.exit(main("optimizer_step (parameters)", cases, SIZES))
