"""Describe a loss or weight that is NaN or infinite, with the samples or the parameter that it belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bumblebee.distributed import process_group
from bumblebee.training.loader import sample_origins

if TYPE_CHECKING:
    from bumblebee.training.run_state import RunState

ADVICE = "Nothing has been saved since; continue from the last checkpoint"


def find_non_finite(run: RunState, losses: Sequence[tuple[int, int, Tensor]]) -> FloatingPointError | None:
    """Return the error for this rank's first loss or weight that is NaN or infinite; None if there is none.

    Synchronizes with the GPU once, and more often if there is one.

    Args:
        run: the run.
        losses: step, index of the micro-batch, and loss, a scalar.
    """
    values = [*(loss for *_, loss in losses), run.engine.weight_norm()]
    if torch.stack([value.to(run.device, torch.float64) for value in values]).isfinite().all():
        return None
    for step, index, loss in losses:
        if not loss.isfinite():
            return _of_loss(run, step, index)
    if name := run.engine.non_finite_weights():
        return FloatingPointError(f"step {run.step}: the weights of {name} are not finite. {ADVICE} with a lower learning rate")
    return None  # only the norm of all weights overflows


def _of_loss(run: RunState, step: int, index: int) -> FloatingPointError:
    window = run.plan.window(step, process_group.rank())
    samples = ", ".join(sample_origins(run.data, window[index], run.seed))
    return FloatingPointError(
        f"step {step + 1}: the loss is not finite. The micro-batch came from {samples}."
        f" {ADVICE} with other data or a lower learning rate"
    )
