"""Profiler: profile a few training steps with torch.profiler.

Open the trace in https://ui.perfetto.dev or chrome://tracing. Profiled steps are slower than others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bumblebee.callback import Callback
from bumblebee.utils.text_files import write_text

if TYPE_CHECKING:
    from torch.profiler import profile, record_function

    from bumblebee.trainer import Trainer

ROWS = 10  # operations in the table


class Profiler(Callback):
    """Profiles a few steps on rank 0; writes a Chrome trace, and the most expensive operations to profile.txt.

    Args:
        start: steps to skip first, counted from this start of the run, until times are stable.
        steps: number of steps to profile.
        file: file name of the trace in output_dir; a trace that ends in .gz is compressed.

    Raises:
        ValueError: start is negative, steps is less than 1, or file is empty.
    """

    def __init__(self, start: int = 5, steps: int = 3, file: str = "trace.json") -> None:
        if start < 0:
            raise ValueError(f"start must be at least 0, got {start}")
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if not file:
            raise ValueError(f"file must be a name, got {file!r}")
        self.start, self.steps, self.file = start, steps, file
        self._first_step = self._recorded = 0
        self._profile: profile | None = None
        self._step_range: record_function | None = None

    def on_fit_start(self, trainer: Trainer) -> None:
        """Count steps from here, also in a resumed run."""
        self._first_step, self._recorded, self._profile = trainer.step + self.start, 0, None

    def on_step_start(self, trainer: Trainer) -> None:
        """Start the profiler if due, and mark the step in the trace."""
        if trainer.is_main and trainer.step == self._first_step:
            from torch.profiler import ProfilerActivity, profile

            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (trainer.device.type == "cuda")
            self._profile = profile(activities=activities)
            self._profile.start()
        if self._profile is not None:
            from torch.profiler import record_function

            self._step_range = record_function(f"ProfilerStep#{trainer.step + 1}")  # the name that trace viewers expect
            self._step_range.__enter__()

    def on_step_end(self, trainer: Trainer) -> None:
        """End the step's mark; write the profile after the last one."""
        if self._profile is not None and self._step_range is not None:
            self._step_range.__exit__(None, None, None)
            self._recorded += 1
            if self._recorded == self.steps:
                self._write(trainer, self._profile)

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """Stop the profiler without writing anything."""
        if self._profile is not None:
            self._profile.stop()
        self._profile = None

    def on_fit_end(self, trainer: Trainer) -> None:
        """Write what a run that ended early has recorded."""
        if self._profile is not None:
            self._write(trainer, self._profile)
        elif trainer.is_main and not self._recorded:
            trainer.print(f"profiler: nothing recorded, the run ended before step {self._first_step + 1:,}")

    def _write(self, trainer: Trainer, profile: profile) -> None:
        device = trainer.device.type
        if device == "cuda":
            import torch

            torch.cuda.synchronize(trainer.device)  # otherwise the last kernels are missing
        profile.stop()
        path = trainer.output_dir / self.file
        path.parent.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(path))
        events = profile.key_averages()
        table = events.table(sort_by=f"self_{device}_time_total", row_limit=ROWS, max_name_column_width=40)
        write_text(trainer.output_dir / "profile.txt", table + "\n")
        trainer.print(f"{table}\nprofiler: {self._recorded} steps written to {path} and profile.txt")
        self._profile = None
