"""MetricAccumulator: sums over micro-batches and steps between two lines of metrics, kept on the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class MetricAccumulator:
    """Sums of losses and metrics of this rank, the counts to divide them by, and each micro-batch's loss."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor | float] = {}  # numbers from a checkpoint, until something is added to them
        self.counts: dict[str, float] = {}  # over all ranks
        self._losses: list[tuple[int, int, Tensor]] = []  # (step, micro-batch, loss) since the last check

    def add_micro_batch(self, step: int, index: int, loss: Tensor, sums: Mapping[str, Tensor]) -> None:
        """Add the results of micro-batch ``index`` of a step. Does not synchronize with the GPU."""
        self._losses.append((step, index, loss.detach()))
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach()

    def add_counts(self, counts: Mapping[str, float]) -> None:
        """Add the counts of a step, over all ranks."""
        for name, count in counts.items():
            self.counts[name] = self.counts.get(name, 0) + count

    def pop_losses(self) -> list[tuple[int, int, Tensor]]:
        """Return (step, micro-batch, loss) of each micro-batch since the last call."""
        losses, self._losses = self._losses, []
        return losses

    def averages(self, reduced_sums: Mapping[str, float], units: Mapping[str, str]) -> dict[str, float]:
        """Divide sums over all ranks by their counts; ``units`` names the count of a sum that has none of its own."""
        return {name: value / max(self.counts[units.get(name, name)], 1) for name, value in reduced_sums.items()}

    def clear(self) -> None:
        """Start the next line of metrics."""
        self.sums, self.counts = {}, {}
