"""Plots of a sweep: history, importance, correlation, slices, parallel coordinates, and the curves of all trials."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from bumblebee.plotting.curves import new_figure, save_figure, style_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LABEL = 24  # characters of a value that is text
_BLUE, _ORANGE, _GREY = "#0072b2", "#d55e00", "#bbbbbb"


@dataclass(frozen=True)
class TrialCurve:
    """Steps and values of a trial's metric."""

    steps: Sequence[int]
    values: Sequence[float]


@dataclass(frozen=True)
class SweepData:
    """The trials of a sweep that have a metric. The lists have an entry for each.

    Args:
        metric: its name.
        goal: minimize or maximize.
        parameters: whether each parameter's axis is logarithmic.
        numbers: of the trials.
        values: of the parameters.
        results: the last value of the metric.
        complete: whether the trial was trained to its end.
        curves: the metric during training.
    """

    metric: str
    goal: str
    parameters: Mapping[str, bool]
    numbers: Sequence[int]
    values: Sequence[Mapping[str, object]]
    results: Sequence[float]
    complete: Sequence[bool]
    curves: Sequence[TrialCurve]

    def column(self, key: str) -> tuple[list[float], list[str]]:
        """Positions of a parameter's values on an axis, and the labels of the positions 0, 1, ... if it is not numeric."""
        values = [row.get(key) for row in self.values]
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
            return [float(value) for value in values if isinstance(value, int | float)], []
        labels = sorted({str(value) for value in values})
        return [float(labels.index(str(value))) for value in values], [_shortened(label) for label in labels]

    def varied(self) -> list[str]:
        """Parameters with more than one value."""
        return [key for key in self.parameters if len(set(self.column(key)[0])) > 1]


def plot_sweep(data: SweepData, importance: Mapping[str, float], method: str, folder: Path) -> list[Path]:
    """Draw what there is enough data for.

    Args:
        data: the trials.
        importance: of each parameter; empty if unknown.
        method: of the importance.
        folder: to write the pictures to.

    Returns:
        The pictures.
    """
    figures: dict[str, Figure] = {}
    if data.results:
        figures = {"history": plot_history(data), "curves": plot_curves(data)}
    if len(data.results) > 1 and data.varied():
        figures["slices"] = plot_slices(data)
        figures["parallel_coordinates"] = plot_parallel_coordinates(data)
    if sum(data.complete) > 2 and data.varied():
        figures["correlation"] = plot_correlation(data)
    if importance:
        figures["importance"] = plot_importance(importance, method, data.metric)
    for name, figure in figures.items():
        save_figure(figure, folder / f"{name}.png")
    return [folder / f"{name}.png" for name in figures]


def plot_history(data: SweepData) -> Figure:
    """Each trial's result, and the best so far."""
    figure = new_figure(1)
    axes = figure.add_subplot()
    for state, marker, colour in ((True, "o", _BLUE), (False, "x", _GREY)):
        points = [(n, r) for n, r, done in zip(data.numbers, data.results, data.complete, strict=True) if done == state]
        label = "complete" if state else "pruned or running"
        axes.plot(*zip(*points, strict=True) if points else ([], []), linestyle="", marker=marker, color=colour, label=label)
    complete = [(n, r) for n, r, done in zip(data.numbers, data.results, data.complete, strict=True) if done]
    if complete:
        best = accumulate((result for _, result in complete), min if data.goal == "minimize" else max)
        axes.step([number for number, _ in complete], list(best), where="post", color=_ORANGE, label="best so far")
    axes.set_ylabel(data.metric)
    style_axes(axes, "trial")
    axes.legend(frameon=False)
    return figure


def plot_curves(data: SweepData) -> Figure:
    """The metric of all trials during training; the best trial is thick, pruned ones are dashed."""
    figure = new_figure(1)
    axes = figure.add_subplot()
    complete = [(result, index) for index, (result, done) in enumerate(zip(data.results, data.complete, strict=True)) if done]
    best = (min if data.goal == "minimize" else max)(complete)[1] if complete else -1
    for index, (curve, done) in enumerate(zip(data.curves, data.complete, strict=True)):
        is_best = index == best
        axes.plot(
            curve.steps, curve.values, color=_ORANGE if is_best else _BLUE if done else _GREY,
            linewidth=2.2 if is_best else 1.0, linestyle="-" if done else "--", zorder=3 if is_best else 2,
            marker="o" if len(curve.steps) < 10 else "", markersize=3,
            label=f"trial {data.numbers[index]}, the best" if is_best else None,
        )  # fmt: skip
    axes.set_ylabel(data.metric)
    style_axes(axes)
    if complete:
        axes.legend(frameon=False)
    return figure


