"""RunSummary: describe the run before the first step, and its outcome at the end."""

from __future__ import annotations

import json
import shutil
import sys
from typing import TYPE_CHECKING

from bumblebee.callback import Callback
from bumblebee.training.metrics.formatting import format_progress
from bumblebee.training.run_summary import format_summary, summarize
from bumblebee.utils.json_files import write_json

if TYPE_CHECKING:
    from bumblebee.trainer import Trainer


class RunSummary(Callback):
    """Prints what the run consists of and writes it to summary.json; prints the outcome at the end."""

    def on_fit_start(self, trainer: Trainer) -> None:
        """Print and write the summary."""
        if trainer.is_main:
            # The options of DataModules and schedules need not be JSON values.
            summary = json.loads(json.dumps(summarize(trainer), default=str))
            write_json(trainer.output_dir / "summary.json", summary)
            trainer.print(format_summary(summary, _terminal_width()))

    def on_fit_end(self, trainer: Trainer) -> None:
        """Print the outcome and, for an interrupted run, how to resume it."""
        trainer.print(format_outcome(trainer))


def format_outcome(trainer: Trainer) -> str:
    """The outcome of the run on one line."""
    if trainer.interrupted:
        return f"interrupted at {format_progress(trainer)}; resume with --trainer.resume auto"
    from bumblebee.lora import has_adapters  # late: it imports torch

    event = "stopped early" if trainer.should_stop else "finished"
    saved = "adapter" if has_adapters(trainer.task.model) else "model"
    return f"{event} at {format_progress(trainer)}; {saved} saved in {trainer.output_dir}"


def _terminal_width() -> int | None:
    """Columns to wrap the summary to; None where stdout is not a terminal."""
    return max(60, shutil.get_terminal_size().columns) if sys.stdout.isatty() else None
