"""MetricsHistory: all logged metrics of a run as JSON Lines, for plots and comparisons.

One object per line, with "step" and "seconds" (of training since step 0, without the time between two starts). A validation
has a line of its own. The file is opened and closed for each line, so that nothing logged is lost if the run is killed.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bumblebee.callback import Callback
from bumblebee.checkpoint.atomic import flush
from bumblebee.training.metrics.jsonl_log import json_line, truncate_after
from bumblebee.utils.text_files import append_text

if TYPE_CHECKING:
    from bumblebee.trainer import Trainer


class MetricsHistory(Callback):
    """Appends metrics to a JSON Lines file.

    Args:
        file: file name in output_dir.

    Raises:
        ValueError: file is empty.
    """

    def __init__(self, file: str = "metrics.jsonl") -> None:
        if not file:
            raise ValueError(f"file must be a name, got {file!r}")
        self.file = file
        self._seconds_before = 0.0  # of earlier starts
        self._began = time.monotonic()
        self._last: list[str] = []  # lines of the last step that has any
        self._last_step = 0
        self._path: Path | None = None  # on rank 0

    def on_fit_start(self, trainer: Trainer) -> None:
        """Drop lines after the step that the run resumes from: they will be logged again. Complete those before it."""
        if trainer.step == 0:
            self._seconds_before, self._last = 0.0, []
        self._began, self._last_step = time.monotonic(), 0
        if trainer.is_main:
            self._path = trainer.output_dir / self.file
            self._path.parent.mkdir(parents=True, exist_ok=True)
            truncate_after(self._path, trainer.step, self._last)

    def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Write a line."""
        self._write(trainer, metrics)

    def on_validation_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Write a line with step and epoch."""
        position = {"step": trainer.step, "epoch": round(trainer.plan.epoch(trainer.step), 6)}
        self._write(trainer, {**position, **metrics})

    def state_dict(self) -> dict[str, Any]:
        """The seconds of training so far, and the last lines. Those are on disk before a checkpoint that follows them is."""
        if self._path is not None and self._path.exists():
            flush(self._path)
        return {"seconds": self._seconds(), "last": self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue counting seconds, and remember the last lines."""
        self._seconds_before, self._last = state["seconds"], list(state.get("last", []))

    def _seconds(self) -> float:
        return round(self._seconds_before + time.monotonic() - self._began, 3)

    def _write(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        if trainer.is_main:
            line = json_line({**metrics, "seconds": self._seconds()})
            self._last = [*(self._last if self._last_step == trainer.step else []), line]
            self._last_step = trainer.step
            append_text(trainer.output_dir / self.file, line)
