"""Callback: base class of everything in a run except forward, backward and optimizer step.

The loop calls eleven hooks, each on every rank:

    on_fit_start(trainer)
      on_step_start(trainer)                        ┐
        forward, backward, optimizer step           │
      on_step_end(trainer)                          │ observe: validation runs here
        on_validation_end(trainer, metrics)         │
        on_evaluation_end(trainer, metrics)         │ of callbacks.Evaluate
      on_log(trainer, metrics)                      │ log: every log_every steps, metrics already reduced over ranks
      on_save(trainer)                              │ save: everything above is final
        on_samples(trainer, samples)                │ of callbacks.Samples
        on_checkpoint_saved(trainer, path)          ┘
    on_fit_end(trainer)                             after the last step, or when the run is stopped
    on_exception(trainer, error)                    the run failed; no collectives here, other ranks may have exited

Before, set-up calls ``check(trainer)``, so that a callback that cannot work ends the run before anything is written.

Because of the phases observe, log and save, the order of callbacks in a recipe does not matter. Callbacks do not call each
other; the only parts of the trainer they write are ``trainer.should_stop`` and ``trainer.log``. Only rank 0
(``trainer.is_main``) may write files. ``trainer.print`` prints on rank 0, and into log.txt.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from bumblebee.rl.sampled_text import SampledText
    from bumblebee.trainer import Trainer


class Callback:
    """Base class: every hook does nothing. ``state_dict`` and ``load_state_dict`` keep state across a resume."""

    validates: ClassVar[bool] = False  # whether the callback calls ``trainer.validate``
    evaluations: Sequence[str] = ()  # names of the metrics that it passes to ``trainer.report_evaluation``

    def check(self, trainer: Trainer) -> None:
        """Called on every rank while the run is set up, when data and plan exist and nothing has been written.

        Raises:
            ValueError: the callback cannot work in this run.
        """

    def on_fit_start(self, trainer: Trainer) -> None:
        """Called before the first step, after the checkpoint of a resumed run is loaded."""

    def on_step_start(self, trainer: Trainer) -> None:
        """Called before the micro-batches of a step; ``trainer.step`` steps are complete."""

    def on_step_end(self, trainer: Trainer) -> None:
        """Called after the optimizer step; ``trainer.step`` includes it."""

    def on_validation_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Called after a validation with metrics reduced over ranks."""

    def on_evaluation_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Called after an evaluation on tasks with metrics named ``eval/<task>``, the same on every rank."""

    def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Called every ``log_every`` steps with the metrics since the last call, reduced over ranks and micro-batches."""

    def on_save(self, trainer: Trainer) -> None:
        """Called when everything else about the step is done: the hook in which to call ``trainer.save_checkpoint``."""

    def on_samples(self, trainer: Trainer, samples: Sequence[SampledText]) -> None:
        """Called with texts that the model has written; rank 0 has all of them."""

    def on_checkpoint_saved(self, trainer: Trainer, path: Path) -> None:
        """Called when the checkpoint at ``path`` is complete."""

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """Called when the run fails; the trainer raises ``error`` again afterwards. Must not run collectives."""

    def on_fit_end(self, trainer: Trainer) -> None:
        """Called after the last step."""

    def summary(self) -> dict[str, object]:
        """Return options to show in the run summary, as JSON values; empty for most callbacks."""
        return {}

    def state_dict(self) -> dict[str, object]:
        """Return the state to save in a checkpoint, as JSON values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state returned by ``state_dict``."""
