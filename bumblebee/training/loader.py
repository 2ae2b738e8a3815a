"""From a plan and a DataModule to the micro-batches of each step, optionally prepared in worker processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from bumblebee.datamodule import Batch, DataModule, SampleT
from bumblebee.training.plan import Plan, SampleRange

# Constants, so that the order does not depend on ranks and batch sizes.
GROUP = 64  # samples of similar length that stay together
GROUPS_SORTED = 64  # groups per sorted chunk: more make lengths more alike, and the order less random


def epoch_order(samples: int, seed: int, epoch: int, lengths: np.ndarray | None = None) -> np.ndarray:
    """Return a permutation of ``range(samples)`` that depends on (seed, epoch, lengths) alone, so that any epoch can resume.

    Args:
        samples: number of samples.
        seed: the run's.
        epoch: from 0.
        lengths: (samples,) in tokens, to put samples of similar length next to each other, so that batches need little
            padding: shuffled samples are sorted within large chunks and split into groups, and the groups are shuffled.
    """
    random = np.random.Generator(np.random.PCG64([seed, epoch]))
    order = random.permutation(samples)
    if lengths is None:
        return order
    chunks = np.arange(samples) // (GROUP * GROUPS_SORTED)
    order = order[np.lexsort((lengths[order], chunks))]
    groups = np.split(order, np.arange(GROUP, samples, GROUP))
    return np.concatenate([groups[number] for number in random.permutation(len(groups))])


class MicroBatches(Dataset):
    """Maps each SampleRange of a plan to a micro-batch."""

    def __init__(self, data: DataModule, seed: int) -> None:
        self.data = data
        self.seed = seed
        self._order: tuple[int, np.ndarray] | None = None  # (epoch, its order), cached

    def order(self, epoch: int) -> np.ndarray:
        """The order of an epoch's samples."""
        if self._order is None or self._order[0] != epoch:
            order = epoch_order(len(self.data.train), self.seed, epoch, self.data.lengths)
            self._order = epoch, self.data.ordered(order)
        return self._order[1]

    def __getitem__(self, micro_batch: SampleRange) -> Batch:
        order = self.order(micro_batch.epoch)
        samples = [self.data.train[int(index)] for index in order[micro_batch.first : micro_batch.last]]
        if samples:
            return self.data.collate(samples)
        return self.data.without_targets(self.data.collate([self.data.train[int(order[0])]]))


def sample_origins(data: DataModule, micro_batch: SampleRange, seed: int) -> list[str]:
    """Where the samples of a micro-batch came from, such as FILE:LINE."""
    order = MicroBatches(data, seed).order(micro_batch.epoch)
    return [data.origin(int(index)) for index in order[micro_batch.first : micro_batch.last]]


class _PlanSampler:
    """The DataLoader's sampler: yields a rank's micro-batches from a step on."""

    def __init__(self, plan: Plan, rank: int, first_step: int) -> None:
        self.plan, self.rank, self.first_step = plan, rank, first_step

    def __iter__(self) -> Iterator[SampleRange]:
        for window in _windows(self.plan, self.rank, self.first_step):
            yield from window


def _windows(plan: Plan, rank: int, first_step: int) -> Iterator[list[SampleRange]]:
    """A rank's micro-batches of each step, once for each rollout batch: of all its steps, also beyond the plan's last one."""
    step = first_step
    while step < plan.max_steps:
        yield from plan.rollout_window(step, rank)
        rollout = plan.rollout(step)
        step = rollout.first + rollout.count


def train_windows(
    data: DataModule, plan: Plan, seed: int, rank: int, first_step: int, workers: int, pin_memory: bool
) -> Iterator[list[Batch]]:
    """Yield the micro-batches of each step, from ``first_step`` to the plan's end; those of a rollout batch once.

    Args:
        data: set up.
        plan: which samples belong to which step and rank.
        seed: of the data order.
        rank: whose micro-batches.
        first_step: number of steps already done, whose samples are not read; begins a rollout batch.
        workers: processes that prepare batches; 0 prepares them in this process.
        pin_memory: copy batches to page-locked memory, from which copies to a GPU are asynchronous.
    """
    loader = DataLoader(
        MicroBatches(data, seed), batch_size=None, sampler=_PlanSampler(plan, rank, first_step),
        num_workers=workers, pin_memory=pin_memory, persistent_workers=workers > 0,
        generator=torch.Generator(),  # each iterator draws from it; from the global one, a resume would not be exact
    )  # fmt: skip
    batches = iter(loader)
    for window in _windows(plan, rank, first_step):
        yield [next(batches) for _ in window]


def validation_batches(data: DataModule, batch_size: int, rank: int, world_size: int) -> Iterator[Batch]:
    """Yield this rank's share of the validation samples, see ``batches_in_order``."""
    return batches_in_order(data, data.validation or (), batch_size, rank, world_size)


def batches_in_order(
    data: DataModule[SampleT], samples: Sequence[SampleT], batch_size: int, rank: int, world_size: int
) -> Iterator[Batch]:
    """Yield a rank's share of samples, in order, in as many batches as on every other rank: the last may have no targets."""
    across = batch_size * world_size
    for begin in range(0, len(samples), across):
        local = range(begin + rank * batch_size, min(begin + (rank + 1) * batch_size, len(samples)))
        if local:
            yield data.collate([samples[index] for index in local])
        else:
            yield data.without_targets(data.collate([samples[0]]))
