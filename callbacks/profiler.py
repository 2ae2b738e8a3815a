"""Profiler: where the time of a few training steps goes, by torch's own profiler.

The trace is shown by https://ui.perfetto.dev or chrome://tracing. Profiled steps are slower than others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bumblebee.callback import Callback
from bumblebee.training.metric_formatting import say

if TYPE_CHECKING:
    from bumblebee.trainer import Trainer

ROWS = 10  # operations in the table


class Profiler(Callback):
    """Records a few steps on rank 0: a Chrome trace, and the costliest operations in profile.txt.

    Args:
        start: steps of this start to let pass first, until times have settled.
        steps: how many steps to record.
        file: name of the trace in output_dir; one that ends in .gz is compressed.

    Raises:
        ValueError: start is negative, steps is less than 1, or an empty name.
    """

    def __init__(self, start: int = 5, steps: int = 3, file: str = "trace.json") -> None:
        if start < 0:
            raise ValueError(f"start must not be negative, got {start}")
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if not file:
            raise ValueError(f"file must be a name, got {file!r}")
        self.start, self.steps, self.file = start, steps, file
        self._first = self._recorded = 0
        self._profile: Any = None
        self._mark: Any = None  # of the step that is recorded

    def on_fit_start(self, trainer: Trainer) -> None:
        """Steps are counted from here, also in a run that is continued."""
        self._first, self._recorded, self._profile = trainer.step + self.start, 0, None

    def on_step_start(self, trainer: Trainer) -> None:
        """Begin to record if it is time."""
        if trainer.is_main and trainer.step == self._first:
            from torch.profiler import ProfilerActivity, profile

            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (trainer.device.type == "cuda")
            self._profile = profile(activities=activities)
            self._profile.start()
        if self._profile is not None:
            from torch.profiler import record_function

            self._mark = record_function(f"ProfilerStep#{trainer.step + 1}")  # the name that other tools know
            self._mark.__enter__()

    def on_step_end(self, trainer: Trainer) -> None:
        """Close the step's mark; after the last one, write."""
        if self._profile is not None:
            self._mark.__exit__(None, None, None)
            self._recorded += 1
            if self._recorded == self.steps:
                self._write(trainer)

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """Stop recording, which would go on otherwise; nothing is written."""
        if self._profile is not None:
            self._profile.stop()
        self._profile = None

    def on_fit_end(self, trainer: Trainer) -> None:
        """A run that ends earlier writes what it has."""
        if self._profile is not None:
            self._write(trainer)
        elif trainer.is_main and not self._recorded:
            say(f"nothing was profiled: the run ended before step {self._first + 1:,}")

    def _write(self, trainer: Trainer) -> None:
        device = trainer.device.type
        if device == "cuda":
            import torch

            torch.cuda.synchronize(trainer.device)  # or the last kernels are missing
        self._profile.stop()
        path = trainer.output_dir / self.file
        path.parent.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(path))
        events = self._profile.key_averages()
        table = events.table(sort_by=f"self_{device}_time_total", row_limit=ROWS, max_name_column_width=40)
        (trainer.output_dir / "profile.txt").write_text(table + "\n", encoding="utf-8")
        say(f"{table}\n{self._recorded} steps profiled: {path} and profile.txt")
        self._profile = None
