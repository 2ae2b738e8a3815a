"""The samples of a dry run: the largest micro-batch of an epoch, and typical ones."""

from __future__ import annotations

from bumblebee.datamodule import Batch, DataModule, SampleT
from bumblebee.preview.dry_run import MAX_MICRO_BATCHES
from bumblebee.training.loader import epoch_order


class DataSubset(DataModule[SampleT]):
    """A few samples of a DataModule: its largest micro-batch, and typical ones.

    Args:
        data: the whole.
        micro_batch_size: samples in a micro-batch.
        seed: of the order.
    """

    def __init__(self, data: DataModule[SampleT], micro_batch_size: int, seed: int) -> None:
        self.data, self.micro_batch_size, self.seed = data, micro_batch_size, seed

    def setup(self, seed: int) -> None:
        """Select the samples."""
        self.data.setup(seed)
        self.tokenizer = self.data.tokenizer
        self.micro_batches = select_micro_batches(self.data, self.micro_batch_size, self.seed)
        indices = dict.fromkeys(index for micro_batch in self.micro_batches for index in micro_batch)  # pairs must be unique
        self.train = [self.data.train[index] for index in indices]

    def collate(self, samples: list[SampleT]) -> Batch:
        """Collate like the whole."""
        return self.data.collate(samples)

    def without_targets(self, batch: Batch) -> Batch:
        """Remove targets like the whole."""
        return self.data.without_targets(batch)

    def batches(self) -> list[Batch]:
        """The micro-batches, the largest one first."""
        return [self.data.collate([self.data.train[index] for index in indices]) for indices in self.micro_batches]


def select_micro_batches(data: DataModule, micro_batch_size: int, seed: int) -> list[list[int]]:
    """Sample indices of micro-batches of the first epoch: the one with the longest sample, then evenly spaced ones."""
    order = epoch_order(len(data.train), seed, 0, data.lengths)
    count = max(1, len(order) // micro_batch_size)
    longest = 0 if data.lengths is None else int(data.lengths[order].argmax()) // micro_batch_size
    spaced = [(2 * i + 1) * count // (2 * MAX_MICRO_BATCHES) for i in range(MAX_MICRO_BATCHES)]
    return [order[i * micro_batch_size : (i + 1) * micro_batch_size].tolist() for i in (longest, *spaced)]
