"""SkippedSteps: optimizer steps whose gradient is NaN or infinite. They change nothing; too many in a row end the run."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)


class SkippedSteps:
    """Counts skipped steps. All ranks skip the same ones.

    Args:
        limit: number of skipped steps in a row that ends the run.

    Attributes:
        total: skipped steps since step 0.
        in_a_row: skipped steps since the last step that was taken, without those in which fp16 lowered its loss scale.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.total = self.in_a_row = 0

    def add_taken(self) -> None:
        """Count a step that updated the weights."""
        self.in_a_row = 0

    def add_skipped(self, step: int, scale_lowered: bool) -> None:
        """Count a skipped step.

        Args:
            step: the step, from 1.
            scale_lowered: fp16 found that its loss scale is too large, which is no fault of the run.

        Raises:
            FloatingPointError: this is the last step in a row that is allowed.
        """
        self.total += 1
        if scale_lowered:
            return
        self.in_a_row += 1
        logger.warning(
            "step %d: the gradient is not finite; skipped (%d in a row, training ends after %d)",
            step,
            self.in_a_row,
            self.limit,
        )
        if self.in_a_row >= self.limit:
            raise FloatingPointError(
                f"step {step}: the gradients of {self.in_a_row} steps in a row are not finite (trainer.max_skipped_steps:"
                f" {self.limit}). The weights are finite and those of the last step that was taken; continue from an earlier"
                " checkpoint with other data or a lower learning rate"
            )

    def state_dict(self) -> dict[str, int]:
        """The counts."""
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Restore the counts; a checkpoint of an earlier version has none."""
        self.total, self.in_a_row = state.get("total", 0), state.get("in_a_row", 0)
