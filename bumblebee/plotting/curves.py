"""Plots of metrics: one run's loss curve during training, and several runs' metrics for comparison."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The palette of Okabe and Ito, distinguishable with colour blindness; repeated with dashed lines for more runs.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)))


# Functions of the step or counters, which have no noise to smooth.
_EXACT = {"step", "epoch", "seconds", "tokens", "lr", "loss_scale", "skipped_steps", "memory_gb"}


class MovingAverage:
    """An exponential moving average, bias-corrected as in Adam (arXiv 1412.6980, section 3).

    The weight of earlier values rises with their number n as (1 + n) / (10 + n) until it reaches ``smoothing``: the average of
    a short run covers a tenth of it, and does not lag far behind a falling loss.
    """

    def __init__(self) -> None:
        self.total, self.weight, self.count = 0.0, 0.0, 0

    def add(self, value: float, smoothing: float) -> float:
        """Add a value and return the average; ``smoothing`` is the largest weight of all earlier values."""
        decay = min(smoothing, (1 + self.count) / (10 + self.count))
        self.total = decay * self.total + (1 - decay) * value
        self.weight = decay * self.weight + (1 - decay)
        self.count += 1
        return self.total / self.weight


def is_smoothed(metric: str) -> bool:
    """Whether plots and tables smooth a metric."""
    return metric not in _EXACT


def smooth(values: Sequence[float], smoothing: float) -> list[float]:
    """The exponential moving average at each value; with a smoothing of 0 the values themselves."""
    if not smoothing:
        return list(values)
    average = MovingAverage()
    return [average.add(value, smoothing) for value in values]


@dataclass
class MetricCurve:
    """A metric of a run.

    Args:
        name: of the run, for the legend.
        x: position of each value on the horizontal axis.
        values: the values.
        validation: positions and values of the same metric on the validation samples, drawn as points.
    """

    name: str
    x: list[float]
    values: list[float]
    validation: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))


@dataclass
class RewardCurves:
    """Two metrics of preference training or reinforcement learning; in the first three fields after a column of steps.

    Args:
        training: the logged values.
        smoothed: their moving average.
        validation: values on the validation samples.
        names: of the metrics, for the axes and the legend.
    """

    training: list[list[float]]
    smoothed: list[list[float]] = field(default_factory=lambda: [[], [], []])
    validation: list[list[float]] = field(default_factory=lambda: [[], [], []])
    names: tuple[str, str] = ("accuracy", "margin")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a picture atomically, in the format of the file's suffix."""
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format=path.suffix[1:])
    os.replace(partial, path)


def picture_formats() -> list[str]:
    """Suffixes of supported picture files, without the dot."""
    from matplotlib.figure import Figure

    return sorted(Figure().canvas.get_supported_filetypes())


def new_figure(panels: int) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(9, 2 + 3 * panels), dpi=130, layout="constrained")


# -- several runs ----------------------------------------------------------------------------------------------------------


def plot_runs(panels: dict[str, list[MetricCurve]], xlabel: str, integer_x: bool, smoothing: float) -> Figure:
    """Plot one panel per metric, one colour per run.

    Args:
        panels: curves by the name of their metric; every panel has the same runs in the same order.
        xlabel: label of the horizontal axis.
        integer_x: whether the horizontal axis has whole numbers.
        smoothing: of the thick lines; with 0, and for metrics without noise, the values themselves are drawn thick.
    """
    figure = new_figure(len(panels))
    first = None
    for row, (metric, curves) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(len(panels), 1, row, sharex=first)
        first = first or axes
        panel_smoothing = smoothing if is_smoothed(metric) else 0.0
        for index, curve in enumerate(curves):
            _plot_curve(axes, curve, index, panel_smoothing)
        axes.set_ylabel(metric)
        style_axes(axes, xlabel, integer_x)
        _explain_styles(axes, panel_smoothing, any(curve.validation[0] for curve in curves))
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))  # beside the curves
    return figure


def _explain_styles(axes: Axes, smoothing: float, has_validation: bool) -> None:
    """Add grey entries to the legend for what is not a run's colour."""
    if smoothing:
        axes.plot([], [], color="#888888", linewidth=1.8, label=f"smoothed ({smoothing:g})")
        axes.plot([], [], color="#888888", linewidth=0.7, alpha=0.5, label="logged")
    if has_validation:
        axes.plot([], [], color="#888888", linestyle="", marker="D", markersize=5, label="validation")


