"""RunSummary: describe the run before the first step, and its outcome at the end."""

from __future__ import annotations

import json
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
            print(format_summary(summary), flush=True)

    def on_fit_end(self, trainer: Trainer) -> None:
        """Print the outcome and, for an interrupted run, how to resume it."""
        if trainer.is_main:
            print(format_outcome(trainer), flush=True)


def format_outcome(trainer: Trainer) -> str:
    """The outcome of the run on one line."""
    if trainer.interrupted:
        return f"interrupted at {format_progress(trainer)}; resume with --trainer.resume auto"
    event = "stopped early" if trainer.should_stop else "finished"
    return f"{event} at {format_progress(trainer)}; model saved in {trainer.output_dir}"
