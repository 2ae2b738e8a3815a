"""Task: a model, and losses that are sums over targets.

The gradient of a step is  sum over terms of  weight * (sum of the term's losses) / (number of its targets),  sums and numbers
taken over all micro-batches and ranks. So a task never averages: it returns sums and says how many targets there are, before
the first backward. Means of means would weigh short samples more (huggingface/transformers#34191).

A model may add terms of its own to any task's, which are counted and summed in the same way: ``auxiliary``.

Beside its losses a step may return sums that are logged and not trained, such as rewards; ``units`` says what each of them is
divided by.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from bumblebee.datamodule import Batch, DataModule
from bumblebee.distributed import process_group
from bumblebee.nn import IGNORE_INDEX

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from bumblebee.nn.router_losses import RouterLosses
    from bumblebee.trainer import Trainer


class Task(ABC):
    """A model and its losses.

    Attributes:
        model: the module that is trained; what the trainer hands to ``training_step`` wraps it.
        weights: for each named loss term its weight in the total.
        units: for each sum that is logged and not trained, the name of the count that it is divided by.
    """

    model: nn.Module
    weights: dict[str, float]
    units: Mapping[str, str] = MappingProxyType({})

    def setup(self, data: DataModule) -> None:  # noqa: B027  (optional)
        """Look at the prepared data before training. The model is as the recipe describes it, on no device yet.

        Raises:
            ValueError: the data does not fit the model.
        """

    def begin(self, trainer: Trainer) -> None:  # noqa: B027  (optional)
        """Prepare what needs the run's devices. ``trainer.engine`` is there, and a checkpoint that the run continues from is
        not loaded yet: the weights are those of a new run. Collective.

        Raises:
            ValueError: an option that cannot be used.
        """

    def begin_validation(self, device: torch.device) -> None:  # noqa: B027  (optional)
        """Prepare for ``validation_step`` where there is no trainer.

        Raises:
            ValueError: an option that only a run can meet.
        """

    def models_beside(self) -> list[nn.Module]:
        """After ``setup``, the frozen models that a run holds beside the trained one, to know what memory they take."""
        return []

    def summary(self) -> dict[str, Any]:
        """What to tell the user about the task, in the order it is shown."""
        return {}

    @abstractmethod
    def counts(self, batch: Batch) -> dict[str, int | Tensor]:
        """For each loss term, the number of its targets in a micro-batch that is still on the CPU.

        Further counts may stand beside them, for ``units`` and ``tokens``.
        """

    def tokens(self, counts: dict[str, float]) -> int:
        """How many target tokens there are in counts, for the log; by default each target of the task's own terms is one."""
        return int(sum(counts[name] for name in self.weights))

    @abstractmethod
    def training_step(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        """For each loss term, the scalar sum of its losses over the micro-batch's targets; for each of ``units`` some sum."""

    @abstractmethod
    def validation_step(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        """Named scalar sums over a batch, to be added over batches and ranks."""

    @abstractmethod
    def validation_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """From the added sums to metrics, whose names begin with ``validation_``."""

    def total(self, losses: dict[str, Tensor], counts: dict[str, float]) -> Tensor:
        """The weighted sum of ``loss / count``; a term without targets adds nothing, nor does what is only logged."""
        weights = {**self.weights, **(self.auxiliary.weights if self.auxiliary else {})}
        trained = [name for name in losses if name not in self.units]
        terms = [weights[name] * losses[name] / max(counts[name], 1) for name in trained]
        return sum(terms[1:], start=terms[0])

    # -- with what the model adds, for the trainer -----------------------------------------------------------------------

    @cached_property
    def auxiliary(self) -> RouterLosses | None:
        """What the model adds to the loss, by its own word; None for most models."""
        of_model: Any = getattr(self.model, "auxiliary_losses", None)
        return of_model() if of_model else None

    def all_counts(self, batch: Batch) -> dict[str, int | Tensor]:
        """``counts``, and those of what the model adds."""
        more = self.auxiliary.counts(counted_tokens(batch)) if self.auxiliary else {}
        return {**self.counts(batch), **more}

    def all_losses(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        """``training_step``, and what the model adds."""
        if self.auxiliary is None:
            return self.training_step(model, batch)
        with self.auxiliary.recorded():
            losses = self.training_step(model, batch)
        return {**losses, **self.auxiliary.losses(counted_tokens(batch))}

    def after_step(self) -> None:
        """Called after each optimizer step. Collective."""
        if self.auxiliary is not None:
            self.auxiliary.after_step(process_group.all_reduce_sum)

    def metrics(self) -> dict[str, float]:
        """What is logged beside means of sums, since the last call. Collective."""
        return self.auxiliary.metrics(process_group.all_reduce_sum) if self.auxiliary is not None else {}


def counted_tokens(batch: Batch) -> Tensor:
    """Which positions of a batch are text that is trained on: (B, T) bool.

    Not padding, each place of which is a document of its own without a target; and nothing of a row that has no target, which
    stands for no sample.
    """
    wanted, begins = batch["labels"] != IGNORE_INDEX, batch["position_ids"] == 0
    alone = begins.clone()
    alone[:, :-1] &= begins[:, 1:]
    return ~(alone & ~wanted) & wanted.any(1, keepdim=True)
