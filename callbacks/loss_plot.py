"""LossPlot: a picture of the loss curve, updated during training.

Thin line: the logged loss. Thick line: its exponential moving average (``bumblebee.plotting.curves.MovingAverage``). Points:
validation loss. Dashed, on its own axis: the learning rate. Preference training has a second panel with reward accuracies and
margins, drawn alike, reinforcement learning one with rewards and lengths of completions. The points are kept in memory and in
checkpoints. They are downsampled in long runs, after smoothing, so that the average does not change.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

from bumblebee.callback import Callback
from bumblebee.plotting.curves import MovingAverage, RewardCurves, plot_run, save_figure

if TYPE_CHECKING:
    from bumblebee.trainer import Trainer

_PANELS = {  # metrics of the second panel: their names in it
    ("rewards/accuracies", "rewards/margins"): ("accuracy", "margin"),
    ("rl/reward", "rl/length"): ("reward", "tokens per completion"),
}
_MAX_POINTS = 5_000  # of a curve; more than a picture has columns


class LossPlot(Callback):
    """Draws loss.png in output_dir.

    Args:
        every: optimizer steps between two updates; the picture is always updated at the end.
        smoothing: weight of the previous average in the exponential moving average, in [0, 1); 0 draws no smoothed curve.

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
        """Start with an empty picture unless the run is resumed."""
        if trainer.step == 0:
            self._clear()
        self._drawn_at = trainer.step

    def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Add a point; draw if due."""
        if math.isfinite(metrics.get("loss", math.nan)):
            smooth = self._average.add(metrics["loss"], self.smoothing)
            self._training.add(trainer.step, metrics["loss"], smooth, metrics["lr"])
        if pair := _pair_in(metrics):
            self._names = _PANELS[pair]
            values = [metrics[name] for name in pair]
            self._rewards.add(trainer.step, *values)
            pairs = zip(self._averages, values, strict=True)
            self._smoothed_rewards.add(trainer.step, *(average.add(value, self.smoothing) for average, value in pairs))
        if trainer.step - self._drawn_at >= self.every:
            self._draw(trainer)

    def on_validation_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Add a validation point."""
        if math.isfinite(metrics.get("validation_loss", math.nan)):
            self._validation.add(trainer.step, metrics["validation_loss"])
        if pair := _pair_in(metrics, "validation_"):
            self._validation_rewards.add(trainer.step, *(metrics[f"validation_{name}"] for name in pair))

    def on_fit_end(self, trainer: Trainer) -> None:
        """Draw the final picture."""
        self._draw(trainer)

    def state_dict(self) -> dict[str, Any]:
        """The points and the moving average."""
        return {name: copy.deepcopy(vars(part)) for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the points and the moving average."""
        for name, part in self._parts().items():
            vars(part).update(state.get(name, {}))

    def _clear(self) -> None:
        self._training, self._validation = _Series(4), _Series(2)
        self._rewards, self._smoothed_rewards, self._validation_rewards = _Series(3), _Series(3), _Series(3)
        self._average = MovingAverage()
        self._averages = (MovingAverage(), MovingAverage())  # of the second panel
        self._names = ("accuracy", "margin")
        self._drawn_at = 0

    def _parts(self) -> dict[str, _Series | MovingAverage]:
        return {
            "training": self._training, "validation": self._validation, "average": self._average,
            "rewards": self._rewards, "smoothed rewards": self._smoothed_rewards,
            "validation rewards": self._validation_rewards, "average accuracy": self._averages[0],
            "average margin": self._averages[1],
        }  # fmt: skip

    def _draw(self, trainer: Trainer) -> None:
        self._drawn_at = trainer.step
        if trainer.is_main and self._training.columns[0]:
            figure = plot_run(self._training.columns, self._validation.columns, self.smoothing, self._reward_curves())
            figure.suptitle(trainer.output_dir.resolve().name, x=0.01, ha="left", fontsize=13, fontweight="bold")
            save_figure(figure, trainer.output_dir / "loss.png")

    def _reward_curves(self) -> RewardCurves | None:
        """None for tasks without rewards."""
        if not self._rewards.columns[0]:
            return None
        smoothed, validation = self._smoothed_rewards.columns, self._validation_rewards.columns
        return RewardCurves(self._rewards.columns, smoothed, validation, self._names)


def _pair_in(metrics: dict[str, float], prefix: str = "") -> tuple[str, str] | None:
    """The metrics of the second panel that are there."""
    return next((pair for pair in _PANELS if all(f"{prefix}{name}" in metrics for name in pair)), None)


class _Series:
    """Columns of numbers of limited length. A full series drops every second row and halves its sampling rate."""

    def __init__(self, width: int) -> None:
        self.columns: list[list[float]] = [[] for _ in range(width)]
        self.stride, self.seen = 1, 0

    def add(self, *row: float) -> None:
        if self.seen % self.stride == 0:
            for column, value in zip(self.columns, row, strict=True):
                column.append(float(f"{value:.6g}") if isinstance(value, float) else value)
        self.seen += 1
        if len(self.columns[0]) > _MAX_POINTS:
            self.columns = [column[::2] for column in self.columns]
            self.stride *= 2
