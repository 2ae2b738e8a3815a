"""Ranks and accumulation against the whole batch: one step of SGD in fp32, from which the gradient is read off.

The rows have from none to all of their tokens as targets, a micro-batch has none, and the last rank runs out of rows: averages
of averages would show. SGD with a large rate keeps the gradient's digits: weights after = weights before - rate * gradient.
"""

from __future__ import annotations

import functools

import torch

from bumblebee.distributed import process_group
from bumblebee.verify import reference_loop
from bumblebee.verify.check_result import Measure
from bumblebee.verify.context import Setting
from bumblebee.verify.training_run import Record, Rows, train

RATE, ACCUMULATE = 100.0, 5
BOUND = 1e-4  # fp32 gives about 1e-6; a target counted once too often among hundreds gives 1e-3


def measures(setting: Setting) -> list[Measure]:
    """The tensor whose gradient is furthest from that of plain torch; small tensors count against 1 % of the whole."""
    rows = Rows(2 * ACCUMULATE * process_group.world_size() - 3)
    trainer = setting.trainer("fp32", clip=None, accumulate=ACCUMULATE, steps=1)
    optimizer = functools.partial(torch.optim.SGD, lr=RATE)
    attention = "naive" if setting.kernel == "naive" else "auto"  # flash does not take fp32
    record = train(Record(), trainer, rows, optimizer, setting.folder / "gradient", attention)
    wanted = reference_loop.gradient(rows, record.before, setting.device)
    small = 0.01 * float(torch.stack([tensor.norm() for tensor in wanted.values()]).norm())
    worst = max(
        float(((record.before[name] - record.after[name]) / RATE - tensor).norm() / tensor.norm().clamp(min=small))
        for name, tensor in wanted.items()
    )
    return [Measure("gradient of the worst tensor", worst, BOUND)]
