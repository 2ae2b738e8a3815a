"""Validation: when the held-out samples are looked at. How is the task's business; what comes out goes to all callbacks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bumblebee.callback import Callback

if TYPE_CHECKING:
    from bumblebee.trainer import Trainer


class Validation(Callback):
    """Measures the model on the data's validation samples while it trains.

    Args:
        every: optimizer steps between two validations; null validates at the end of each epoch.
        at_start: validate before the first step, too.
        at_end: validate after the last step, too.

    Raises:
        ValueError: every is less than 1.
    """

    def __init__(self, every: int | None = None, at_start: bool = False, at_end: bool = True) -> None:
        if every is not None and every < 1:
            raise ValueError(f"every must be at least 1 or null, got {every}")
        self.every, self.at_start, self.at_end = every, at_start, at_end

    def on_fit_start(self, trainer: Trainer) -> None:
        """Refuse data that has nothing to validate on.

        Raises:
            ValueError: what to set.
        """
        if not len(trainer.data.validation or ()):
            raise ValueError(
                "callbacks: Validation has no validation samples: set data.validation_ratio or data.validation_files,"
                " or remove the callback"
            )

    def on_step_start(self, trainer: Trainer) -> None:
        """The model as it was; a resumed run has seen that already."""
        if self.at_start and trainer.step == 0:
            trainer.validate()

    def on_step_end(self, trainer: Trainer) -> None:
        """Validate if it is time: several reasons at one step are one validation."""
        # Not a multiple of steps_per_epoch: a run that was resumed on other ranks has other steps.
        due = trainer.plan.epoch(trainer.step) % 1 == 0 if self.every is None else trainer.step % self.every == 0
        if due or (self.at_end and trainer.step == trainer.plan.max_steps):
            trainer.validate()
