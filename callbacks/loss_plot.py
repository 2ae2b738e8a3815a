"""LossPlot: the loss curve as a picture that is kept up to date while the run goes on.

Thin: the loss as logged. Thick: its exponential moving average, corrected for its start at zero as in Adam (arXiv 1412.6980,
section 3). Points: validations. Dashed, with its own axis: the learning rate. Where preferences are learnt there is a second
panel with accuracies and margins. The points are kept in memory and in checkpoints; the average is taken before they are
thinned out, so that it stays the same in long runs.
"""

from __future__ import annotations

import copy
import math
import os
from typing import TYPE_CHECKING, Any

from bumblebee.callback import Callback

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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
        self._training, self._validation, self._average = _Points(4), _Points(2), _Average()
        self._rewards = _Points(3)
        self._drawn_at = 0

    def _parts(self) -> dict[str, _Points | _Average]:
        points = {"training": self._training, "validation": self._validation, "rewards": self._rewards}
        return {**points, "average": self._average}

    def _draw(self, trainer: Trainer) -> None:
        self._drawn_at = trainer.step
        if trainer.is_main and self._training.columns[0]:
            figure = draw(self._training.columns, self._validation.columns, self.smoothing, self._rewards.columns)
            figure.suptitle(trainer.output_dir.resolve().name, x=0.01, ha="left", fontsize=13, fontweight="bold")
            aside = trainer.output_dir / ".loss.png.partial"
            figure.savefig(aside, format="png")
            os.replace(aside, trainer.output_dir / "loss.png")


class _Average:
    """An exponential moving average that is right from the first value on."""

    def __init__(self) -> None:
        self.total, self.weight = 0.0, 0.0

    def add(self, value: float, keep: float) -> float:
        self.total = keep * self.total + (1 - keep) * value
        self.weight = keep * self.weight + (1 - keep)
        return self.total / self.weight


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


# -- drawing -----------------------------------------------------------------------------------------------------------


def draw(
    training: list[list[float]], validation: list[list[float]], smoothing: float, rewards: list[list[float]] | None = None
) -> Figure:
    """The picture.

    Args:
        training: columns of step, loss, smoothed loss and learning rate.
        validation: columns of step and loss.
        smoothing: for the legend; 0 leaves the smoothed curve out.
        rewards: columns of step, accuracy and margin; None or no steps: there is no second panel.
    """
    from matplotlib.figure import Figure

    preferences = bool(rewards and rewards[0])
    figure = Figure(figsize=(9, 8 if preferences else 5), dpi=130, layout="constrained")
    axes = figure.add_subplot(2 if preferences else 1, 1, 1)
    _draw_losses(axes, training, validation, smoothing)
    axes.set_ylabel("loss" if preferences else "loss (nats per token)")
    _draw_learning_rate(axes, training[0], training[3])
    axes.legend(frameon=False, loc="upper right")
    if rewards and preferences:
        _draw_rewards(figure.add_subplot(2, 1, 2, sharex=axes), *rewards)
    return figure


def _draw_losses(axes: Axes, training: list[list[float]], validation: list[list[float]], smoothing: float) -> None:
    steps, losses, smooth, _ = training
    marker = "o" if len(steps) < 10 else ""  # a line of one point is not seen
    axes.plot(steps, losses, color="#4c78a8", linewidth=0.8, alpha=0.45 if smoothing else 1.0, marker=marker, label="training")
    if smoothing:
        axes.plot(steps, smooth, color="#1f4e79", linewidth=2.2, label=f"training, smoothed ({smoothing:g})")
    if validation[0]:
        axes.plot(*validation, color="#e45756", marker="o", markersize=4.5, linewidth=1.2, label="validation")
    _draw_frame(axes)


def _draw_frame(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("optimizer steps")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(color="#e4e4e4", linewidth=0.6)
    axes.margins(x=0.01)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_rewards(axes: Axes, steps: list[float], accuracies: list[float], margins: list[float]) -> None:
    """How often the chosen response has the larger reward, and by how much on average."""
    axes.plot(steps, accuracies, color="#54a24b", linewidth=1.2, label="accuracy")
    axes.set_ylim(-0.02, 1.02)
    axes.set_ylabel("accuracy of rewards", color="#3b7a34")
    _draw_frame(axes)
    right = axes.twinx()
    right.plot(steps, margins, color="#b279a2", linewidth=1.2, label="margin")
    right.set_ylabel("margin of rewards", color="#8a5680")
    right.spines["top"].set_visible(False)
    right.margins(x=0.01)


def _draw_learning_rate(axes: Axes, steps: list[float], rates: list[float]) -> None:
    right = axes.twinx()
    right.plot(steps, rates, color="#bbbbbb", linewidth=1.0, linestyle=(0, (4, 3)))
    right.margins(x=0.01)
    right.set_ylabel("learning rate (dashed)", color="#999999")
    right.set_ylim(bottom=0)
    right.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    right.tick_params(axis="y", colors="#999999")
    for side, spine in right.spines.items():
        spine.set_visible(side == "right")
        spine.set_color("#cccccc")
    axes.set_zorder(right.get_zorder() + 1)  # the losses above the rate
    axes.patch.set_visible(False)
