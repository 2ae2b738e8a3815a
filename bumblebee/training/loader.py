"""The loader: from a plan and a DataModule to the micro-batches of each step, in worker processes if wanted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from bumblebee.datamodule import Batch, DataModule
from bumblebee.training.plan import Place, Plan

# Samples of similar length that stay together. Constants, so that the order knows nothing of ranks and batch sizes.
GROUP = 64
GROUPS_SORTED = 64  # groups that are cut from one sorted chunk: the larger, the more alike the lengths and the less the chance


def epoch_order(samples: int, seed: int, epoch: int, lengths: np.ndarray | None = None) -> np.ndarray:
    """A permutation of ``range(samples)`` that depends on (seed, epoch, lengths) alone, not on how one got there.

    Args:
        samples: how many.
        seed: of the run.
        epoch: from 0.
        lengths: (samples,) where neighbours shall be of similar length, so that batches need little padding. Shuffled samples
            are sorted within large chunks, cut into groups, and the groups are shuffled.
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
    """A micro-batch for each Place of a plan."""

    def __init__(self, data: DataModule, seed: int) -> None:
        self.data = data
        self.seed = seed
        self._order: tuple[int, np.ndarray] | None = None  # of the epoch that was asked for last

    def order(self, epoch: int) -> np.ndarray:
        """The samples of an epoch."""
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, epoch_order(len(self.data.train), self.seed, epoch, self.data.lengths)
        return self._order[1]

    def __getitem__(self, place: Place) -> Batch:
        order = self.order(place.epoch)
        samples = [self.data.train[int(index)] for index in order[place.first : place.last]]
        if samples:
            return self.data.collate(samples)
        return self.data.without_targets(self.data.collate([self.data.train[int(order[0])]]))


def records(data: DataModule, place: Place, seed: int) -> list[str]:
    """Where the samples of a micro-batch came from, for people."""
    order = MicroBatches(data, seed).order(place.epoch)
    return [data.origin(int(index)) for index in order[place.first : place.last]]


class _Places:
    """A rank's micro-batches from a step on, one after the other: the sampler of the DataLoader."""

    def __init__(self, plan: Plan, rank: int, first_step: int) -> None:
        self.plan, self.rank, self.first_step = plan, rank, first_step

    def __iter__(self) -> Iterator[Place]:
        for step in range(self.first_step, self.plan.max_steps):
            yield from self.plan.window(step, self.rank)


def train_windows(
    data: DataModule, plan: Plan, seed: int, rank: int, first_step: int, workers: int, pin_memory: bool
) -> Iterator[list[Batch]]:
    """The list of micro-batches of each step, from ``first_step`` to the plan's end.

    Args:
        data: set up.
        plan: who gets what.
        seed: of the order.
        rank: whose micro-batches.
        first_step: steps already done; nothing of them is read.
        workers: processes that prepare batches; 0 prepares them in this one.
        pin_memory: copy batches to page-locked memory, from where a GPU reads without waiting.
    """
    loader = DataLoader(
        MicroBatches(data, seed), batch_size=None, sampler=_Places(plan, rank, first_step),
        num_workers=workers, pin_memory=pin_memory, persistent_workers=workers > 0,
        generator=torch.Generator(),  # a start draws from it; drawn from training's, a resume would not be exact
    )  # fmt: skip
    batches = iter(loader)
    for step in range(first_step, plan.max_steps):
        yield [next(batches) for _ in plan.window(step, rank)]


def validation_batches(data: DataModule, batch_size: int, rank: int, world_size: int) -> Iterator[Batch]:
    """This rank's share of the validation samples, in order, equally many batches on every rank."""
    return batches_in_order(data, data.validation or (), batch_size, rank, world_size)


def batches_in_order(data: DataModule, samples: Sequence[Any], batch_size: int, rank: int, world_size: int) -> Iterator[Batch]:
    """A rank's share of some samples, in order, equally many batches on every rank: the last may be without targets."""
    across = batch_size * world_size
    for begin in range(0, len(samples), across):
        mine = range(begin + rank * batch_size, min(begin + (rank + 1) * batch_size, len(samples)))
        if mine:
            yield data.collate([samples[index] for index in mine])
        else:
            yield data.without_targets(data.collate([samples[0]]))
