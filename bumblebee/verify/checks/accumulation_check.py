"""Accumulation check: one step of many micro-batches with known gradients, in the user's precision.

Each row's gradient is the same small odd number times powers of two, so that fp32 adds micro-batches without any error. bf16
has 8 bits: a sum of 32 micro-batches in bf16 is 3 % off, while a loss curve shows nothing. The micro-batches have from none to
64 targets, which a mean per micro-batch would weigh differently.

What DeepSpeed does, as the figures show: at every stage it adds micro-batches in fp32, as its configuration here requests. In
bf16 and fp16 it reduces over ranks in 16 bits, at stage 1 the sum of a step, at stages 2 and 3 each micro-batch. With a power
of two of ranks this loses nothing of these numbers, and the bound is that of fp32. Other averages over ranks are rounded in 16
bits, and the bound is the rounding unit. Above 27 ranks the numbers are too small for a sum in bf16 to show.
"""

from __future__ import annotations

import functools

import torch

from bumblebee.distributed import process_group
from bumblebee.model import Bumblebee
from bumblebee.verify.check_result import CheckResult, Measurement
from bumblebee.verify.checks.tolerances import relative_error
from bumblebee.verify.context import Context
from bumblebee.verify.known_gradients import CoefficientRows, KnownGradients, averages_exactly
from bumblebee.verify.training_run import RunRecorder, run_training, saved_state

ACCUMULATE = 32
NUM_TARGETS = (32, 1, 7, 0, 20, 31, 25, 12)  # 128 in 8 rows
EXACT_BOUND = 1e-5  # typical: 0
COEFFICIENTS = {16: 17, 27: 9}  # by number of ranks: all sums of that many fit into 8 bits


def run(context: Context) -> CheckResult:
    """Measure the relative error of the worst tensor's gradient, read off the momentum of one step of SGD."""
    ranks = process_group.world_size()
    coefficient = next((value for limit, value in COEFFICIENTS.items() if ranks <= limit), 1)
    data = CoefficientRows(2 * ACCUMULATE * ranks, NUM_TARGETS, (coefficient, coefficient))
    trainer = context.build_trainer(max_steps=1, accumulate=ACCUMULATE, gradient_clip=None)
    optimizer = functools.partial(torch.optim.SGD, lr=1.0, momentum=0.9)
    folder = context.folder / "accumulation"
    run_training(RunRecorder(save_at=1), trainer, data, optimizer, folder, context.options.attention, task=_task)
    sums = saved_state(folder / "checkpoint-1", "momentum_buffer")
    worst = max(
        relative_error(tensor, data.gradient(name, tensor.shape, range(data.samples)).double()) for name, tensor in sums.items()
    )
    rounded = torch.finfo(context.dtype).eps * max(1.0, ranks / 16)
    bound = EXACT_BOUND if averages_exactly(context) else rounded
    return CheckResult((Measurement(f"sum of {ACCUMULATE} micro-batches", worst, bound),))


def _task(model: Bumblebee) -> KnownGradients:
    """The model uses its first block twice, whose gradients some versions of DeepSpeed reduced twice or not at all.

    Matrices of its second block are not contiguous, such as those that a subclass transposes; autograd would give their
    gradients the same layout.
    """
    for parameter in model.model.layers[1].parameters():
        if parameter.dim() > 1:
            parameter.data = parameter.data.transpose(0, 1).contiguous().transpose(0, 1)
    model.model.layers.append(model.model.layers[0])
    return KnownGradients(model)
