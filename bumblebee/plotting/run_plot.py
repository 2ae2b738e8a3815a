"""The picture of one run, loss.png: a panel for each of the task's ``panels``.

Thin line: the logged values. Thick line: their exponential moving average. Points: validation. Band: one standard deviation
above and below the average. Dashed, on its own axis in the first panel: the learning rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from bumblebee.plotting.curves import new_figure, style_axes
from bumblebee.plotting.panels import ShownMetric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class CurvePoints:
    """The points of a metric.

    Args:
        metric: what they are.
        steps: of the logged values.
        values: the logged values.
        smoothed: their moving average.
        spread: moving average of the standard deviation; empty without one.
        validation: steps and values of validations.
    """

    metric: ShownMetric
    steps: list[float]
    values: list[float]
    smoothed: list[float]
    spread: list[float] = field(default_factory=list)
    validation: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))


class _Style(NamedTuple):
    """Colours of the logged values, of their average and of validation points."""

    logged: str
    average: str
    validation: str
    width: float = 1.8


_FIRST = _Style("#4c78a8", "#1f4e79", "#e45756", 2.2)  # the first panel's metric
_LEFT, _RIGHT = _Style("#54a24b", "#2f6b29", "#2f6b29"), _Style("#b279a2", "#77426a", "#77426a")


def plot_run(panels: Sequence[Sequence[CurvePoints]], rate: tuple[list[float], list[float]], smoothing: float) -> Figure:
    """Plot a run.

    Args:
        panels: one or two curves each.
        rate: steps and learning rates, for the first panel.
        smoothing: for the legend; 0 omits the smoothed curves.
    """
    figure = new_figure(len(panels))
    first: Axes | None = None
    for row, curves in enumerate(panels, start=1):
        axes = figure.add_subplot(len(panels), 1, row, sharex=first)
        _plot_curve(axes, curves[0], _FIRST if first is None else _LEFT, smoothing)
        style_axes(axes)
        right = axes
        if len(curves) > 1:
            right = _second_axis(axes)
            _plot_curve(right, curves[1], _RIGHT, smoothing)
            for side, style in ((axes, _FIRST if first is None else _LEFT), (right, _RIGHT)):
                side.yaxis.label.set_color(style.average)
        elif first is None:
            right = _plot_learning_rate(axes, *rate)
        _legend_above(axes, right)
        first = first or axes
    return figure


def _second_axis(axes: Axes) -> Axes:
    right = axes.twinx()
    right.spines["top"].set_visible(False)
    right.margins(x=0.01)
    return right


def _plot_curve(axes: Axes, curve: CurvePoints, style: _Style, smoothing: float) -> None:
    metric, label = curve.metric, curve.metric.label
    marker = "o" if len(curve.steps) < 10 else ""  # a line through a single point is invisible
    width, alpha = (0.8, 0.45) if smoothing else (1.2, 1.0)
    if curve.spread:
        low, high = zip(*((m - s, m + s) for m, s in zip(curve.smoothed, curve.spread, strict=True)), strict=True)
        axes.fill_between(
            curve.steps, low, high, color=style.logged, alpha=0.15, linewidth=0, label=f"{label} ± standard deviation"
        )
    axes.plot(curve.steps, curve.values, color=style.logged, linewidth=width, alpha=alpha, marker=marker, label=label)
    if smoothing:
        name = f"{label}, smoothed ({smoothing:g})"
        axes.plot(curve.steps, curve.smoothed, color=style.average, linewidth=style.width, label=name)
    if curve.validation[0]:
        axes.plot(
            *curve.validation, color=style.validation, marker="D", markersize=5, markeredgecolor="white",
            linewidth=1.2 if style is _FIRST else 0, label=f"{label}, validation",
        )  # fmt: skip
    if metric.fraction:
        axes.set_ylim(-0.02, 1.02)
    axes.set_ylabel(metric.axis or label)


def _legend_above(axes: Axes, right: Axes) -> None:
    """A legend of both axes' lines outside of the panel, where it covers no curve."""
    sides = (axes,) if right is axes else (axes, right)
    entries = [entry for side in sides for entry in zip(*side.get_legend_handles_labels(), strict=True)]
    handles, labels = zip(*entries, strict=True)
    columns = (4 if len(labels) <= 4 else 3) if right.get_ylabel() == _RATE else 2  # two metrics have a column each
    axes.legend(handles, labels, frameon=False, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=columns)


_RATE = "learning rate"


def _plot_learning_rate(axes: Axes, steps: list[float], learning_rates: list[float]) -> Axes:
    """Draw the learning rate behind the curve, on an axis of its own, which is returned."""
    right = _second_axis(axes)
    right.plot(steps, learning_rates, color="#bbbbbb", linewidth=1.0, linestyle=(0, (4, 3)), label=_RATE)
    right.set_ylabel(_RATE, color="#999999")
    right.set_ylim(bottom=0)
    right.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    right.tick_params(axis="y", colors="#999999")
    for side, spine in right.spines.items():
        spine.set_visible(side == "right")
        spine.set_color("#cccccc")
    axes.set_zorder(right.get_zorder() + 1)  # the curve in front of the learning rate
    axes.patch.set_visible(False)
    return right
