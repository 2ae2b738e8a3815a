"""Task: a model, and losses that are sums over targets.

The gradient of a step is  sum over terms of  weight * (sum of the term's losses) / (number of its targets),  sums and numbers
taken over all micro-batches and ranks. So a task never averages: it returns sums and says how many targets there are, before
the first backward. Means of means would weigh short samples more (huggingface/transformers#34191).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from bumblebee.datamodule import Batch, DataModule

if TYPE_CHECKING:
    from torch import Tensor, nn


class Task(ABC):
    """A model and its losses.

    Attributes:
        model: the module that is trained; what the trainer hands to ``training_step`` wraps it.
        weights: for each named loss term its weight in the total.
    """

    model: nn.Module
    weights: dict[str, float]

    def setup(self, data: DataModule) -> None:  # noqa: B027  (optional)
        """Look at the prepared data before training.

        Raises:
            ValueError: the data does not fit the model.
        """

    @abstractmethod
    def counts(self, batch: Batch) -> dict[str, int | Tensor]:
        """For each loss term, the number of its targets in a micro-batch that is still on the CPU."""

    @abstractmethod
    def training_step(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        """For each loss term, the scalar sum of its losses over the micro-batch's targets."""

    @abstractmethod
    def validation_step(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        """Named scalar sums over a batch, to be added over batches and ranks."""

    @abstractmethod
    def validation_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """From the added sums to metrics, whose names begin with ``validation_``."""

    def total(self, losses: dict[str, Tensor], counts: dict[str, float]) -> Tensor:
        """The weighted sum of ``loss / count``; a term without targets adds nothing."""
        terms = [self.weights[name] * loss / max(counts[name], 1) for name, loss in losses.items()]
        return sum(terms[1:], start=terms[0])
