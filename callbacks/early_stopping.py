"""EarlyStopping: ends a run that no longer gets better on the held-out samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from bumblebee.callback import Callback
from bumblebee.formatting import number
from bumblebee.training.metric_formatting import say
from bumblebee.training.metric_monitor import check_held_out, check_mode, improves, measured

if TYPE_CHECKING:
    from bumblebee.trainer import Trainer


class EarlyStopping(Callback):
    """Stops when one validation after the other brings no improvement.

    Args:
        metric: what is looked at, under the name that validations give it.
        patience: validations in a row without improvement after which the run ends.
        min_delta: by how much a value must beat the best one to be an improvement.
        mode: min where smaller values are better, max where larger ones are.

    Raises:
        ValueError: patience is less than 1, min_delta is negative, or an unknown mode.
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
        if not min_delta >= 0:
            raise ValueError(f"min_delta must not be negative, got {min_delta}")
        self.metric, self.patience, self.min_delta, self.mode = metric, patience, min_delta, check_mode(mode)
        self._best: float | None = None
        self._in_vain = 0

    def on_fit_start(self, trainer: Trainer) -> None:
        """A run from the start has no best value yet.

        Raises:
            ValueError: nothing is held out.
        """
        check_held_out(trainer, "EarlyStopping")
        if trainer.step == 0:
            self._best, self._in_vain = None, 0

    def on_validation_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Better, or one more in vain. Metrics are those of all ranks, so all decide alike.

        Raises:
            ValueError: the metric is not measured.
        """
        value = measured(metrics, self.metric, "EarlyStopping")
        if improves(value, self._best, self.mode, self.min_delta):
            self._best, self._in_vain = value, 0
            return
        self._in_vain += 1
        if self._in_vain >= self.patience:
            trainer.should_stop = True
            if trainer.is_main:
                best = "a finite value" if self._best is None else number(self._best)
                say(f"stopping early: {self.metric} has not improved on {best} in {self._in_vain} validations")

    def state_dict(self) -> dict[str, Any]:
        """The best value, and how many validations have not beaten it."""
        return {"metric": self.metric, "mode": self.mode, "best": self._best, "in_vain": self._in_vain}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting, unless it was another metric that was looked at."""
        if (state["metric"], state["mode"]) == (self.metric, self.mode):
            self._best, self._in_vain = state["best"], state["in_vain"]
