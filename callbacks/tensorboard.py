"""TensorBoard: the run's metrics as event files, shown by ``tensorboard --logdir runs``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from bumblebee.callback import Callback
from bumblebee.training.metric_formatting import without_prefix

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from bumblebee.trainer import Trainer


class TensorBoard(Callback):
    """Writes metrics for TensorBoard as ``train/...`` and ``validation/...``.

    Args:
        folder: where in output_dir the event files go.

    Raises:
        ValueError: an empty name.
    """

    def __init__(self, folder: str = "tensorboard") -> None:
        if not folder:
            raise ValueError(f"folder must be a name, got {folder!r}")
        self.folder = folder
        self._writer: SummaryWriter | None = None

    def on_fit_start(self, trainer: Trainer) -> None:
        """Open an event file; TensorBoard then forgets what an earlier start logged after the step we go on from."""
        if trainer.is_main:
            from torch.utils.tensorboard import SummaryWriter

            purge_step = trainer.step + 1 if trainer.step else 0
            self._writer = SummaryWriter(str(trainer.output_dir / self.folder), purge_step=purge_step)

    def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """One point a metric."""
        self._add(trainer.step, "train", {name: value for name, value in metrics.items() if name != "step"})

    def on_validation_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """One point a metric."""
        self._add(trainer.step, "validation", without_prefix(metrics))

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """Close the file."""
        self._close()

    def on_fit_end(self, trainer: Trainer) -> None:
        """Close the file."""
        self._close()

    def _add(self, step: int, group: str, metrics: Mapping[str, float]) -> None:
        if self._writer is not None:
            for name, value in metrics.items():
                self._writer.add_scalar(f"{group}/{name}", value, step)
            self._writer.flush()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = None
