"""Checkpoint: when to save a run, and how many checkpoints stay on the disk.

How a checkpoint is written is the trainer's business. Rotation looks at the disk, not at a list of its own, so that it also
finds what earlier runs in the same folder have left. The best ones are outside of it: a checkpoint has the value of the
validation at its own step, and a validation that is among the best so far is a reason to save. Which these are is kept in the
checkpoints themselves, and the best one's name in ``output_dir/best.json``.
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
from bumblebee.json_files import write_json
from bumblebee.training.metric_monitor import check_held_out, check_mode, measured
from bumblebee.training.run_folder import SavedCheckpoint, checkpoints

if TYPE_CHECKING:
    from bumblebee.trainer import Trainer

Ranking = list[tuple[int, float]]  # (step, value), the best first; of equal values the older


class Checkpoint(Callback):
    """Saves the run every few steps or minutes and when it ends, and deletes the oldest checkpoints.

    Args:
        every: optimizer steps between two checkpoints; null does not go by steps.
        keep: how many of the newest checkpoints stay, beside the best and the one saved when a run ended; null keeps all.
        save_last: save when the run ends; an interrupted run is saved in any case.
        minutes: save also when this long has passed since the last checkpoint; null does not go by the clock.
        best: how many of the best checkpoints stay; a validation that is among the best so far is then saved.
        metric: what makes a checkpoint good, under the name that validations give it.
        mode: min where smaller values of the metric are better, max where larger ones are.
        model: write the model folder into each checkpoint, not only the training state.

    Raises:
        ValueError: a number out of its range, or an unknown mode.
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
            raise ValueError(f"minutes must be more than 0 or null, got {minutes}")
        if best < 0:
            raise ValueError(f"best must not be negative, got {best}")
        self.every, self.keep, self.save_last, self.minutes = every, keep, save_last, minutes
        self.best, self.metric, self.mode, self.model = best, metric, check_mode(mode), model
        self._ranking: Ranking = []
        self._validated: tuple[int, float] | None = None  # step and value of the newest validation
        self._saved_step: int | None = None
        self._saved_time = time.monotonic()

    def on_fit_start(self, trainer: Trainer) -> None:
        """Nothing has been saved by this run; the best ones of the run that it continues are still there, or forgotten.

        Raises:
            ValueError: the best are to be kept, and nothing is held out.
        """
        self._saved_step, self._saved_time, self._validated = None, time.monotonic(), None
        if self.best:
            check_held_out(trainer, "Checkpoint.best")
            self._ranking = self._still_there(trainer) if trainer.step and self._ranking else []
            self._write_best(trainer)

    def on_validation_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Note the value.

        Raises:
            ValueError: the metric is not measured.
        """
        if self.best:
            self._validated = (trainer.step, measured(metrics, self.metric, "Checkpoint"))

    def on_save(self, trainer: Trainer) -> None:
        """Save if it is time, then delete what is too much."""
        ends = trainer.step == trainer.plan.max_steps or trainer.should_stop
        last = ends and (self.save_last or trainer.interrupted)
        ranking = self._with(trainer.step)
        due = (self.every is not None and trainer.step % self.every == 0) or ranking != self._ranking
        if last or due or self._late(trainer):
            self._ranking = ranking  # before saving: the checkpoint then knows of itself
            if trainer.step != self._saved_step:
                trainer.save_checkpoint(last=last, model=self.model)
            self._write_best(trainer)
            self._rotate(trainer)

    def on_checkpoint_saved(self, trainer: Trainer, path: Path) -> None:
        """Note step and time, whoever saved it."""
        self._saved_step, self._saved_time = trainer.step, time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """The best checkpoints."""
        return {"metric": self.metric, "mode": self.mode, "best": [list(entry) for entry in self._ranking]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with these, unless it was another metric that was looked at."""
        if (state.get("metric"), state.get("mode")) == (self.metric, self.mode):
            self._ranking = [(step, value) for step, value in state["best"]][: self.best]

    def _late(self, trainer: Trainer) -> bool:
        """Whether the minutes have passed on rank 0, whose clock counts for all. Collective where minutes are asked for."""
        if self.minutes is None:
            return False
        late = trainer.is_main and time.monotonic() - self._saved_time >= 60 * self.minutes
        return trainer.reduce_sums({"late": late})["late"] > 0

    def _with(self, step: int) -> Ranking:
        """The best checkpoints if this step were saved; the same as before if it is none of them."""
        if self._validated is None or self._validated[0] != step or not math.isfinite(self._validated[1]):
            return self._ranking
        sign = 1 if self.mode == "min" else -1
        return sorted([*self._ranking, self._validated], key=lambda entry: sign * entry[1])[: self.best]

    def _still_there(self, trainer: Trainer) -> Ranking:
        """Those that nobody has deleted since, as rank 0 sees its disk. Collective."""
        there = {checkpoint.step for checkpoint in checkpoints(trainer.output_dir)} if trainer.is_main else set()
        found = trainer.reduce_sums({str(step): step in there for step, _ in self._ranking})
        return [(step, value) for step, value in self._ranking if found[str(step)]]

    def _write_best(self, trainer: Trainer) -> None:
        if not (self.best and trainer.is_main):
            return
        file = trainer.output_dir / "best.json"
        if self._ranking:
            step, value = self._ranking[0]
            write_json(file, {"checkpoint": f"checkpoint-{step}", "metric": self.metric, "value": value})
        else:
            file.unlink(missing_ok=True)

    def _rotate(self, trainer: Trainer) -> None:
        if not trainer.is_main:
            return
        # Later steps are there when a run was resumed from an older checkpoint: they are not this run's to count.
        found = [checkpoint for checkpoint in checkpoints(trainer.output_dir) if checkpoint.step <= trainer.step]
        for checkpoint in surplus(found, self.keep, {step for step, _ in self._ranking}):
            delete(checkpoint.path)


def surplus(found: list[SavedCheckpoint], keep: int | None, best: Collection[int] = ()) -> list[SavedCheckpoint]:
    """Those of ``found`` (oldest first) that rotation deletes: all but the newest ``keep`` and the steps in ``best``.

    The newest one that was saved because a run ended is outside of the count, as the best are. An older one of that kind, from
    a run that was continued since, counts like any other.
    """
    if keep is None:
        return []
    ends = [checkpoint for checkpoint in found if checkpoint.last]
    return [checkpoint for checkpoint in found if checkpoint not in ends[-1:] and checkpoint.step not in best][:-keep]


def delete(checkpoint: Path) -> None:
    """Rename, then delete. A kill in between leaves no half checkpoint, and the next run sweeps up what is hidden."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.deleted.partial")
    remove(hidden)
    os.rename(checkpoint, hidden)
    remove(hidden)
