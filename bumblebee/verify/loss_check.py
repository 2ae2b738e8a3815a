"""The kernel of the loss against the formula in fp64: each target's loss, their mean, and the gradients.

The logits are rounded to the dtype, which is what a target's loss is off by. Bounds: see ``rounding``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bumblebee.nn import lm_head
from bumblebee.verify.check_result import Measure
from bumblebee.verify.tolerances import COMMON, WHOLE, WORST, distance, scale_error, unit

TARGETS, WIDTH, VOCABULARY = 700, 64, 4099  # several chunks, the last one not full


def measures(dtype: torch.dtype, device: torch.device) -> list[Measure]:
    """Losses and gradients of random targets, each with a weight of its own."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, WIDTH, generator=generator) for rows in (TARGETS, VOCABULARY))
    labels = torch.randint(VOCABULARY, (TARGETS,), generator=generator).to(device)
    slope = torch.rand(TARGETS, generator=generator).to(device)
    inputs = hidden.to(device, dtype), (weight / WIDTH**0.5).to(device, dtype)
    leaves, exact = ([x.to(kind).requires_grad_() for x in inputs] for kind in (dtype, torch.float64))
    losses = lm_head.linear_cross_entropy(leaves[0], leaves[1], labels)  # by way of the head, as training calls it
    wanted = formula(exact[0], exact[1], labels)
    gradients = list(
        zip(torch.autograd.grad(losses, leaves, slope), torch.autograd.grad(wanted, exact, slope.double()), strict=True)
    )
    return [
        Measure("worst target", (losses - wanted).abs().max().item(), WORST * unit(dtype)),
        Measure("mean", abs((losses - wanted).mean().item()), COMMON * unit(dtype)),
        Measure("gradients", max(distance(*pair) for pair in gradients), WHOLE * unit(dtype)),
        Measure("their scale", max(scale_error(*pair) for pair in gradients), COMMON * unit(dtype)),
    ]


def formula(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """``-log softmax(weight hidden)[label]`` of each row."""
    logits = hidden @ weight.T
    return logits.logsumexp(dim=-1) - logits.gather(1, labels[:, None])[:, 0]
