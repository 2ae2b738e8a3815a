"""LossPlot: a picture of the run's curves, updated during training.

The task says which metrics are worth a panel (``Task.panels``): the loss of language modelling, accuracies and margins of
preferences, rewards and lengths in reinforcement learning. How they are drawn: ``bumblebee/plotting/run_plot.py``. The
points are kept in memory and in checkpoints. They are downsampled in long runs, after smoothing, so that the average does not
change.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bumblebee.callback import Callback
from bumblebee.plotting.curves import MovingAverage, save_figure
from bumblebee.plotting.panels import ShownMetric
from bumblebee.plotting.run_plot import CurvePoints, plot_run

if TYPE_CHECKING:
    from bumblebee.trainer import Trainer

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
        """Add points; draw if due."""
        for metric in _shown(trainer):
            if math.isfinite(metrics.get(metric.name, math.nan)):
                self._training.setdefault(metric.name, _Curve()).add(trainer.step, metric, metrics, self.smoothing)
        if "lr" in metrics:
            self._rate.add(trainer.step, metrics["lr"])
        if trainer.step - self._drawn_at >= self.every:
            self._draw(trainer)

    def on_validation_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Add validation points."""
        for metric in _shown(trainer):
            value = metrics.get(f"validation_{metric.name}", math.nan)
            if math.isfinite(value):
                self._validation.setdefault(metric.name, _Series(2)).add(trainer.step, value)

    def on_fit_end(self, trainer: Trainer) -> None:
        """Draw the final picture."""
        self._draw(trainer)

    def state_dict(self) -> dict[str, object]:
        """The points and the moving averages."""
        return {
            "curves": {name: curve.state_dict() for name, curve in self._training.items()},
            "validations": {name: series.state_dict() for name, series in self._validation.items()},
            "learning rate": self._rate.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the points and the moving averages. A state of an earlier version has only those of the loss."""
        if "training" in state:
            state = _converted(state)
        self._clear()
        self._training.update((name, _Curve.of(part)) for name, part in state.get("curves", {}).items())
        self._validation.update((name, _Series(2, part)) for name, part in state.get("validations", {}).items())
        self._rate = _Series(2, state.get("learning rate", {}))

    def _clear(self) -> None:
        self._training: dict[str, _Curve] = {}
        self._validation: dict[str, _Series] = {}
        self._rate = _Series(2)
        self._drawn_at = 0

    def _draw(self, trainer: Trainer) -> None:
        self._drawn_at = trainer.step
        panels = [self._points(panel.metrics) for panel in trainer.task.panels]
        if trainer.is_main and any(panels):
            steps, rates = self._rate.columns
            figure = plot_run([panel for panel in panels if panel], (steps, rates), self.smoothing)
            figure.suptitle(trainer.output_dir.resolve().name, x=0.01, ha="left", fontsize=13, fontweight="bold")
            save_figure(figure, trainer.output_dir / "loss.png")

    def _points(self, metrics: tuple[ShownMetric, ...]) -> list[CurvePoints]:
        """The curves of a panel that have been logged."""
        curves = []
        for metric in metrics:
            if metric.name in self._training:
                steps, values, smoothed, spread = self._training[metric.name].series.columns
                of_validation = self._validation.get(metric.name, _Series(2)).columns
                validation = of_validation[0], of_validation[1]
                curves.append(CurvePoints(metric, steps, values, smoothed, spread if any(spread) else [], validation))
        return curves


def _shown(trainer: Trainer) -> list[ShownMetric]:
    return [metric for panel in trainer.task.panels for metric in panel.metrics]


class _Series:
    """Columns of numbers of limited length. A full series drops every second row and halves its sampling rate."""

    def __init__(self, width: int, state: Mapping[str, Any] | None = None) -> None:
        self.columns: list[list[float]] = [[] for _ in range(width)]
        self.stride, self.seen = 1, 0
        vars(self).update(copy.deepcopy(dict(state or {})))

    def add(self, *row: float) -> None:
        if self.seen % self.stride == 0:
            for column, value in zip(self.columns, row, strict=True):
                column.append(float(f"{value:.6g}") if isinstance(value, float) else value)
        self.seen += 1
        if len(self.columns[0]) > _MAX_POINTS:
            self.columns = [column[::2] for column in self.columns]
            self.stride *= 2

    def state_dict(self) -> dict[str, object]:
        return copy.deepcopy(vars(self))


class _Curve:
    """A series of (step, value, smoothed value, smoothed standard deviation or 0), and its moving averages."""

    def __init__(self) -> None:
        self.series, self.average, self.spread = _Series(4), MovingAverage(), MovingAverage()

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> _Curve:
        curve = cls()
        curve.series = _Series(4, state["series"])
        vars(curve.average).update(state["average"])
        vars(curve.spread).update(state["spread"])
        return curve

    def add(self, step: int, metric: ShownMetric, metrics: Mapping[str, float], smoothing: float) -> None:
        spread = self.spread.add(metrics[metric.spread], smoothing) if metric.spread in metrics else 0.0
        value = metrics[metric.name]
        self.series.add(step, value, self.average.add(value, smoothing), spread)

    def state_dict(self) -> dict[str, object]:
        averages = {"average": dict(vars(self.average)), "spread": dict(vars(self.spread))}
        return {"series": self.series.state_dict(), **averages}


def _converted(old: Mapping[str, Any]) -> dict[str, Any]:
    """The state of a version that knew the loss and one pair of rewards, whose names it did not keep."""
    steps, values, smoothed, rates = old["training"]["columns"]
    sampling = {name: old["training"][name] for name in ("stride", "seen")}
    series = {"columns": [steps, values, smoothed, [0.0] * len(steps)], **sampling}
    loss = {"series": series, "average": old["average"], "spread": {}}
    return {
        "curves": {"loss": loss} if steps else {},
        "validations": {"loss": old["validation"]},
        "learning rate": {"columns": [steps, rates], **sampling},
    }
