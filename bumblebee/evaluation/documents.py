"""The documents in a DataModule's samples: texts that do not attend to each other; each begins at position 0 of a row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from bumblebee.datamodule import DataModule, SampleT


class Document(NamedTuple):
    """A text in a row of a batch.

    Args:
        ids: token ids.
        labels: the token after each, or IGNORE_INDEX where it is not a target.
    """

    ids: list[int]
    labels: list[int]


def documents_of(data: DataModule[SampleT], sample: SampleT) -> Iterator[list[Document]]:
    """Yield the documents of each row of a sample's batch."""
    batch = data.collate([sample])
    for ids, labels, positions in zip(*(batch[name].tolist() for name in ("input_ids", "labels", "position_ids")), strict=True):
        starts = [index for index, position in enumerate(positions) if position == 0]
        yield [Document(ids[start:end], labels[start:end]) for start, end in zip(starts, [*starts[1:], len(ids)], strict=True)]