def plot_slices(data: SweepData) -> Figure:
    """The result against each parameter; rings are trials that were pruned."""
    keys = data.varied()
    figure = new_figure(len(keys))
    for row, key in enumerate(keys, start=1):
        axes = figure.add_subplot(len(keys), 1, row)
        positions, labels = data.column(key)
        drawn = axes.scatter(positions, data.results, c=list(data.numbers), cmap="viridis", s=28, zorder=3)
        ended_early = [index for index, done in enumerate(data.complete) if not done]
        early = [positions[index] for index in ended_early], [data.results[index] for index in ended_early]
        axes.scatter(*early, color="white", s=8, zorder=4)  # a ring
        axes.set_ylabel(data.metric)
        style_axes(axes, key, integer_x=False)
        _label_axis(axes, labels, data.parameters[key])
        axes.margins(x=0.05)
        figure.colorbar(drawn, ax=axes, label="trial")
    return figure


def plot_importance(importance: Mapping[str, float], method: str, metric: str) -> Figure:
    """Bars, the most important parameter on top."""
    figure = new_figure(1)
    axes = figure.add_subplot()
    ranked = sorted(importance.items(), key=lambda item: item[1])
    bars = axes.barh([key for key, _ in ranked], [value for _, value in ranked], color=_BLUE)
    axes.bar_label(bars, fmt="%.2f", padding=3)
    style_axes(axes, f"importance for {metric} ({method})", integer_x=False)
    axes.margins(x=0.1)
    return figure


def plot_correlation(data: SweepData) -> Figure:
    """Rank correlations (Spearman) between numeric parameters and the metric, over complete trials."""
    columns = {key: data.column(key)[0] for key in data.varied() if not data.column(key)[1]}
    columns[data.metric] = list(data.results)
    columns = {
        key: [value for value, done in zip(column, data.complete, strict=True) if done] for key, column in columns.items()
    }
    matrix = [[rank_correlation(one, other) for other in columns.values()] for one in columns.values()]
    figure = new_figure(1 + len(columns) // 4)
    axes = figure.add_subplot()
    image = axes.imshow(matrix, cmap="RdBu", vmin=-1, vmax=1)
    axes.set_xticks(range(len(columns)), list(columns), rotation=30, ha="right")
    axes.set_yticks(range(len(columns)), list(columns))
    for row, values in enumerate(matrix):
        for column, value in enumerate(values):
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if abs(value) > 0.6 else "black")
    figure.colorbar(image, ax=axes, label="rank correlation (Spearman)")
    return figure


def plot_parallel_coordinates(data: SweepData) -> Figure:
    """One line for each trial through its parameters and its result, which colours it; dashed if it was pruned."""
    keys = [*data.varied(), data.metric]
    figure = new_figure(1)
    axes = figure.add_subplot()
    scaled = [_scaled(data, key) for key in keys]
    palette = "viridis" if data.goal == "minimize" else "viridis_r"  # the best trials are the darkest
    mapped = axes.scatter([0.0] * len(data.results), scaled[0], c=list(data.results), cmap=palette, s=0)
    drawn = mapped.get_array()
    assert drawn is not None
    for index, colour in enumerate(mapped.to_rgba(drawn)):
        style = "-" if data.complete[index] else "--"
        axes.plot(range(len(keys)), [column[index] for column in scaled], style, color=colour, linewidth=1.2, alpha=0.8)
    for position, key in enumerate(keys):
        axes.axvline(position, color=_GREY, linewidth=0.8, zorder=0)
        for height, label in _ticks(data, key):
            axes.annotate(label, (position, height), fontsize=7, xytext=(3, 0), textcoords="offset points", va="center")
    axes.set_xticks(range(len(keys)), keys, rotation=15)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    figure.colorbar(mapped, ax=axes, label=data.metric)
    return figure


def _shortened(label: str) -> str:
    return label if len(label) <= _LABEL else f"{label[: _LABEL - 1]}…"


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's rank correlation: Pearson's of the ranks, equal values sharing their mean rank. 0 if one is constant."""
    first, second = _ranks(one), _ranks(other)
    mean = (len(one) - 1) / 2
    covariance = sum((a - mean) * (b - mean) for a, b in zip(first, second, strict=True))
    spread = math.sqrt(sum((a - mean) ** 2 for a in first) * sum((b - mean) ** 2 for b in second))
    return covariance / spread if spread else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]


def _axis(data: SweepData, key: str) -> tuple[list[float], list[str], bool]:
    if key == data.metric:
        return list(data.results), [], False
    positions, labels = data.column(key)
    return positions, labels, data.parameters[key] and min(positions) > 0


def _scaled(data: SweepData, key: str) -> list[float]:
    """Values of a column between 0 and 1."""
    positions, _, log = _axis(data, key)
    values = [math.log(value) for value in positions] if log else positions
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else 0.5 for value in values]


def _ticks(data: SweepData, key: str) -> list[tuple[float, str]]:
    """Heights and labels of an axis: both ends, or every category."""
    positions, labels, _ = _axis(data, key)
    if labels:
        return [(index / max(len(labels) - 1, 1), label) for index, label in enumerate(labels)]
    return [(0.0, f"{min(positions):.4g}"), (1.0, f"{max(positions):.4g}")]


def _label_axis(axes: Axes, labels: Sequence[str], log: bool) -> None:
    if labels:
        axes.set_xticks(range(len(labels)), labels)
    elif log:
        axes.set_xscale("log")
