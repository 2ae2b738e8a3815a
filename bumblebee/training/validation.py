"""Evaluating a task on held-out batches."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from bumblebee.datamodule import Batch
from bumblebee.tasks.task import ForwardFn, Task


@torch.no_grad()
def validation_sums(task: Task, model: ForwardFn, batches: Iterable[Batch]) -> dict[str, float]:
    """Add a task's validation sums over batches on the model's device; of this rank only."""
    sums: dict[str, Tensor] = {}
    for batch in batches:
        for name, value in task.validation_step(model, batch).items():
            sums[name] = sums.get(name, 0) + value  # stays on the device
    return {name: float(value) for name, value in sums.items()}
