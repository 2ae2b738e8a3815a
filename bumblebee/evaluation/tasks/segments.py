"""Segments: the texts in a DataModule's samples, each with its targets, and their log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from bumblebee.datamodule import DataModule, SampleT
from bumblebee.evaluation.documents import Document, documents_of
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
    for row in documents_of(data, sample):
        yield [segment for document in row if (segment := _up_to_last_target(document))]


def _up_to_last_target(document: Document) -> Segment | None:
    ids, labels = document
    targets = [index for index, label in enumerate(labels) if label != IGNORE_INDEX]
    return Segment(ids[: targets[-1] + 1], labels[: targets[-1] + 1]) if targets else None
