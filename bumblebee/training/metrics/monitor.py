"""MetricMonitor: a validation metric that a callback acts on, and what counts as an improvement of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bumblebee.training.run_state import RunState


EVALUATION = "eval/"  # how the names of metrics of callbacks.Evaluate begin


class MetricMonitor:
    """Reads a metric from validations or evaluations and compares its values.

    Args:
        owner: the callback, as error messages name it.
        metric: name of the metric in the results of a validation, or of an evaluation on tasks, ``eval/<task>``.
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

    @property
    def is_of_evaluation(self) -> bool:
        """Whether the metric is one of callbacks.Evaluate, and not of a validation."""
        return self.metric.startswith(EVALUATION)

    def require_source(self, trainer: RunState) -> None:
        """Raise if nothing in the run reports the metric: no callback evaluates the task, or the data cannot be validated.

        Raises:
            ValueError: names the options to set.
        """
        if self.is_of_evaluation:
            known = [name for callback in trainer.callbacks.values() for name in callback.evaluations]
            if not any(self.metric == name or self.metric.startswith(f"{name}/") for name in known):
                source = f"the tasks report {', '.join(known)}" if known else "add callbacks.Evaluate with the task"
                raise ValueError(f"callbacks: {self.owner}: no task reports the metric {self.metric!r}; {source}")
            return
        if not len(trainer.data.validation or ()):
            raise ValueError(
                f"callbacks: {self.owner} needs validation samples: set data.validation_ratio or data.validation_files,"
                " and add callbacks.Validation"
            )

    def value(self, metrics: Mapping[str, float]) -> float:
        """Return the metric's value in the results of a validation or an evaluation.

        Raises:
            ValueError: the validation does not report this metric; the message lists those it does.
        """
        if self.metric not in metrics:
            known = ", ".join(metrics)
            source = "evaluation" if self.is_of_evaluation else "validation"
            raise ValueError(f"callbacks: {self.owner}: unknown metric {self.metric!r}; {source} reports {known}")
        return metrics[self.metric]

    def improves(self, value: float, best: float | None) -> bool:
        """Whether ``value`` is better than ``best`` by more than ``min_delta``. NaN and infinity never are."""
        if not math.isfinite(value):
            return False
        return best is None or (best - value if self.mode == "min" else value - best) > self.min_delta

    def sort_key(self, value: float) -> float:
        """Sort key that puts the best value first."""
        return value if self.mode == "min" else -value
