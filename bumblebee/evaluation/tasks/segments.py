"""Segments: the texts in a DataModule's samples, each with its targets, and their log-probabilities.

A sample may hold several texts that do not attend to each other; each begins at position 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from bumblebee.datamodule import DataModule, SampleT
from bumblebee.evaluation.scoring import Continuation
from bumblebee.nn import IGNORE_INDEX


class Segment(NamedTuple):
    """A text up to its last target.

    Args:
        ids: token ids.
        labels: the token after each, or IGNORE_INDEX where it is not a target.
    """

    ids: list[int]
    labels: list[int]

    @property
    def first(self) -> int:
        """Index of the first target."""
        return next(index for index, label in enumerate(self.labels) if label != IGNORE_INDEX)

    @property
    def targets(self) -> list[int]:
        """The targets' ids."""
        return [label for label in self.labels if label != IGNORE_INDEX]

    def continuation(self) -> Continuation:
        """The text after what comes before the first target."""
        following = [*self.ids[1:], self.labels[-1]]
        return Continuation(self.ids[: self.first + 1], following[self.first :])

    def target_log_probs(self, token_log_probs: Sequence[float]) -> list[float]:
        """Of the log-probabilities of ``continuation``, those of the targets."""
        pairs = zip(token_log_probs, self.labels[self.first :], strict=True)
        return [log_prob for log_prob, label in pairs if label != IGNORE_INDEX]


def segments_of(data: DataModule[SampleT], sample: SampleT) -> Iterator[list[Segment]]:
    """Yield the segments with targets of each row of a sample's batch."""
    batch = data.collate([sample])
    for row in zip(*(batch[name].tolist() for name in ("input_ids", "labels", "position_ids")), strict=True):
        yield list(_in_row(*row))


def _in_row(input_ids: list[int], labels: list[int], position_ids: list[int]) -> Iterator[Segment]:
    starts = [index for index, position in enumerate(position_ids) if position == 0]
    for start, end in zip(starts, [*starts[1:], len(labels)], strict=True):
        targets = [index for index in range(start, end) if labels[index] != IGNORE_INDEX]
        if targets:
            yield Segment(input_ids[start : targets[-1] + 1], labels[start : targets[-1] + 1])
