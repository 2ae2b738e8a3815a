"""Checkpoint: when to save a run, and which checkpoints to keep.

The trainer writes the checkpoints. Rotation lists the folder instead of a list of its own, so that it also covers checkpoints
of earlier runs in the same folder. The best checkpoints are exempt from it: the value of a checkpoint is that of the validation
at the same step, and a validation among the best so far triggers a save. Their ranking is part of the checkpoints themselves;
``output_dir/best.json`` names the best one.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bumblebee.callback import Callback
from bumblebee.checkpoint.atomic import remove
from bumblebee.checkpoint.trainer_state import SavedCheckpoint, checkpoints
from bumblebee.training.metrics.monitor import MetricMonitor
from bumblebee.utils.json_files import write_json

if TYPE_CHECKING:
    from bumblebee.trainer import Trainer

Ranking = list[tuple[int, float]]  # (step, value), best first; the older one first if values are equal


class Checkpoint(Callback):
    """Saves the run every few steps or minutes and at its end, and deletes the oldest checkpoints.

    Args:
        every: optimizer steps between two checkpoints; null does not save by steps.
        keep: number of newest checkpoints to keep, in addition to the best and the one saved when a run ended; null keeps all.
        save_last: save when the run ends; an interrupted run is always saved.
        minutes: also save if this much time has passed since the last checkpoint; null does not save by time.
        best: number of best checkpoints to keep; a validation that is among the best so far triggers a save.
        metric: validation metric that ranks checkpoints, or ``eval/<task>`` of callbacks.Evaluate.
        mode: min if lower values of the metric are better, max if higher values are better.
        model: write the model folder into each checkpoint, not only the training state.

    Raises:
        ValueError: a number is out of range, or mode is unknown.
    """

    def __init__(
        self,
        every: int | None = 500,
        keep: int | None = 3,
        save_last: bool = True,
        minutes: float | None = None,
        best: int = 0,
        metric: str = "validation_loss",
        mode: Literal["min", "max"] = "min",
        model: bool = True,
    ) -> None:
        for name, value in (("every", every), ("keep", keep)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 or null, got {value}")
        if minutes is not None and not minutes > 0:
            raise ValueError(f"minutes must be greater than 0 or null, got {minutes}")
        if best < 0:
            raise ValueError(f"best must be at least 0, got {best}")
        self.every, self.keep, self.save_last, self.minutes = every, keep, save_last, minutes
        self.best, self.model = best, model
        self.monitor = MetricMonitor("Checkpoint", metric, mode)
        self._ranking: Ranking = []
        self._validated: tuple[int, float] | None = None  # step and value of the latest validation
        self._saved_step: int | None = None
        self._saved_time = time.monotonic()

    def check(self, trainer: Trainer) -> None:
        """Check the data.

        Raises:
            ValueError: best is set and nothing reports the metric.
        """
        if self.best:
            self.monitor.require_source(trainer)

    def on_fit_start(self, trainer: Trainer) -> None:
        """Reset the clock. A resumed run keeps the ranking of the checkpoints that still exist; best.json follows it."""
        self._saved_step, self._saved_time, self._validated = None, time.monotonic(), None
        self._ranking = self._existing(trainer) if trainer.step and self._ranking else []
        self._write_best(trainer)  # without best this removes a file that no one updates any more

    def on_validation_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Remember the value of the metric.

        Raises:
            ValueError: the validation does not report the metric.
        """
        if self.best and not self.monitor.is_of_evaluation:
            self._validated = (trainer.step, self.monitor.value(metrics))

    def on_evaluation_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Remember the value of a metric of callbacks.Evaluate.

        Raises:
            ValueError: the evaluation does not report the metric.
        """
        if self.best and self.monitor.is_of_evaluation:
            self._validated = (trainer.step, self.monitor.value(metrics))

    def on_save(self, trainer: Trainer) -> None:
        """Save if due, then rotate."""
        ends = trainer.step == trainer.plan.max_steps or trainer.should_stop
        last = ends and (self.save_last or trainer.interrupted)
        ranking = self._ranking_with(trainer.step)
        due = (self.every is not None and trainer.step % self.every == 0) or ranking != self._ranking
        if last or due or self._time_is_up(trainer):
            self._ranking = ranking  # before saving, so that the checkpoint contains itself
            if trainer.step != self._saved_step:
                trainer.save_checkpoint(last=last, model=self.model)
            self._write_best(trainer)
            if not trainer.skipped.in_a_row:  # the last step that was taken may be that of an old checkpoint
                self._rotate(trainer)

    def on_checkpoint_saved(self, trainer: Trainer, path: Path) -> None:
        """Remember step and time, also of checkpoints that others saved."""
        self._saved_step, self._saved_time = trainer.step, time.monotonic()

    def summary(self) -> dict[str, object]:
        """When to save and how many to keep."""
        return {"every": self.every, "minutes": self.minutes, "keep": self.keep, "best": self.best}

    def state_dict(self) -> dict[str, Any]:
        """The ranking of the best checkpoints."""
        ranking = [list(entry) for entry in self._ranking]
        return {"metric": self.monitor.metric, "mode": self.monitor.mode, "best": ranking}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the ranking, unless it is of another metric or mode."""
        if (state.get("metric"), state.get("mode")) == (self.monitor.metric, self.monitor.mode):
            self._ranking = [(step, value) for step, value in state["best"]][: self.best]

    def _time_is_up(self, trainer: Trainer) -> bool:
        """Whether ``minutes`` have passed by the clock of rank 0. Collective if minutes is set."""
        if self.minutes is None:
            return False
        due = trainer.is_main and time.monotonic() - self._saved_time >= 60 * self.minutes
        return trainer.reduce_sums({"due": due})["due"] > 0

    def _ranking_with(self, step: int) -> Ranking:
        """The ranking if this step is saved; unchanged if the step is not among the best."""
        if self._validated is None or self._validated[0] != step or not math.isfinite(self._validated[1]):
            return self._ranking
        return sorted([*self._ranking, self._validated], key=lambda entry: self.monitor.sort_key(entry[1]))[: self.best]

    def _existing(self, trainer: Trainer) -> Ranking:
        """The entries whose checkpoints still exist on the disk of rank 0. Collective."""
        steps = {checkpoint.step for checkpoint in checkpoints(trainer.output_dir)} if trainer.is_main else set()
        exists = trainer.reduce_sums({str(step): step in steps for step, _ in self._ranking})
        return [(step, value) for step, value in self._ranking if exists[str(step)]]

    def _write_best(self, trainer: Trainer) -> None:
        if not trainer.is_main:
            return
        file = trainer.output_dir / "best.json"
        if self._ranking:
            step, value = self._ranking[0]
            write_json(file, {"checkpoint": f"checkpoint-{step}", "metric": self.monitor.metric, "value": value})
        else:
            file.unlink(missing_ok=True)

    def _rotate(self, trainer: Trainer) -> None:
        if not trainer.is_main:
            return
        # A run that was resumed from an older checkpoint leaves later ones alone.
        existing = [checkpoint for checkpoint in checkpoints(trainer.output_dir) if checkpoint.step <= trainer.step]
        for checkpoint in checkpoints_to_delete(existing, self.keep, {step for step, _ in self._ranking}):
            delete(checkpoint.path)


def checkpoints_to_delete(
    existing: list[SavedCheckpoint], keep: int | None, best: Collection[int] = ()
) -> list[SavedCheckpoint]:
    """Select the checkpoints (oldest first) that rotation deletes: all but the newest ``keep`` and the steps in ``best``.

    The newest checkpoint that was saved at the end of a run is exempt, like the best ones. Older ones of that kind, from runs
    that have been resumed since, count like any other.
    """
    if keep is None:
        return []
    ends = [checkpoint for checkpoint in existing if checkpoint.last]
    return [checkpoint for checkpoint in existing if checkpoint not in ends[-1:] and checkpoint.step not in best][:-keep]


def delete(checkpoint: Path) -> None:
    """Rename, then delete: a kill in between leaves no incomplete checkpoint, and the next run removes hidden ones."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.deleted.partial")
    remove(hidden)
    os.rename(checkpoint, hidden)
    remove(hidden)
