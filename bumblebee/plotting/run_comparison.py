"""Compare runs: plot their metrics from metrics.jsonl and print a table."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from bumblebee.plotting.curves import MetricCurve, is_smoothed, picture_formats, plot_runs, save_figure, smooth
from bumblebee.utils.formatting import duration, format_metric, hint, number

FILE = "metrics.jsonl"
VALIDATION_PREFIX = "validation_"
X_LABELS = {"step": "optimizer steps", "tokens": "target tokens", "epoch": "epochs", "seconds": "seconds of training"}


@dataclass(frozen=True)
class LoggedRun:
    """The metrics of a run.

    Args:
        folder: output folder of the run.
        lines: entries of metrics.jsonl, in order; NaN for a value that is not a number.
    """

    folder: Path
    lines: list[dict[str, float]]

    @classmethod
    def read(cls, folder: str | Path) -> LoggedRun:
        """Read an output folder or a metrics file.

        Raises:
            ValueError: there are no metrics.
        """
        path = Path(folder)
        file = path if path.is_file() else path / FILE
        if not file.is_file():
            nearby = [str(other.parent) for other in path.parent.glob(f"*/{FILE}")]
            raise ValueError(f"{folder} is not a run: it has no {FILE}{hint(str(folder), nearby)}")
        lines = list(filter(None, map(_entry, file.read_text(encoding="utf-8", errors="replace").splitlines())))
        if not lines:
            raise ValueError(f"{file} has no metrics yet")
        return cls(file.parent, lines)

    @cached_property
    def metrics(self) -> list[str]:
        """Names of all logged metrics."""
        return list(dict.fromkeys(name for line in self.lines for name in line))

    def column(self, metric: str, along: str) -> tuple[list[float], list[float]]:
        """Positions along an axis and values of a metric, without NaN and infinity."""
        position_of_step = {line["step"]: line[along] for line in self.lines if along in line}  # validations log no tokens
        lines = [line for line in self.lines if _is_finite(line.get(metric))]
        positions = [line[along] if along in line else position_of_step[line["step"]] for line in lines]
        return positions, [line[metric] for line in lines]


def _entry(line: str) -> dict[str, float] | None:
    try:
        value = json.loads(line)
    except ValueError:  # truncated when the run was killed
        return None
    if not isinstance(value, dict) or "step" not in value:
        return None
    return {name: number if isinstance(number, int | float) else math.nan for name, number in value.items()}


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


class RunComparison:
    """Several runs side by side.

    Args:
        folders: output folders of runs.
        metrics: one panel each; training and validation values of a metric share a panel. None: the reward of reinforcement
            learning if every run has it, else the loss.
        along: horizontal axis: step, tokens, epoch or seconds.
        smoothing: weight of the previous average in the exponential moving average, in [0, 1); 0 does not smooth.

    Raises:
        ValueError: a folder is not a run, no run has a metric, or smoothing is out of range.
    """

    def __init__(
        self, folders: Sequence[str], metrics: Sequence[str] | None = None, along: str = "step", smoothing: float = 0.9
    ):
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must be in [0, 1), got {smoothing}")
        self.runs = [LoggedRun.read(folder) for folder in dict.fromkeys(folders)]
        self.along, self.smoothing = along, smoothing
        known = list(dict.fromkeys(name for run in self.runs for name in run.metrics))
        if metrics is None:
            metrics = ["rl/reward" if all("rl/reward" in run.metrics for run in self.runs) else "loss"]
        for metric in metrics:
            if metric not in known:
                raise ValueError(f"metrics: no run has {metric!r}{hint(metric, known)}; available: {', '.join(known)}")
        self.metrics = list(dict.fromkeys(metrics))

    @cached_property
    def names(self) -> list[str]:
        """Names of the runs: the shortest path suffixes that differ."""
        paths = [run.folder.resolve().parts for run in self.runs]
        for length in range(1, max(map(len, paths)) + 1):
            names = ["/".join(parts[-length:]) for parts in paths]
            if len(set(names)) == len(names):
                return names
        return ["/".join(parts) for parts in paths]

    def panels(self) -> dict[str, list[MetricCurve]]:
        """The curves of each metric."""
        return {
            metric: [
                MetricCurve(name, *run.column(metric, self.along), run.column(VALIDATION_PREFIX + metric, self.along))
                for name, run in zip(self.names, self.runs, strict=True)
            ]
            for metric in self.metrics
        }

    def plot(self, output: str | Path) -> None:
        """Write the picture.

        Raises:
            ValueError: the suffix is not a picture format.
            OSError: the file cannot be written.
        """
        path = Path(output)
        check_picture_format(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_figure(plot_runs(self.panels(), X_LABELS[self.along], self.along != "epoch", self.smoothing), path)

    def table(self) -> str:
        """One row per run: steps, tokens and time, the last value and the best validation value of each metric.

        The last value is smoothed as in the picture; its heading says so.
        """
        names = [name for metric in self.metrics for name in (self._heading(metric), f"best {VALIDATION_PREFIX}{metric}")]
        rows = [["run", "steps", "tokens", "time", *names]]
        for name, run in zip(self.names, self.runs, strict=True):
            last = {key: value for line in run.lines for key, value in line.items()}
            row = [name, number(last["step"]), number(last.get("tokens", 0)), duration(last.get("seconds", 0))]
            rows.append(row + [cell for metric in self.metrics for cell in self._last_and_best(run, metric)])
        return _align(rows)

    def _smoothing_of(self, metric: str) -> float:
        return self.smoothing if is_smoothed(metric) else 0.0

    def _heading(self, metric: str) -> str:
        return f"{metric} (smoothed {smoothing:g})" if (smoothing := self._smoothing_of(metric)) else metric

    def _last_and_best(self, run: LoggedRun, metric: str) -> tuple[str, str]:
        _, values = run.column(metric, "step")
        _, validation = run.column(VALIDATION_PREFIX + metric, "step")
        best = max if any(word in metric for word in ("accurac", "margin", "reward")) else min
        last = format_metric(metric, smooth(values, self._smoothing_of(metric))[-1]) if values else "-"
        return last, format_metric(metric, best(validation)) if validation else "-"


def _align(rows: list[list[str]]) -> str:
    """Align the columns; columns without any value are omitted."""
    columns = [column for column in zip(*rows, strict=True) if set(column[1:]) != {"-"}]
    widths = [max(map(len, column)) for column in columns]
    padded = [[cell.ljust(width) for cell in column] for column, width in zip(columns, widths, strict=True)]
    return "\n".join("  ".join(row).rstrip() for row in zip(*padded, strict=True))


def check_picture_format(path: Path) -> None:
    """Raise if the suffix is not a picture format.

    Raises:
        ValueError: names the file.
    """
    if path.suffix[1:] not in picture_formats():
        raise ValueError(f"output: {path} is not a picture file; use .png, .svg or .pdf")
