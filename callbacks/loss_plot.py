"""LossPlot: the loss curve as a picture that is kept up to date while the run goes on.

Thin: the loss as logged. Thick: its exponential moving average, corrected for its start at zero as in Adam (arXiv 1412.6980,
section 3). Points: validations. Dashed, with its own axis: the learning rate. Where preferences are learnt there is a second
panel with accuracies and margins. The points are kept in memory and in checkpoints; the average is taken before they are
thinned out, so that it stays the same in long runs.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

from bumblebee.callback import Callback
from bumblebee.plotting.curves import Average, draw, save

if TYPE_CHECKING:
    from bumblebee.trainer import Trainer

_REWARDS = ("rewards/accuracies", "rewards/margins")
_LIMIT = 5_000  # points of a curve, more than a picture has columns


class LossPlot(Callback):
    """Draws loss.png in output_dir.

    Args:
        every: optimizer steps between two drawings; there is one at the end in any case.
        smoothing: how much of the smoothed loss each logged step keeps; 0 draws no smoothed curve.

    Raises:
        ValueError: every is less than 1, or smoothing is not in [0, 1).
    """

    def __init__(self, every: int = 100, smoothing: float = 0.9) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must be in [0, 1), got {smoothing}")
        self.every, self.smoothing = every, smoothing
        self._clear()

    def on_fit_start(self, trainer: Trainer) -> None:
        """A run from the start has an empty picture."""
        if trainer.step == 0:
            self._clear()
        self._drawn_at = trainer.step

    def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """One more point; draw if it is time."""
        if math.isfinite(metrics.get("loss", math.nan)):
            smooth = self._average.add(metrics["loss"], self.smoothing)
            self._training.add(trainer.step, metrics["loss"], smooth, metrics["lr"])
        if all(name in metrics for name in _REWARDS):
            self._rewards.add(trainer.step, *(metrics[name] for name in _REWARDS))
        if trainer.step - self._drawn_at >= self.every:
            self._draw(trainer)

    def on_validation_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """One more validation point."""
        if math.isfinite(metrics.get("validation_loss", math.nan)):
            self._validation.add(trainer.step, metrics["validation_loss"])

    def on_fit_end(self, trainer: Trainer) -> None:
        """The final picture."""
        self._draw(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The points, and the average."""
        return {name: copy.deepcopy(vars(part)) for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with these points."""
        for name, part in self._parts().items():
            vars(part).update(state.get(name, {}))

    def _clear(self) -> None:
        self._training, self._validation, self._average = _Points(4), _Points(2), Average()
        self._rewards = _Points(3)
        self._drawn_at = 0

    def _parts(self) -> dict[str, _Points | Average]:
        points = {"training": self._training, "validation": self._validation, "rewards": self._rewards}
        return {**points, "average": self._average}

    def _draw(self, trainer: Trainer) -> None:
        self._drawn_at = trainer.step
        if trainer.is_main and self._training.columns[0]:
            figure = draw(self._training.columns, self._validation.columns, self.smoothing, self._rewards.columns)
            figure.suptitle(trainer.output_dir.resolve().name, x=0.01, ha="left", fontsize=13, fontweight="bold")
            save(figure, trainer.output_dir / "loss.png")


class _Points:
    """Columns of numbers. When they are full every second row goes, and from then on only every second is taken."""

    def __init__(self, width: int) -> None:
        self.columns: list[list[float]] = [[] for _ in range(width)]
        self.stride, self.seen = 1, 0

    def add(self, *row: float) -> None:
        if self.seen % self.stride == 0:
            for column, value in zip(self.columns, row, strict=True):
                column.append(float(f"{value:.6g}") if isinstance(value, float) else value)
        self.seen += 1
        if len(self.columns[0]) > _LIMIT:
            self.columns = [column[::2] for column in self.columns]
            self.stride *= 2
