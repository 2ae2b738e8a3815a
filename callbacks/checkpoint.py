"""Checkpoint: when to save a run, and how many checkpoints stay on the disk.

How a checkpoint is written is the trainer's business. Rotation looks at the disk, not at a list of its own, so that it also
finds what earlier runs in the same folder have left.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from bumblebee.callback import Callback
from bumblebee.checkpoint.atomic import remove
from bumblebee.run_folder import SavedCheckpoint, checkpoints

if TYPE_CHECKING:
    from bumblebee.trainer import Trainer


class Checkpoint(Callback):
    """Saves the run every few steps and when it ends, and deletes the oldest checkpoints.

    Args:
        every: optimizer steps between two checkpoints; null saves only at the end.
        keep: how many of the newest checkpoints stay, beside the one saved when a run ended; null keeps all.
        save_last: save when the run ends; an interrupted run is saved in any case.

    Raises:
        ValueError: every or keep is less than 1.
    """

    def __init__(self, every: int | None = 500, keep: int | None = 3, save_last: bool = True) -> None:
        for name, value in (("every", every), ("keep", keep)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 or null, got {value}")
        self.every, self.keep, self.save_last = every, keep, save_last
        self._saved_step: int | None = None

    def on_fit_start(self, trainer: Trainer) -> None:
        """Nothing has been saved by this run."""
        self._saved_step = None

    def on_save(self, trainer: Trainer) -> None:
        """Save if it is time, then delete what is too much."""
        ends = trainer.step == trainer.plan.max_steps or trainer.should_stop
        last = ends and (self.save_last or trainer.interrupted)
        due = self.every is not None and trainer.step % self.every == 0
        if (last or due) and trainer.step != self._saved_step:
            trainer.save_checkpoint(last=last)
            if trainer.is_main:
                self._rotate(trainer)

    def on_checkpoint_saved(self, trainer: Trainer, path: Path) -> None:
        """Note the step, whoever saved it."""
        self._saved_step = trainer.step

    def _rotate(self, trainer: Trainer) -> None:
        # Later steps are there when a run was resumed from an older checkpoint: they are not this run's to count.
        found = [checkpoint for checkpoint in checkpoints(trainer.output_dir) if checkpoint.step <= trainer.step]
        for checkpoint in surplus(found, self.keep):
            delete(checkpoint.path)


def surplus(found: list[SavedCheckpoint], keep: int | None) -> list[SavedCheckpoint]:
    """Those of ``found`` (oldest first) that rotation deletes: all but the newest ``keep``.

    The newest one that was saved because a run ended is outside of the count. An older one of that kind, from a run that was
    continued since, counts like any other.
    """
    if keep is None:
        return []
    ends = [checkpoint for checkpoint in found if checkpoint.last]
    return [checkpoint for checkpoint in found if checkpoint not in ends[-1:]][:-keep]


def delete(checkpoint: Path) -> None:
    """Rename, then delete. A kill in between leaves no half checkpoint, and the next run sweeps up what is hidden."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.deleted.partial")
    remove(hidden)
    os.rename(checkpoint, hidden)
    remove(hidden)
