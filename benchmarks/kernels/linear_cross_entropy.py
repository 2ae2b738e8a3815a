"""Head and cross-entropy: the summed loss of hidden states (N, D) over a vocabulary (V, D).

    python -m benchmarks.kernels.linear_cross_entropy [--device cuda] [--dtype bf16] [--sizes NxDxV ...]

``chunked`` never materializes the logits (N, V); ``chunked N`` has another number of rows per chunk.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.kernels.harness import Case, compiled, dimensions, liger, main
from bumblebee.nn import linear_cross_entropy as chunked_module

SIZES = {"cpu": ["1024x512x32768"], "cuda": ["16384x2048x151936"]}
ROWS = {"cpu": (256, 4096), "cuda": (4096, 8192)}


def formula(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = hidden @ weight.T
    return (logits.logsumexp(-1) - logits.gather(1, labels[:, None])[:, 0]).sum()


def naive(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")


def chunked(hidden: Tensor, weight: Tensor, labels: Tensor, rows: int | None = None) -> Tensor:
    default = chunked_module.ROWS
    chunked_module.ROWS = dict.fromkeys(default, rows) if rows else default
    try:
        return chunked_module.linear_cross_entropy(hidden, weight, labels).sum()
    finally:
        chunked_module.ROWS = default


def cases(device: torch.device, dtype: torch.dtype, size: str) -> Iterator[Case]:
    targets, width, vocabulary = dimensions(size, "NxDxV")
    hidden = torch.randn(targets, width, device=device, dtype=dtype, requires_grad=True)
    weight = (0.02 * torch.randn(vocabulary, width, device=device)).to(dtype).requires_grad_()
    labels = torch.randint(vocabulary, (targets,), device=device)
    variants, missing = compiled(naive, device)
    others = {f"chunked {rows}": partial(chunked, rows=rows) for rows in ROWS[device.type]}
    variants = {"naive": naive, "chunked": chunked, **others, **variants}
    apply, reason = liger("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction", device)
    if apply:  # no bias, class weights, z-loss or smoothing; the loss is the first of its outputs
        variants["liger"] = lambda hidden, weight, labels: apply(hidden, weight, labels, None, None, -100, 0.0, 0.0, "sum")[0]
    yield Case(
        size, (hidden, weight, labels), formula, variants, {**missing, **reason}, flops=2.0 * targets * width * vocabulary
    )


if __name__ == "__main__":
    sys.exit(main("linear_cross_entropy (targets x width x vocabulary)", cases, SIZES))
