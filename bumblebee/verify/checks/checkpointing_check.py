"""Activation checkpointing check: the gradient of a model with dropout, with and without recomputing its blocks.

The recomputation must drop the same activations again. If it draws others, the gradient belongs to no forward pass.
"""

from __future__ import annotations

import torch

from bumblebee.transforms import ActivationCheckpointing
from bumblebee.verify import reference_loop
from bumblebee.verify.check_result import CheckResult, Measurement
from bumblebee.verify.context import Context
from bumblebee.verify.training_run import SEED, RandomTokens, build_model, to_device

DROPOUT = {"embedding_dropout": 0.1, "residual_dropout": 0.2}
BOUND = 1e-5  # typical: 0; other activations dropped: more than 0.5


def run(context: Context) -> CheckResult:
    """Measure the relative error of the worst tensor's gradient, in fp32 and from the same random state."""
    torch.manual_seed(SEED)
    model = build_model(context.fp32_attention, **DROPOUT).to(context.device)
    data = RandomTokens(5)
    data.setup(SEED)
    batch = to_device(data.collate(list(data.train)), context.device)
    torch.manual_seed(SEED)
    expected = reference_loop.gradient(model, batch)
    model.zero_grad()
    ActivationCheckpointing()(model)
    torch.manual_seed(SEED)
    gradient = reference_loop.gradient(model, batch)
    worst = max(float((gradient[name] - exact).norm() / exact.norm()) for name, exact in expected.items() if exact.norm())
    return CheckResult((Measurement("gradient of the worst tensor", worst, BOUND),))