def _plot_curve(axes: Axes, curve: MetricCurve, index: int, smoothing: float) -> None:
    colour, dashes = _COLOURS[index % len(_COLOURS)], _DASHES[index // len(_COLOURS) % len(_DASHES)]
    marker = "o" if len(curve.values) < 10 else ""  # a line through a single point is invisible
    if smoothing:
        axes.plot(curve.x, curve.values, color=colour, linewidth=0.7, alpha=0.3)
    values = smooth(curve.values, smoothing)
    axes.plot(curve.x, values, color=colour, linestyle=dashes, linewidth=1.8, marker=marker, label=curve.name)
    if curve.validation[0]:
        axes.plot(*curve.validation, color=colour, linestyle="", marker="D", markersize=5)


# -- one run ---------------------------------------------------------------------------------------------------------------


def plot_run(
    training: list[list[float]], validation: list[list[float]], smoothing: float, rewards: RewardCurves | None = None
) -> Figure:
    """Plot the loss curve of a run.

    Args:
        training: columns of step, loss, smoothed loss and learning rate.
        validation: columns of step and loss.
        smoothing: for the legend; 0 omits the smoothed curves.
        rewards: for a second panel.
    """
    panels = 1 if rewards is None else 2
    figure = new_figure(panels)
    axes = figure.add_subplot(panels, 1, 1)
    _plot_losses(axes, training, validation, smoothing)
    axes.set_ylabel("loss (nats per token)" if rewards is None else "loss")
    right = _plot_learning_rate(axes, training[0], training[3])
    _legend_above(axes, right)
    if rewards is not None:
        _plot_rewards(figure.add_subplot(panels, 1, 2, sharex=axes), rewards, smoothing)
    return figure


def _legend_above(axes: Axes, right: Axes) -> None:
    """A legend of both axes' lines outside of the panel, where it covers no curve."""
    handles, labels = (left + more for left, more in zip(*(a.get_legend_handles_labels() for a in (axes, right)), strict=True))
    columns = 4 if len(labels) <= 4 else 2  # one row, or one column for each axis
    axes.legend(handles, labels, frameon=False, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=columns)


def _plot_losses(axes: Axes, training: list[list[float]], validation: list[list[float]], smoothing: float) -> None:
    steps, losses, smoothed, _ = training
    marker = "o" if len(steps) < 10 else ""  # a line through a single point is invisible
    axes.plot(steps, losses, color="#4c78a8", linewidth=0.8, alpha=0.45 if smoothing else 1.0, marker=marker, label="training")
    if smoothing:
        axes.plot(steps, smoothed, color="#1f4e79", linewidth=2.2, label=f"training, smoothed ({smoothing:g})")
    if validation[0]:
        axes.plot(*validation, color="#e45756", marker="o", markersize=4.5, linewidth=1.2, label="validation")
    style_axes(axes)


def style_axes(axes: Axes, xlabel: str = "optimizer steps", integer_x: bool = True) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(xlabel)
    if integer_x:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(color="#e4e4e4", linewidth=0.6)
    axes.margins(x=0.01)
    axes.spines[["top", "right"]].set_visible(False)


def _plot_rewards(axes: Axes, rewards: RewardCurves, smoothing: float) -> None:
    """Two metrics, each with an axis of its own."""
    right = axes.twinx()
    left_name, right_name = rewards.names
    _plot_reward(axes, left_name, ("#54a24b", "#2f6b29"), rewards, 1, smoothing)
    _plot_reward(right, right_name, ("#b279a2", "#77426a"), rewards, 2, smoothing)
    if left_name == "accuracy":
        axes.set_ylim(-0.02, 1.02)
    axes.set_ylabel(_axis_label(left_name), color="#2f6b29")
    style_axes(axes)
    right.set_ylabel(_axis_label(right_name), color="#77426a")
    right.spines["top"].set_visible(False)
    right.margins(x=0.01)
    _legend_above(axes, right)


def _axis_label(name: str) -> str:
    return f"reward {name}" if name in ("accuracy", "margin") else name


def _plot_reward(
    axes: Axes, name: str, colours: tuple[str, str], rewards: RewardCurves, column: int, smoothing: float
) -> None:  # fmt: skip
    """One column: the logged values thin, their average thick, validations as points."""
    light, dark = colours
    steps = rewards.training[0]
    marker = "o" if len(steps) < 10 else ""  # a line through a single point is invisible
    width, alpha = (0.8, 0.45) if smoothing else (1.2, 1.0)
    axes.plot(steps, rewards.training[column], color=light, linewidth=width, alpha=alpha, marker=marker, label=name)
    if smoothing:
        label = f"{name}, smoothed ({smoothing:g})"
        axes.plot(rewards.smoothed[0], rewards.smoothed[column], color=dark, linewidth=1.8, label=label)
    if rewards.validation[0]:
        axes.plot(
            rewards.validation[0], rewards.validation[column], color=dark, marker="D", markersize=5, linestyle="",
            markeredgecolor="white", label=f"{name}, validation",
        )  # fmt: skip


def _plot_learning_rate(axes: Axes, steps: list[float], learning_rates: list[float]) -> Axes:
    """Draw the learning rate behind the loss, on an axis of its own, which is returned."""
    right = axes.twinx()
    right.plot(steps, learning_rates, color="#bbbbbb", linewidth=1.0, linestyle=(0, (4, 3)), label="learning rate")
    right.margins(x=0.01)
    right.set_ylabel("learning rate", color="#999999")
    right.set_ylim(bottom=0)
    right.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    right.tick_params(axis="y", colors="#999999")
    for side, spine in right.spines.items():
        spine.set_visible(side == "right")
        spine.set_color("#cccccc")
    axes.set_zorder(right.get_zorder() + 1)  # the loss in front of the learning rate
    axes.patch.set_visible(False)
    return right
