"""Plots of metrics: several runs' metrics for comparison, and what every picture needs. One run: ``run_plot.py``."""

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


def style_axes(axes: Axes, xlabel: str = "optimizer steps", integer_x: bool = True) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(xlabel)
    if integer_x:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(color="#e4e4e4", linewidth=0.6)
    axes.margins(x=0.01)
    axes.spines[["top", "right"]].set_visible(False)
