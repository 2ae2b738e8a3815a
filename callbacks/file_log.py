"""FileLog: what happened when, for reading. Each start of a run adds to the same file."""

from __future__ import annotations

import time
import traceback
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from bumblebee.callback import Callback
from bumblebee.training.metric_formatting import progress, sentence, validation_sentence

if TYPE_CHECKING:
    from bumblebee.trainer import Trainer


class FileLog(Callback):
    """Writes a log with times: beginning, metrics, validations, checkpoints, errors with their traceback, end.

    Args:
        file: its name in output_dir.
        every: optimizer steps between two lines of metrics; null goes by the clock.
        interval: seconds between two lines of metrics, where every is null.

    Raises:
        ValueError: an empty name, every less than 1, or a negative interval.
    """

    def __init__(self, file: str = "log.txt", every: int | None = None, interval: float = 30.0) -> None:
        if not file:
            raise ValueError(f"file must be a name, got {file!r}")
        if every is not None and every < 1:
            raise ValueError(f"every must be at least 1 or null, got {every}")
        if not interval >= 0:
            raise ValueError(f"interval must not be negative, got {interval}")
        self.file, self.every, self.interval = file, every, interval
        self._next_step, self._next_time = 0, 0.0

    def on_fit_start(self, trainer: Trainer) -> None:
        """Begin, or go on."""
        self._next_step, self._next_time = 0, 0.0
        how = f"resume from step {trainer.step:,}" if trainer.step else "begin"
        self._write(trainer, f"{how}: {trainer.plan.max_steps:,} steps on {trainer.plan.world_size} x {trainer.device}")

    def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """A line if it is time for one, and for the last step."""
        now, step = time.monotonic(), trainer.step
        due = now >= self._next_time if self.every is None else step >= self._next_step
        if due or step == trainer.plan.max_steps:
            self._next_time, self._next_step = now + self.interval, step + (self.every or 0)
            self._write(trainer, sentence(metrics))

    def on_validation_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """A line."""
        self._write(trainer, validation_sentence(trainer.step, metrics))

    def on_checkpoint_saved(self, trainer: Trainer, path: Path) -> None:
        """A line."""
        self._write(trainer, f"checkpoint: {path}")

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """The error with its traceback."""
        text = "".join(traceback.format_exception(error)).rstrip()
        self._write(trainer, f"failed after step {trainer.step:,}\n{text}")

    def on_fit_end(self, trainer: Trainer) -> None:
        """How the run ended."""
        how = "interrupted" if trainer.interrupted else "stopped" if trainer.should_stop else "end"
        self._write(trainer, f"{how}: {progress(trainer)}")

    def _write(self, trainer: Trainer, text: str) -> None:
        if trainer.is_main:
            path = trainer.output_dir / self.file
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as stream:
                stream.write(f"{datetime.now().astimezone().isoformat(sep=' ', timespec='seconds')}  {text}\n")
