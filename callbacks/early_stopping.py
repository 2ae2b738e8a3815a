"""EarlyStopping: stop training when a validation metric no longer improves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from bumblebee.callback import Callback
from bumblebee.training.metrics.monitor import MetricMonitor
from bumblebee.utils.formatting import number, plural

if TYPE_CHECKING:
    from bumblebee.trainer import Trainer


class EarlyStopping(Callback):
    """Stops training after several validations in a row without improvement.

    Args:
        metric: name of the validation metric, or ``eval/<task>`` of callbacks.Evaluate.
        patience: number of validations in a row without improvement after which training stops.
        min_delta: smallest difference to the best value that counts as an improvement.
        mode: min if lower values are better, max if higher values are better.

    Raises:
        ValueError: patience is less than 1, min_delta is negative, or mode is unknown.
    """

    def __init__(
        self,
        metric: str = "validation_loss",
        patience: int = 3,
        min_delta: float = 0.0,
        mode: Literal["min", "max"] = "min",
    ) -> None:
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}")
        self.monitor = MetricMonitor("EarlyStopping", metric, mode, min_delta)
        self.patience = patience
        self._best: float | None = None
        self._without_improvement = 0

    def check(self, trainer: Trainer) -> None:
        """Check the data.

        Raises:
            ValueError: nothing reports the metric.
        """
        self.monitor.require_source(trainer)

    def on_fit_start(self, trainer: Trainer) -> None:
        """Forget earlier values unless the run is resumed."""
        if trainer.step == 0:
            self._best, self._without_improvement = None, 0

    def on_validation_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Stop if patience is exhausted. Metrics are reduced over ranks, so that all ranks decide alike.

        Raises:
            ValueError: the validation does not report the metric.
        """
        if not self.monitor.is_of_evaluation:
            self._observe(trainer, self.monitor.value(metrics))

    def on_evaluation_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """The same for a metric of callbacks.Evaluate.

        Raises:
            ValueError: the evaluation does not report the metric.
        """
        if self.monitor.is_of_evaluation:
            self._observe(trainer, self.monitor.value(metrics))

    def _observe(self, trainer: Trainer, value: float) -> None:
        if self.monitor.improves(value, self._best):
            self._best, self._without_improvement = value, 0
            return
        self._without_improvement += 1
        if self._without_improvement >= self.patience:
            trainer.should_stop = True
            best = "no finite value yet" if self._best is None else f"best {number(self._best)}"
            noun = "evaluation" if self.monitor.is_of_evaluation else "validation"
            count = plural(self._without_improvement, noun)
            trainer.print(f"early stopping: {self.monitor.metric} did not improve in {count} ({best})")

    def state_dict(self) -> dict[str, Any]:
        """The best value and the number of validations since then."""
        monitor = self.monitor
        return {"metric": monitor.metric, "mode": monitor.mode, "best": self._best, "in_vain": self._without_improvement}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the values, unless they belong to another metric or mode."""
        if (state["metric"], state["mode"]) == (self.monitor.metric, self.monitor.mode):
            self._best, self._without_improvement = state["best"], state["in_vain"]
