"""Loss kernel check: the fused linear cross-entropy against the formula in fp64: per-target losses, their mean, gradients.

Logits are rounded to the dtype, which is the error of a single target's loss. Bounds: see ``tolerances``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bumblebee.nn import lm_head
from bumblebee.verify.check_result import CheckResult, Measurement
from bumblebee.verify.checks.tolerances import COMMON, WHOLE, WORST, relative_error, rounding_unit, scale_error
from bumblebee.verify.context import Context

NUM_TARGETS, HIDDEN_SIZE, VOCAB_SIZE = 700, 64, 4099  # several chunks, the last one partial


def run(context: Context) -> CheckResult:
    """Compare losses and gradients of random targets, each with its own upstream gradient."""
    dtype, device = context.dtype, context.device
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, HIDDEN_SIZE, generator=generator) for rows in (NUM_TARGETS, VOCAB_SIZE))
    labels = torch.randint(VOCAB_SIZE, (NUM_TARGETS,), generator=generator).to(device)
    grad_output = torch.rand(NUM_TARGETS, generator=generator).to(device)
    inputs = hidden.to(device, dtype), (weight / HIDDEN_SIZE**0.5).to(device, dtype)
    leaves, exact_leaves = ([x.to(to_dtype).requires_grad_() for x in inputs] for to_dtype in (dtype, torch.float64))
    losses = lm_head.linear_cross_entropy(leaves[0], leaves[1], labels)  # through the LM head's module, as in training
    expected = cross_entropy_formula(exact_leaves[0], exact_leaves[1], labels)
    gradients = list(
        zip(
            torch.autograd.grad(losses, leaves, grad_output),
            torch.autograd.grad(expected, exact_leaves, grad_output.double()),
            strict=True,
        )
    )
    unit = rounding_unit(dtype)
    return CheckResult(
        (
            Measurement("worst target", (losses - expected).abs().max().item(), WORST * unit),
            Measurement("mean", abs((losses - expected).mean().item()), COMMON * unit),
            Measurement("gradients", max(relative_error(*pair) for pair in gradients), WHOLE * unit),
            Measurement("gradient scale", max(scale_error(*pair) for pair in gradients), COMMON * unit),
        )
    )


def cross_entropy_formula(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """``-log softmax(weight hidden)[label]`` of each row."""
    logits = hidden @ weight.T
    return logits.logsumexp(dim=-1) - logits.gather(1, labels[:, None])[:, 0]
