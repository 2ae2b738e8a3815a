"""What counts as better, for callbacks that look at one metric of the validations. No callback: several of them use it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bumblebee.trainer import Trainer


def check_mode(mode: str) -> str:
    """The mode itself.

    Raises:
        ValueError: neither min nor max.
    """
    if mode not in ("min", "max"):
        raise ValueError(f"mode must be min or max, got {mode!r}")
    return mode


def check_held_out(trainer: Trainer, name: str) -> None:
    """Refuse data on which nothing can be validated.

    Raises:
        ValueError: what to set, in the words of callback ``name``.
    """
    if not len(trainer.data.validation or ()):
        raise ValueError(
            f"callbacks: {name} looks at validations, and there are no validation samples: set data.validation_ratio or"
            " data.validation_files, and use callbacks.Validation"
        )


def measured(metrics: dict[str, float], metric: str, name: str) -> float:
    """The metric's value in a validation.

    Raises:
        ValueError: it is not measured; the message has what is, in the words of callback ``name``.
    """
    if metric not in metrics:
        raise ValueError(f"callbacks: {name}.metric {metric!r} is not measured; a validation gives {', '.join(metrics)}")
    return metrics[metric]


def improves(value: float, best: float | None, mode: str, min_delta: float = 0.0) -> bool:
    """Whether ``value`` is better than ``best`` by more than ``min_delta``. NaN and infinity never are."""
    if not math.isfinite(value):
        return False
    return best is None or (best - value if mode == "min" else value - best) > min_delta
