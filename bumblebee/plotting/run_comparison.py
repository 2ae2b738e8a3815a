"""Comparison of runs: their metrics from metrics.jsonl as one picture and one table."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from bumblebee.formatting import duration, hint, number
from bumblebee.plotting.curves import Curve, draw_runs, formats, save, smoothed

FILE = "metrics.jsonl"
HELD_OUT = "validation_"
ALONG = {"step": "optimizer steps", "tokens": "target tokens", "epoch": "epochs", "seconds": "seconds of training"}


@dataclass(frozen=True)
class Run:
    """What a run has logged.

    Args:
        folder: its output folder.
        lines: objects of metrics.jsonl, in their order.
    """

    folder: Path
    lines: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: str | Path) -> Run:
        """Read a run's folder, or its metrics file.

        Raises:
            ValueError: no metrics there, or none yet.
        """
        path = Path(folder)
        file = path if path.is_file() else path / FILE
        if not file.is_file():
            beside = [str(other.parent) for other in path.parent.glob(f"*/{FILE}")]
            raise ValueError(f"{folder} is no run: it has no {FILE}{hint(str(folder), beside)}")
        lines = list(filter(None, map(_object, file.read_text(encoding="utf-8", errors="replace").splitlines())))
        if not lines:
            raise ValueError(f"{file} has no metrics yet")
        return cls(file.parent, lines)

    @cached_property
    def metrics(self) -> list[str]:
        """Names of everything that was logged."""
        return list(dict.fromkeys(name for line in self.lines for name in line))

    def column(self, metric: str, along: str) -> tuple[list[float], list[float]]:
        """Places and finite values of a metric."""
        of_steps = {line["step"]: line[along] for line in self.lines if along in line}  # a validation does not count tokens
        found = [line for line in self.lines if _finite(line.get(metric))]
        places = [line[along] if along in line else of_steps[line["step"]] for line in found]
        return places, [line[metric] for line in found]


def _object(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:  # cut by a kill
        return None
    return value if isinstance(value, dict) and "step" in value else None


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


class Comparison:
    """Runs beside each other.

    Args:
        folders: output folders of runs.
        metrics: one panel each; beside a metric of training stands the same of validation.
        along: what the horizontal axis counts: step, tokens, epoch or seconds.
        smoothing: how much of the smoothed value each logged step keeps; 0 does not smooth.

    Raises:
        ValueError: a folder that is no run, a metric that no run has, or a number out of its range.
    """

    def __init__(self, folders: Sequence[str], metrics: Sequence[str] = ("loss",), along: str = "step", smoothing: float = 0.9):
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must be in [0, 1), got {smoothing}")
        self.runs = [Run.read(folder) for folder in dict.fromkeys(folders)]
        self.along, self.smoothing = along, smoothing
        known = list(dict.fromkeys(name for run in self.runs for name in run.metrics))
        for metric in metrics:
            if metric not in known:
                raise ValueError(f"metrics: no run has {metric!r}{hint(metric, known)}; there are {', '.join(known)}")
        self.metrics = list(dict.fromkeys(metrics))

    @cached_property
    def names(self) -> list[str]:
        """What the runs are called: as short as tells them apart."""
        paths = [run.folder.resolve().parts for run in self.runs]
        for length in range(1, max(map(len, paths)) + 1):
            names = ["/".join(parts[-length:]) for parts in paths]
            if len(set(names)) == len(names):
                return names
        return ["/".join(parts) for parts in paths]

    def panels(self) -> dict[str, list[Curve]]:
        """The curves of each metric."""
        return {
            metric: [
                Curve(name, *run.column(metric, self.along), run.column(HELD_OUT + metric, self.along))
                for name, run in zip(self.names, self.runs, strict=True)
            ]
            for metric in self.metrics
        }

    def draw(self, output: str | Path) -> None:
        """Write the picture.

        Raises:
            ValueError: an ending that is no format of pictures.
            OSError: the file cannot be written.
        """
        path = Path(output)
        check_picture(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        save(draw_runs(self.panels(), ALONG[self.along], self.along != "epoch", self.smoothing), path)

    def table(self) -> str:
        """A line for each run: how far it came, its last values, smoothed, and its best ones on held-out data."""
        names = [name for metric in self.metrics for name in (metric, f"best {HELD_OUT}{metric}")]
        rows = [["run", "steps", "tokens", "time", *names]]
        for name, run in zip(self.names, self.runs, strict=True):
            last = {key: value for line in run.lines for key, value in line.items()}
            row = [name, number(last["step"]), number(last.get("tokens", 0)), duration(last.get("seconds", 0))]
            rows.append(row + [cell for metric in self.metrics for cell in self._reached(run, metric)])
        return _aligned(rows)

    def _reached(self, run: Run, metric: str) -> tuple[str, str]:
        _, values = run.column(metric, "step")
        _, held_out = run.column(HELD_OUT + metric, "step")
        best = max if "accurac" in metric or "margin" in metric else min
        return (number(smoothed(values, self.smoothing)[-1]) if values else "-", number(best(held_out)) if held_out else "-")


def _aligned(rows: list[list[str]]) -> str:
    """Rows as lines; a column without any value is left out."""
    columns = [column for column in zip(*rows, strict=True) if set(column[1:]) != {"-"}]
    widths = [max(map(len, column)) for column in columns]
    padded = [[cell.ljust(width) for cell in column] for column, width in zip(columns, widths, strict=True)]
    return "\n".join("  ".join(row).rstrip() for row in zip(*padded, strict=True))


def check_picture(path: Path) -> None:
    """Refuse a file that is no picture.

    Raises:
        ValueError: its ending is that of no format.
    """
    if path.suffix[1:] not in formats():
        raise ValueError(f"output: {path} must end in a format of pictures, such as .png, .svg or .pdf")
