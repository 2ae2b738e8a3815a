"""Validation: when to validate. The task computes the metrics; all callbacks receive them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bumblebee.callback import Callback

if TYPE_CHECKING:
    from bumblebee.trainer import Trainer


class Validation(Callback):
    """Evaluates the model on the validation samples during training.

    Args:
        every: optimizer steps between two validations; null validates at the end of each epoch.
        at_start: also validate before the first step.
        at_end: also validate after the last step.

    Raises:
        ValueError: every is less than 1.
    """

    validates = True

    def __init__(self, every: int | None = None, at_start: bool = False, at_end: bool = True) -> None:
        if every is not None and every < 1:
            raise ValueError(f"every must be at least 1 or null, got {every}")
        self.every, self.at_start, self.at_end = every, at_start, at_end

    def summary(self) -> dict[str, object]:
        """When to validate."""
        return {"every": "epoch" if self.every is None else self.every}

    def check(self, trainer: Trainer) -> None:
        """Check the data.

        Raises:
            ValueError: the data has no validation samples.
        """
        if not len(trainer.data.validation or ()):
            raise ValueError(
                "callbacks: Validation needs validation samples: set data.validation_ratio or data.validation_files,"
                " or remove the callback"
            )

    def on_step_start(self, trainer: Trainer) -> None:
        """Validate the initial model. A resumed run has done so before."""
        if self.at_start and trainer.step == 0:
            trainer.validate()

    def on_step_end(self, trainer: Trainer) -> None:
        """Validate if due; several reasons at one step give one validation."""
        # Not a multiple of steps_per_epoch: a run that is resumed on other ranks has other steps.
        due = trainer.plan.epoch(trainer.step) % 1 == 0 if self.every is None else trainer.step % self.every == 0
        if due or (self.at_end and trainer.step == trainer.plan.max_steps):
            trainer.validate()
