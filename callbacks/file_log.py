"""FileLog: a readable log file with timestamps. Each start of a run appends to it."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from bumblebee.callback import Callback
from bumblebee.training.metrics.formatting import format_metrics, format_progress, format_validation
from bumblebee.utils.text_files import append_text

if TYPE_CHECKING:
    from bumblebee.trainer import Trainer


class FileLog(Callback):
    """Logs to a file: start, metrics, validations, checkpoints, exceptions with their traceback, and end.

    The file also has what the run prints besides its progress (``trainer.print``), such as the run summary, and messages of the
    ``bumblebee`` logger.

    Args:
        file: file name in output_dir.
        every: optimizer steps between two lines of metrics; null uses interval.
        interval: seconds between two lines of metrics if every is null.

    Raises:
        ValueError: file is empty, every is less than 1, or interval is negative.
    """

    def __init__(self, file: str = "log.txt", every: int | None = None, interval: float = 30.0) -> None:
        if not file:
            raise ValueError(f"file must be a name, got {file!r}")
        if every is not None and every < 1:
            raise ValueError(f"every must be at least 1 or null, got {every}")
        if not interval >= 0:
            raise ValueError(f"interval must be at least 0, got {interval}")
        self.file, self.every, self.interval = file, every, interval
        self._next_step, self._next_time = 0, 0.0
        self._handler: _Handler | None = None

    def on_fit_start(self, trainer: Trainer) -> None:
        """Log the start."""
        self._next_step, self._next_time = 0, 0.0
        event = f"resume from step {trainer.step:,}" if trainer.step else "start"
        self._write(trainer, f"{event}: {trainer.plan.max_steps:,} steps on {trainer.plan.world_size} x {trainer.device}")
        if trainer.is_main:
            trainer.console.subscribe(lambda text: self._write_lines(trainer, text))
            self._handler = _Handler(lambda text: self._write_lines(trainer, text))
            logging.getLogger("bumblebee").addHandler(self._handler)

    def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Log the metrics if a line is due, and always after the last step."""
        now, step = time.monotonic(), trainer.step
        due = now >= self._next_time if self.every is None else step >= self._next_step
        if due or step == trainer.plan.max_steps:
            self._next_time, self._next_step = now + self.interval, step + (self.every or 0)
            self._write(trainer, format_metrics(metrics))

    def on_validation_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Log the results."""
        self._write(trainer, format_validation(trainer.step, metrics))

    def on_checkpoint_saved(self, trainer: Trainer, path: Path) -> None:
        """Log the path."""
        self._write(trainer, f"checkpoint: {path}")

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """Log the traceback."""
        self._remove_handler()
        text = "".join(traceback.format_exception(error)).rstrip()
        with suppress(OSError):  # of a full disk, which may be the error itself
            self._write(trainer, f"failed after step {trainer.step:,}\n{text}")

    def on_fit_end(self, trainer: Trainer) -> None:
        """Log how the run ended."""
        self._remove_handler()
        event = "interrupted" if trainer.interrupted else "stopped early" if trainer.should_stop else "finished"
        self._write(trainer, f"{event}: {format_progress(trainer)}")

    def _write(self, trainer: Trainer, text: str) -> None:
        if trainer.is_main:
            path = trainer.output_dir / self.file
            path.parent.mkdir(parents=True, exist_ok=True)
            now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
            append_text(path, f"{now}  {text}\n")

    def _write_lines(self, trainer: Trainer, text: str) -> None:
        for line in text.splitlines():
            self._write(trainer, line)

    def _remove_handler(self) -> None:
        if self._handler is not None:
            logging.getLogger("bumblebee").removeHandler(self._handler)
        self._handler = None


class _Handler(logging.Handler):
    """Passes the messages of a logger on."""

    def __init__(self, write: Callable[[str], None]) -> None:
        super().__init__()
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        self._write(f"{record.levelname.lower()}: {record.getMessage()}")
