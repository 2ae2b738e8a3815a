"""Curves as pictures: one run's loss while it trains, several runs' metrics beside each other. Only here is matplotlib."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of Okabe and Ito, told apart by people who do not see all colours alike; then the same again, dashed.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)))


class Average:
    """An exponential moving average that is right from the first value on."""

    def __init__(self) -> None:
        self.total, self.weight = 0.0, 0.0

    def add(self, value: float, keep: float) -> float:
        """The average with one more value, of which ``keep`` is the share of all earlier ones."""
        self.total = keep * self.total + (1 - keep) * value
        self.weight = keep * self.weight + (1 - keep)
        return self.total / self.weight


@dataclass
class Curve:
    """A metric of a run.

    Args:
        name: for the legend.
        at: where along the axis each value was logged.
        values: the values.
        held_out: the same metric on held-out data, drawn as points: its columns of places and values.
    """

    name: str
    at: list[float]
    values: list[float]
    held_out: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))


def save(figure: Figure, path: Path) -> None:
    """Write a picture, in the format of the file's ending, as a whole."""
    aside = path.with_name(f".{path.name}.partial")
    figure.savefig(aside, format=path.suffix[1:])
    os.replace(aside, path)


def formats() -> list[str]:
    """Endings of files that a picture can be written to."""
    from matplotlib.figure import Figure

    return sorted(Figure().canvas.get_supported_filetypes())


def _figure(panels: int) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(9, 2 + 3 * panels), dpi=130, layout="constrained")


# -- several runs ----------------------------------------------------------------------------------------------------------


def draw_runs(panels: dict[str, list[Curve]], along: str, whole: bool, smoothing: float) -> Figure:
    """One panel for each metric, one colour for each run.

    Args:
        panels: curves by the name of their metric; every panel has the same runs, in the same order.
        along: what the horizontal axis counts.
        whole: whether it counts in whole numbers.
        smoothing: of the thick lines; at 0 the values themselves are drawn thick.
    """
    figure = _figure(len(panels))
    first = None
    for place, (metric, curves) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(len(panels), 1, place, sharex=first)
        first = first or axes
        for index, curve in enumerate(curves):
            _draw_curve(axes, curve, index, smoothing)
        axes.set_ylabel(metric)
        _draw_frame(axes, along, whole)
        if any(curve.held_out[0] for curve in curves):
            axes.plot([], [], color="#888888", linestyle="", marker="D", markersize=5, label="held out")
        axes.legend(frameon=False)
    return figure


def _draw_curve(axes: Axes, curve: Curve, index: int, smoothing: float) -> None:
    colour, dashes = _COLOURS[index % len(_COLOURS)], _DASHES[index // len(_COLOURS) % len(_DASHES)]
    marker = "o" if len(curve.values) < 10 else ""  # a line of one point is not seen
    if smoothing:
        axes.plot(curve.at, curve.values, color=colour, linewidth=0.7, alpha=0.3)
    values = smoothed(curve.values, smoothing)
    axes.plot(curve.at, values, color=colour, linestyle=dashes, linewidth=1.8, marker=marker, label=curve.name)
    if curve.held_out[0]:
        axes.plot(*curve.held_out, color=colour, linestyle="", marker="D", markersize=5)


def smoothed(values: Sequence[float], keep: float) -> list[float]:
    """The moving average of all values up to each."""
    average = Average()
    return [average.add(value, keep) for value in values]


# -- one run ---------------------------------------------------------------------------------------------------------------


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
    preferences = bool(rewards and rewards[0])
    figure = _figure(2 if preferences else 1)
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


def _draw_frame(axes: Axes, along: str = "optimizer steps", whole: bool = True) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(along)
    if whole:
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
