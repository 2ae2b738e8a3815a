"""Running a task over held-out batches without learning from them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from bumblebee.datamodule import Batch
from bumblebee.tasks.task import Task


@torch.no_grad()
def validation_sums(task: Task, model: Any, batches: Iterable[Batch]) -> dict[str, float]:
    """The task's validation sums over batches that are on the model's device; of this rank only."""
    sums: dict[str, Any] = {}
    for batch in batches:
        for name, value in task.validation_step(model, batch).items():
            sums[name] = sums.get(name, 0) + value  # stays on the device
    return {name: float(value) for name, value in sums.items()}
