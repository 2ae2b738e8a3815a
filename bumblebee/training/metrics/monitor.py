"""MetricMonitor: a validation metric that a callback acts on, and what counts as an improvement of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bumblebee.training.run_state import RunState


class MetricMonitor:
    """Reads a metric from validations and compares its values.

    Args:
        owner: the callback, as error messages name it.
        metric: name of the metric in the results of a validation.
        mode: min if lower values are better, max if higher values are better.
        min_delta: smallest difference to the best value that counts as an improvement.

    Raises:
        ValueError: an unknown mode or a negative min_delta.
    """

    def __init__(self, owner: str, metric: str, mode: str, min_delta: float = 0.0) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"mode must be min or max, got {mode!r}")
        if not min_delta >= 0:
            raise ValueError(f"min_delta must be at least 0, got {min_delta}")
        self.owner, self.metric, self.mode, self.min_delta = owner, metric, mode, min_delta

    def require_validation_data(self, trainer: RunState) -> None:
        """Raise if the data has no validation samples.

        Raises:
            ValueError: names the options to set.
        """
        if not len(trainer.data.validation or ()):
            raise ValueError(
                f"callbacks: {self.owner} needs validation samples: set data.validation_ratio or data.validation_files,"
                " and add callbacks.Validation"
            )

    def value(self, metrics: Mapping[str, float]) -> float:
        """Return the metric's value in the results of a validation.

        Raises:
            ValueError: the validation does not report this metric; the message lists those it does.
        """
        if self.metric not in metrics:
            known = ", ".join(metrics)
            raise ValueError(f"callbacks: {self.owner}: unknown metric {self.metric!r}; validation reports {known}")
        return metrics[self.metric]

    def improves(self, value: float, best: float | None) -> bool:
        """Whether ``value`` is better than ``best`` by more than ``min_delta``. NaN and infinity never are."""
        if not math.isfinite(value):
            return False
        return best is None or (best - value if self.mode == "min" else value - best) > self.min_delta

    def sort_key(self, value: float) -> float:
        """Sort key that puts the best value first."""
        return value if self.mode == "min" else -value
