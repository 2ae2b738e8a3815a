"""Task: a model and its losses, which are sums over targets.

The loss of a step is  sum over terms of  weight * (sum of the term's losses) / (number of its targets),  where sums and numbers
are over all micro-batches and ranks. So a task never averages: it returns sums, and counts the targets before the first
backward. Means of means would weigh short samples more (huggingface/transformers#34191).

A model may add auxiliary loss terms of its own to any task, which are counted and summed in the same way: ``auxiliary``.

Besides its losses, a step may return sums that are logged and not trained, such as rewards; ``units`` names the count that
each of them is divided by. A sum whose name begins with an underscore is not logged itself: ``derived_metrics`` gets its mean.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from bumblebee.datamodule import Batch, DataModule
from bumblebee.distributed import process_group
from bumblebee.nn import IGNORE_INDEX
from bumblebee.plotting.panels import Panel, ShownMetric

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from bumblebee.nn.router_losses import RouterLosses
    from bumblebee.rl.sampled_text import SampledText
    from bumblebee.tasks.run_context import RunContext
    from bumblebee.tasks.weight_gathering import GatherWeights

ForwardFn = Callable[..., "Tensor"]  # a model, or an engine that wraps it


class Task(ABC):
    """A model and its losses.

    Attributes:
        model: the trained module; ``training_step`` receives an engine that wraps it.
        weights: weight of each loss term in the total, by name.
        units: name of the count that a sum is divided by, for each sum that is logged and not trained.
        transforms: what has been applied to the model, for the run summary.
        panels: of loss.png, from top to bottom.
        headline: metrics that the progress on the console shows, the most important first.
        heads: LM heads whose logits are in memory at the same time, to estimate memory.
        steps_per_rollout: optimizer steps whose micro-batches ``prepare_windows`` prepares together.
        rollout_epochs: times that prepared micro-batches are trained on.
        gather_weights: how a task that samples completions gathers the weights at ZeRO stage 3.
    """

    model: nn.Module
    weights: dict[str, float]
    units: Mapping[str, str] = MappingProxyType({})
    transforms: Sequence[Callable[[nn.Module], object]] = ()
    steps_per_rollout: int = 1
    rollout_epochs: int = 1
    panels: Sequence[Panel] = (Panel(ShownMetric("loss", "loss", axis="loss (nats per token)")),)
    headline: Sequence[ShownMetric] = (ShownMetric("loss", "loss"),)
    heads: int = 1
    gather_weights: GatherWeights = "auto"

    def setup(self, data: DataModule) -> None:  # noqa: B027  (optional)
        """Check the prepared data before training. The model has not been moved to a device yet.

        Raises:
            ValueError: the data does not fit the model.
        """

    def begin(self, run: RunContext, /) -> None:  # noqa: B027  (optional)
        """Prepare what needs the run's devices or its engine. Collective.

        No checkpoint has been loaded yet: also in a resumed run, the weights are those of a new run.

        Raises:
            ValueError: an option that cannot be used.
        """

    def begin_validation(self, device: torch.device) -> None:  # noqa: B027  (optional)
        """Prepare for ``validation_step`` outside of a training run.

        Raises:
            ValueError: an option that only works in a training run.
        """

    def prepare_windows(self, windows: list[list[Batch]], step: int, /) -> list[list[Batch]]:
        """Turn this rank's micro-batches of one or several steps, on the CPU, into those that are trained on. Collective.

        Reinforcement learning samples completions of prompts here, with the weights before the first of the steps.

        Args:
            windows: the micro-batches of the DataModule for each of ``steps_per_rollout`` steps, or of fewer at the end of an
                epoch. The steps are then taken ``rollout_epochs`` times over.
            step: optimizer steps done.
        """
        return windows

    def without_targets(self, batch: Batch, /) -> Batch:
        """A prepared micro-batch like another one, but without targets."""
        raise NotImplementedError  # only needed by tasks that train on a prepared micro-batch in a later step

    def prepared_options(self) -> Mapping[str, object]:
        """Options that prepared micro-batches depend on: a run cannot be resumed between their steps with other ones."""
        return {}

    def largest_batch(self, batch: Batch, /) -> Batch:
        """A micro-batch as large as any that ``prepare_windows`` makes of this one, to estimate memory and time."""
        return batch

    def completions_of(self, batch: Batch, /) -> tuple[int, int] | None:
        """(completions, positions) that ``prepare_windows`` samples for a micro-batch, to estimate memory; else None.

        Args:
            batch: from ``largest_batch``.
        """
        return None

    def notes_on(self, samples: Sequence[object], /) -> list[list[str]]:
        """After ``setup``, lines that a preview shows below each of some training samples."""
        return [[] for _ in samples]

    def frozen_models(self) -> list[nn.Module]:
        """After ``setup``, the frozen models that a run keeps in memory besides the trained one."""
        return []

    def fixed_folders(self) -> dict[str, Path]:
        """After ``setup``, the model folders besides that of the trained model whose weights the loss depends on, by role."""
        return {}

    def summary(self) -> dict[str, object]:
        """What the run summary shows about the task, in order."""
        return {}

    @abstractmethod
    def counts(self, batch: Batch) -> dict[str, int | Tensor]:
        """Number of targets of each loss term in a micro-batch on the CPU, by name.

        May contain further counts, for ``units`` and ``tokens``.
        """

    def tokens(self, counts: dict[str, float]) -> int:
        """Number of target tokens in counts, for the log; by default each target of the task's own terms is a token."""
        return int(sum(counts[name] for name in self.weights))

    @abstractmethod
    def training_step(self, model: ForwardFn, batch: Batch) -> dict[str, Tensor]:
        """Scalar sums over a micro-batch: of each loss term's losses over its targets, and one for each name in ``units``."""

    @abstractmethod
    def validation_step(self, model: ForwardFn, batch: Batch) -> dict[str, Tensor]:
        """Named scalar sums over a batch, which are then added over batches and ranks."""

    @abstractmethod
    def validation_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Turn the added sums into metrics, whose names start with ``validation_``."""

    def total(self, losses: dict[str, Tensor], counts: dict[str, float]) -> Tensor:
        """Weighted sum of ``loss / count`` over loss terms; a term without targets adds nothing."""
        weights = {**self.weights, **(self.auxiliary.weights if self.auxiliary else {})}
        trained = [name for name in losses if name not in self.units]
        terms = [weights[name] * losses[name] / max(counts[name], 1) for name in trained]
        return sum(terms[1:], start=terms[0])

    # -- including the model's auxiliary losses, for the trainer -----------------------------------------------------------

    @cached_property
    def auxiliary(self) -> RouterLosses | None:
        """The model's auxiliary losses, from its method ``auxiliary_losses``; None for most models."""
        auxiliary_losses: Callable[[], RouterLosses | None] | None = getattr(self.model, "auxiliary_losses", None)
        return auxiliary_losses() if auxiliary_losses else None

    def all_counts(self, batch: Batch) -> dict[str, int | Tensor]:
        """``counts``, and those of the auxiliary losses."""
        auxiliary = self.auxiliary.counts(counted_tokens(batch)) if self.auxiliary else {}
        return {**self.counts(batch), **auxiliary}

    def all_losses(self, model: ForwardFn, batch: Batch) -> dict[str, Tensor]:
        """``training_step``, and the auxiliary losses."""
        if self.auxiliary is None:
            return self.training_step(model, batch)
        with self.auxiliary.recorded():
            losses = self.training_step(model, batch)
        return {**losses, **self.auxiliary.losses(counted_tokens(batch))}

    def sampled_texts(self) -> list[SampledText] | None:
        """Some of what the model has sampled for the last step; None for a task that does not sample. Collective."""
        return None

    def after_step(self) -> None:
        """Called after each optimizer step, e.g. to adjust router biases. Collective."""
        if self.auxiliary is not None:
            self.auxiliary.after_step(process_group.all_reduce_sum)

    def derived_metrics(self, means: Mapping[str, float], /) -> dict[str, float]:
        """Further metrics that are functions of the means of a line, such as a perplexity."""
        return {}

    def metrics(self) -> dict[str, float]:
        """Further metrics since the last call, besides means of sums. Collective."""
        return self.auxiliary.metrics(process_group.all_reduce_sum) if self.auxiliary is not None else {}

    def metric_sums(self) -> dict[str, Tensor]:
        """What ``metrics`` has summed on this rank since its last call, by name; for a checkpoint between two lines."""
        logged = self.auxiliary.logged if self.auxiliary is not None else None
        return {} if logged is None else {"router": logged}

    def restore_metric_sums(self, sums: Mapping[str, Tensor]) -> None:
        """Continue from ``metric_sums`` of a checkpoint, in float64."""
        if self.auxiliary is not None:
            self.auxiliary.logged = sums.get("router")


def counted_tokens(batch: Batch) -> Tensor:
    """Which positions of a batch hold tokens of samples: (B, T) bool.

    Excludes what follows the last target of a row, such as padding, and rows without any target, which only fill up a rank's
    share of micro-batches.
    """
    targets = batch["labels"] != IGNORE_INDEX
    return targets.flip(1).cumsum(1).flip(1) > 0
