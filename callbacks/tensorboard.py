"""TensorBoard: metrics as event files, displayed by ``tensorboard --logdir runs``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from bumblebee.callback import Callback
from bumblebee.training.metrics.formatting import strip_validation_prefix

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from bumblebee.rl.sampled_text import SampledText
    from bumblebee.trainer import Trainer


class TensorBoard(Callback):
    """Writes metrics for TensorBoard as ``train/...`` and ``validation/...``, and texts of Samples as ``samples/...``.

    Args:
        folder: folder of the event files in output_dir.

    Raises:
        ValueError: folder is empty.
    """

    def __init__(self, folder: str = "tensorboard") -> None:
        if not folder:
            raise ValueError(f"folder must be a name, got {folder!r}")
        self.folder = folder
        self._writer: SummaryWriter | None = None

    def on_fit_start(self, trainer: Trainer) -> None:
        """Open an event file. TensorBoard discards what an earlier start logged after the step that is resumed from."""
        if trainer.is_main:
            from torch.utils.tensorboard import SummaryWriter

            purge_step = trainer.step + 1 if trainer.step else 0
            self._writer = SummaryWriter(str(trainer.output_dir / self.folder), purge_step=purge_step)

    def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Add training metrics."""
        self._add(trainer.step, "train", {name: value for name, value in metrics.items() if name != "step"})

    def on_validation_end(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Add validation metrics."""
        self._add(trainer.step, "validation", strip_validation_prefix(metrics))

    def on_samples(self, trainer: Trainer, samples: Sequence[SampledText]) -> None:
        """Add texts: ``samples/best`` and ``samples/worst``, or ``samples/1`` and so on."""
        if self._writer is not None:
            for number, sample in enumerate(samples, start=1):
                name = str(number) if sample.reward is None else sample.title
                lines = [
                    *([sample.score, ""] if sample.score else []),
                    *_block(sample.prompt),
                    "",
                    "&rarr;",
                    "",
                    *_block(sample.text),
                ]
                self._writer.add_text(f"samples/{name}", "\n".join(lines), trainer.step)
            self._writer.flush()

    def on_exception(self, trainer: Trainer, error: BaseException) -> None:
        """Close the event file."""
        self._close()

    def on_fit_end(self, trainer: Trainer) -> None:
        """Close the event file."""
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


def _block(text: str) -> list[str]:
    """Lines of a Markdown code block: nothing in it is interpreted."""
    return [f"    {line}" for line in text.splitlines() or [""]]
