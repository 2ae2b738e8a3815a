"""MetricsHistory: every logged number of the run as JSON Lines, for plots and comparisons.

One object a line, with "step" and "seconds" (of training since the run began, pauses between two starts left out). A
validation has a line of its own. The file is opened for each line and closed again: what has been logged is in the file,
however the run ends.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bumblebee.callback import Callback

if TYPE_CHECKING:
    from bumblebee.trainer import Trainer


class MetricsHistory(Callback):
    """Writes each line of metrics to a file.

    Args:
        file: its name in output_dir.

    Raises:
        ValueError: an empty name.
    """

    def __init__(self, file: str = "metrics.jsonl") -> None:
        if not file:
            raise ValueError(f"file must be a name, got {file!r}")
        self.file = file
        self._seconds_before = 0.0  # of the starts before this one
        self._began = time.monotonic()

    def on_fit_start(self, trainer: Trainer) -> None:
        """Remove what comes after the step from which the run goes on: it will be logged again."""
        if trainer.step == 0:
            self._seconds_before = 0.0
        self._began = time.monotonic()
        if trainer.is_main:
            path = trainer.output_dir / self.file
            path.parent.mkdir(parents=True, exist_ok=True)
            cut_back(path, trainer.step)

    def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """One line."""
        self._write(trainer, metrics)

    def on_validation_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """One line, which says where in the run it was."""
        place = {"step": trainer.step, "epoch": round(trainer.plan.epoch(trainer.step), 6)}
        self._write(trainer, {**place, **metrics})

    def state_dict(self) -> dict[str, Any]:
        """The seconds trained so far."""
        return {"seconds": self._seconds()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting from there."""
        self._seconds_before = state["seconds"]

    def _seconds(self) -> float:
        return round(self._seconds_before + time.monotonic() - self._began, 3)

    def _write(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        if trainer.is_main:
            with (trainer.output_dir / self.file).open("a", encoding="utf-8") as stream:
                stream.write(json_line({**metrics, "seconds": self._seconds()}))


def json_line(metrics: dict[str, float]) -> str:
    """Metrics as a line of JSON, which has no word for NaN and infinity: they become null."""
    values = {name: value if isinstance(value, int) else float(value) for name, value in metrics.items()}
    valid = {name: value if math.isfinite(value) else None for name, value in values.items()}
    return json.dumps(valid, allow_nan=False) + "\n"


def cut_back(path: Path, step: int) -> None:
    """Keep the lines up to ``step``, none for a run that begins at step 0. The file is replaced as a whole."""
    if not path.exists():
        return
    aside = path.with_name(f".{path.name}.partial")
    with aside.open("w", encoding="utf-8") as stream:
        stream.writelines(_lines_up_to(path, step) if step else [])
    os.replace(aside, path)


def _lines_up_to(path: Path, step: int) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="replace") as stream:
        for line in stream:
            try:
                entry = json.loads(line)
            except ValueError:  # cut by a kill
                continue
            if entry["step"] <= step:
                yield line.rstrip("\n") + "\n"
