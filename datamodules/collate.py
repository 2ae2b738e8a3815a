"""Datasets of packed or single segments, and batching them to padded tensors.

A segment is (inputs, labels), see ``token_cache.Segment``. Positions start at 0 in each segment, which tells the model that
segments do not attend to each other. Padding continues the last segment of its row, none of whose tokens attends to it: where
rows are not packed, plain causal attention is right. Segments of a single padding token each would be many, and attention
kernels take time and memory for each.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import torch

from bumblebee.datamodule import Batch, SampleT
from bumblebee.nn import IGNORE_INDEX
from datamodules.packing import Chunks, PackedWindows
from datamodules.token_cache import Segment, TokenCache

PAD_TO_MULTIPLE_OF = 8  # of the width of padded batches: faster kernels, and fewer different shapes


class TokenDataset(Sequence[SampleT]):
    """A sequence of training samples that knows which records each comes from."""

    @abstractmethod
    def __getitem__(self, index: int) -> SampleT:  # type: ignore[override]  # no slices
        """A sample."""

    @abstractmethod
    def origin(self, index: int) -> str:
        """FILE:LINE of each record in a sample."""

    @abstractmethod
    def spans(self, index: int) -> list[tuple[int, int]]:
        """First token in the cache and number of positions of each segment in a sample."""

    def layout(self) -> tuple[np.ndarray, ...]:
        """Which tokens of the cache each sample consists of, as arrays of integers."""
        return ()


class PackedDataset(TokenDataset[list[Segment]]):
    """Windows as samples: each is the list of its segments.

    Args:
        cache: holds the tokens.
        windows: which chunks share a window.
        chunks: the chunks that were packed, if they were selected by ``fit_sequences``.
    """

    def __init__(self, cache: TokenCache, windows: PackedWindows, chunks: Chunks | None = None) -> None:
        self.cache, self.windows, self.chunks = cache, windows, chunks

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> list[Segment]:  # type: ignore[override]
        return [self.cache.segment(start, length) for start, length in self.windows.chunks(index)]

    def spans(self, index: int) -> list[tuple[int, int]]:
        """See the base class."""
        return self.windows.chunks(index)

    def layout(self) -> tuple[np.ndarray, ...]:
        """See the base class."""
        return self.windows.starts, self.windows.lengths, self.windows.bounds

    def origin(self, index: int) -> str:
        """See the base class."""
        samples = self.cache.samples_at(np.array([start for start, _ in self.windows.chunks(index)]))
        return " ".join(dict.fromkeys(self.cache.origin(sample) for sample in samples.tolist()))


class PaddedDataset(TokenDataset[list[Segment]]):
    """Chunks as samples: each is a list of one segment, to be padded to the longest of its batch.

    Args:
        cache: holds the tokens.
        chunks: the chunks.
    """

    def __init__(self, cache: TokenCache, chunks: Chunks) -> None:
        self.cache, self.chunks = cache, chunks

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> list[Segment]:  # type: ignore[override]
        return [self.cache.segment(*span) for span in self.spans(index)]

    def spans(self, index: int) -> list[tuple[int, int]]:
        """See the base class."""
        return [(int(self.chunks.starts[index]), int(self.chunks.lengths[index]))]

    def layout(self) -> tuple[np.ndarray, ...]:
        """See the base class."""
        return self.chunks.starts, self.chunks.lengths

    def origin(self, index: int) -> str:
        """See the base class."""
        return self.cache.origin(int(self.cache.samples_at(self.chunks.starts[index])))


def padded_width(rows: list[list[Segment]]) -> int:
    """The length of the longest row, rounded up to a multiple of PAD_TO_MULTIPLE_OF."""
    longest = max(sum(len(inputs) for inputs, _ in row) for row in rows)
    return -(-longest // PAD_TO_MULTIPLE_OF) * PAD_TO_MULTIPLE_OF


def collate_rows(rows: list[list[Segment]], width: int, pad_token_id: int) -> Batch:
    """Rows of segments -> ``input_ids``, ``labels``, ``position_ids``, each (rows, width) int64, padded on the right.

    Positions of padding do not exceed those of tokens: a model has no others, and may scale its frequencies by the largest.
    """
    input_ids = np.full((len(rows), width), pad_token_id, dtype=np.int64)
    labels = np.full_like(input_ids, IGNORE_INDEX)
    position_ids = np.zeros_like(input_ids)
    last = max([1, *(len(segment_inputs) - 1 for segments in rows for segment_inputs, _ in segments)])
    for row, segments in enumerate(rows):
        begin = start = 0
        for segment_inputs, segment_labels in segments:
            start, end = begin, begin + len(segment_inputs)
            input_ids[row, begin:end], labels[row, begin:end] = segment_inputs, segment_labels
            position_ids[row, begin:end] = np.arange(len(segment_inputs))
            begin = end
        position_ids[row, begin:] = np.arange(begin - start, width - start).clip(max=last)
    arrays = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
