"""Callback: what happens beside forward, backward and step.

The loop calls nine hooks, each on every rank:

    on_fit_start(trainer)
      on_step_start(trainer)                        ┐
        forward, backward, optimizer step           │
      on_step_end(trainer)                          │ observe: validation runs here
        on_validation_end(trainer, metrics)         │
      on_log(trainer, metrics)                      │ log: every log_every steps, metrics already reduced over ranks
      on_save(trainer)                              │ save: everything above is final
        on_checkpoint_saved(trainer, path)          ┘
    on_fit_end(trainer)                             after the last step, or when the run was asked to stop
    on_exception(trainer, error)                    the run failed; no collectives here, other ranks may be gone

The phases observe, log and save make the order of callbacks in a recipe irrelevant. Callbacks do not call each other; of the
trainer they write only ``trainer.should_stop`` and ``trainer.log``. Only rank 0 may write files or speak: ``trainer.is_main``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bumblebee.trainer import Trainer


class Callback:
    """The base: every hook does nothing. State that must survive a resume goes through the two state methods."""

    def on_fit_start(self, trainer: Trainer) -> None:
        """Before the first step, after a resume."""

    def on_step_start(self, trainer: Trainer) -> None:
        """Before the micro-batches of a step; ``trainer.step`` steps are done."""

    def on_step_end(self, trainer: Trainer) -> None:
        """After the optimizer's step; ``trainer.step`` counts it."""

    def on_validation_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """After a validation; ``metrics`` are reduced over ranks."""

    def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """The metrics of the steps since the last time, reduced over ranks and accumulation."""

    def on_save(self, trainer: Trainer) -> None:
        """The moment to call ``trainer.save_checkpoint``."""

    def on_checkpoint_saved(self, trainer: Trainer, path: Path) -> None:
        """A checkpoint is complete at ``path``."""

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """The run failed with ``error``, which goes on up afterwards."""

    def on_fit_end(self, trainer: Trainer) -> None:
        """After the last step."""

    def state_dict(self) -> dict[str, Any]:
        """What to keep in a checkpoint, as JSON values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
