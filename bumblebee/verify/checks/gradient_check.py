"""Gradient check: one step over all ranks and micro-batches against one whole batch on one device.

The gradient is read off one step of SGD in fp32 with a learning rate that keeps its digits: gradient = (weights before -
weights after) / lr. Rows have from none to all of their tokens as targets, one micro-batch has no target, and the last rank
runs out of rows, so that a mean of means would be noticed.
"""

from __future__ import annotations

import functools

import torch

from bumblebee.distributed import process_group
from bumblebee.verify import reference_loop
from bumblebee.verify.check_result import CheckResult, Measurement
from bumblebee.verify.context import Context
from bumblebee.verify.training_run import RandomTokens, RunRecorder, reference_model, run_training, to_device

LEARNING_RATE, ACCUMULATE = 100.0, 5
BOUND = 1e-4  # fp32 reaches about 1e-6; counting one target of hundreds twice gives 1e-3


def run(context: Context) -> CheckResult:
    """Measure the largest relative error of a tensor's gradient; small tensors count relative to 1 % of the whole norm."""
    data = RandomTokens(2 * ACCUMULATE * process_group.world_size() - 3)
    trainer = context.build_trainer(max_steps=1, accumulate=ACCUMULATE, gradient_clip=None, precision="fp32")
    optimizer = functools.partial(torch.optim.SGD, lr=LEARNING_RATE)
    record = run_training(RunRecorder(), trainer, data, optimizer, context.folder / "gradient", context.fp32_attention)
    model, batch = reference_model(record.initial_weights, context.device), data.collate(list(data.train))
    expected = reference_loop.gradient(model, to_device(batch, context.device))
    smallest = 0.01 * float(torch.stack([gradient.norm() for gradient in expected.values()]).norm())
    worst = max(
        float(
            ((record.initial_weights[name] - record.final_weights[name]) / LEARNING_RATE - gradient).norm()
            / gradient.norm().clamp(min=smallest)
        )
        for name, gradient in expected.items()
    )
    return CheckResult((Measurement("gradient of the worst tensor", worst, BOUND),))
