"""TrialLog: a metric of a run, read from metrics.jsonl while it is written."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Progress:
    """How far a run is.

    Args:
        step: of the last line.
        epoch: of the last line that has one.
    """

    step: int = 0
    epoch: float = 0.0


class TrialLog:
    """Reads the lines that have been added since the last call. A resumed run replaces the file, which is then read again.

    Args:
        file: metrics.jsonl; it need not exist yet.
        metric: a key of its lines.
    """

    def __init__(self, file: Path, metric: str) -> None:
        self.file, self.metric = file, metric
        self.progress = Progress()
        self.metrics: set[str] = set()  # all names
        self._points: dict[int, float] = {}  # the last value at each step
        self._position = 0
        self._inode = -1

    @property
    def steps(self) -> list[int]:
        """Steps of the values."""
        return list(self._points)

    @property
    def values(self) -> list[float]:
        """Values of the metric, one for each step that has one; NaN if the value was not finite."""
        return list(self._points.values())

    def read(self) -> None:
        """Read the complete lines that are new."""
        try:
            stream = self.file.open("rb")
        except FileNotFoundError:
            return
        with stream:
            status = self.file.stat()
            if status.st_ino != self._inode or status.st_size < self._position:
                self._inode, self._position = status.st_ino, 0
                self._points, self.progress = {}, Progress()
            stream.seek(self._position)
            for line in stream:
                if not line.endswith(b"\n"):
                    break  # still being written
                self._position += len(line)
                self._add(line)

    def _add(self, line: bytes) -> None:
        try:
            entry = json.loads(line)
        except ValueError:  # cut off when the run was killed
            return
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            return
        self.metrics.update(entry)
        step, epoch = entry["step"], entry.get("epoch")
        self.progress = Progress(step, epoch if isinstance(epoch, int | float) else self.progress.epoch)
        if self.metric in entry:
            value = entry[self.metric]
            self._points[step] = float(value) if isinstance(value, int | float) else math.nan
