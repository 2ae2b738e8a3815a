"""Fitting token sequences into rows of a fixed length: truncation, splitting into chunks, and packing.

A sequence of n tokens has n - 1 positions in a row, since its last token is only a label. A chunk of k positions reads k + 1
tokens of its sequence; the first one is only context. Sequences that are longer than a row are, as the recipe says,

    drop          omitted
    keep_start    reduced to their first tokens
    keep_end      reduced to their last tokens
    split         split into chunks; every target is trained once, with the context of its own chunk

Chunks are packed into windows by best fit, longest first: each goes into the window where it leaves the least room. Chunks are
never split to fill a window. Without packing, each chunk is a row of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from datamodules.token_cache import TokenCache

TooLong = Literal["drop", "keep_start", "keep_end", "split"]


@dataclass(frozen=True)
class Chunks:
    """Where the chunks of some sequences are in the token stream, and counts of what was dropped.

    Args:
        starts: first token of each chunk.
        lengths: positions of each chunk; it reads one token more.
        targets: number of targets of each chunk.
        too_long: number of sequences that did not fit.
        without_targets: number of chunks that were dropped because they have no target.
    """

    starts: np.ndarray
    lengths: np.ndarray
    targets: np.ndarray
    too_long: int
    without_targets: int

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def ends(self) -> np.ndarray:
        """End (exclusive) of the tokens of each chunk."""
        return self.starts + self.lengths + 1


def fit_sequences(cache: TokenCache, sequences: np.ndarray, max_length: int, too_long: TooLong) -> Chunks:
    """Truncate or split sequences so that no chunk has more than ``max_length`` positions.

    Chunks without a target are dropped: they would cost time and train nothing.

    Args:
        cache: holds the sequences.
        sequences: their indices; one may occur several times.
        max_length: positions in a row.
        too_long: what to do with longer sequences.
    """
    begins, ends = cache.begins[sequences], cache.ends[sequences]
    long = ends - begins - 1 > max_length
    if too_long == "drop":
        begins, ends = begins[~long], ends[~long]
    elif too_long == "keep_start":
        ends = np.minimum(ends, begins + max_length + 1)
    elif too_long == "keep_end":
        begins = np.maximum(begins, ends - max_length - 1)
    starts, lengths = split_into_chunks(begins, ends, max_length)
    targets = _count_targets(cache, starts, lengths)
    useful = targets > 0
    single_tokens = int(np.sum(ends - begins < 2))  # nothing is predicted, so they do not even have a chunk
    without_targets = int(np.sum(~useful)) + single_tokens
    return Chunks(starts[useful], lengths[useful], targets[useful], int(np.sum(long)), without_targets)


def split_into_chunks(begins: np.ndarray, ends: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """First token and number of positions of each chunk, in the order of the sequences.

    Args:
        begins: first token of each sequence.
        ends: end (exclusive) of each sequence.
        max_length: most positions of a chunk.
    """
    positions = np.maximum(ends - begins - 1, 0)
    counts = -(-positions // max_length)
    sequence = np.repeat(np.arange(len(positions)), counts)
    index = np.arange(len(sequence)) - np.repeat(np.cumsum(counts) - counts, counts)  # of the chunk in its sequence
    starts = begins[sequence] + index * max_length
    return starts, np.minimum(max_length, positions[sequence] - index * max_length)


def _count_targets(cache: TokenCache, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Targets of each chunk: known for whole sequences, counted for the others."""
    sequence = np.searchsorted(cache.ends, starts, side="right")
    targets = np.asarray(cache.targets)[sequence]
    partial = np.flatnonzero(lengths != cache.ends[sequence] - cache.begins[sequence] - 1)
    for chunk in partial.tolist():
        start = int(starts[chunk])
        targets[chunk] = np.count_nonzero(cache.target_mask(start + 1, start + 1 + int(lengths[chunk])))
    return targets


# -- packing -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackedWindows:
    """Which chunks share a window.

    Args:
        starts: first token of each chunk, window by window.
        lengths: positions of each chunk.
        bounds: (windows + 1,): window i has the chunks ``bounds[i]`` to ``bounds[i + 1]``.
        max_length: positions in a window.
    """

    starts: np.ndarray
    lengths: np.ndarray
    bounds: np.ndarray
    max_length: int

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def chunks(self, window: int) -> list[tuple[int, int]]:
        """(first token, positions) of each chunk of a window."""
        first, last = self.bounds[window], self.bounds[window + 1]
        return list(zip(self.starts[first:last].tolist(), self.lengths[first:last].tolist(), strict=True))

    @property
    def efficiency(self) -> float:
        """The share of all positions that is not padding."""
        return float(self.lengths.sum() / max(1, len(self) * self.max_length))


def pack(begins: np.ndarray, ends: np.ndarray, max_length: int) -> PackedWindows:
    """Split sequences, the tokens [begin, end) of a stream, into chunks and pack these into windows."""
    starts, lengths = split_into_chunks(begins, ends, max_length)
    order = np.argsort(-lengths, kind="stable")
    windows = best_fit(lengths[order].tolist(), max_length)
    flat = order[[chunk for window in windows for chunk in window]] if windows else order
    bounds = np.cumsum([0, *(len(window) for window in windows)])
    return PackedWindows(starts[flat], lengths[flat], bounds, max_length)


def best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Best-fit-decreasing bin packing.

    A bit set of the remaining rooms makes the search for a window independent of their number.

    Args:
        lengths: sorted, longest first, none above ``capacity``.
        capacity: of a window.

    Returns:
        For each window, indices of ``lengths``.
    """
    windows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set if by_room[r] is not empty
    for index, length in enumerate(lengths):
        sufficient = rooms >> length
        if sufficient:
            room = length + (sufficient & -sufficient).bit_length() - 1  # the smallest sufficient room
            window = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, window = capacity, len(windows)
            windows.append([])
        windows[window].append(index)
        if rest := room - length:
            by_room[rest].append(window)
            rooms |= 1 << rest
    return windows
