"""Plot of a size ladder: the loss against the size with the fitted law, and the cost against the size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bumblebee.plotting.curves import new_figure, style_axes
from bumblebee.plotting.curves import save_figure as save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["LadderData", "plot_ladder", "save"]

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")


@dataclass(frozen=True)
class LadderData:
    """What is drawn.

    Args:
        metric: its name.
        formula: of the law.
        sizes: at which the law is drawn.
        laws: losses and half widths of the band at these sizes, by tokens per parameter.
        runs: parameters, tokens and loss of each run.
        seconds: of each run; 0 if unknown.
        predictions: parameters, tokens and loss of each predicted size.
    """

    metric: str
    formula: str
    sizes: Sequence[float]
    laws: Mapping[float, tuple[Sequence[float], Sequence[float]]]
    runs: Sequence[tuple[float, float, float]]
    seconds: Sequence[float]
    predictions: Sequence[tuple[float, float, float]]


def plot_ladder(data: LadderData) -> Figure:
    """Two panels: loss and cost, both against the number of parameters."""
    figure = new_figure(2)
    top = figure.add_subplot(2, 1, 1)
    for colour, (ratio, (losses, widths)) in zip(_COLOURS * len(data.laws), data.laws.items(), strict=False):
        top.plot(data.sizes, losses, color=colour, label=f"{ratio:.3g} tokens per parameter")
        low, high = ([loss + sign * width for loss, width in zip(losses, widths, strict=True)] for sign in (-1, 1))
        top.fill_between(data.sizes, low, high, color=colour, alpha=0.15, linewidth=0)
    top.plot([run[0] for run in data.runs], [run[2] for run in data.runs], "o", color="black", label="trained")
    predicted = [each[0] for each in data.predictions], [each[2] for each in data.predictions]
    top.plot(*predicted, "D", color="white", markeredgecolor="black", label="predicted")
    top.set_xscale("log")
    top.set_ylabel(data.metric)
    style_axes(top, f"parameters N; {data.metric} = {data.formula}", integer_x=False)
    top.legend(frameon=False)
    _plot_cost(figure.add_subplot(2, 1, 2, sharex=top), data)
    return figure


def _plot_cost(bottom: Axes, data: LadderData) -> None:
    bottom.plot([run[0] for run in data.runs], [6 * run[0] * run[1] for run in data.runs], "o", color=_COLOURS[0])
    bottom.plot(
        [each[0] for each in data.predictions], [6 * each[0] * each[1] for each in data.predictions], "D", color="white",
        markeredgecolor=_COLOURS[0],
    )  # fmt: skip
    bottom.set_xscale("log")
    bottom.set_yscale("log")
    bottom.set_ylabel("FLOPs (6 N D)", color=_COLOURS[0])
    style_axes(bottom, "parameters N", integer_x=False)
    if all(data.seconds):
        right = bottom.twinx()
        right.plot([run[0] for run in data.runs], data.seconds, "x", color=_COLOURS[1])
        right.set_yscale("log")
        right.set_ylabel("seconds of training", color=_COLOURS[1])
        right.spines["top"].set_visible(False)
