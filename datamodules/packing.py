"""Packing: documents of any length into windows of one length, with nothing thrown away.

A document of n tokens has n - 1 targets (each token but the first). It is cut into pieces of at most ``max_length`` targets; a
piece of k targets reads k + 1 tokens, the first of which only serves as context, so that each target is trained exactly once.
Pieces are then put into windows by best fit, longest first: each goes where the least room is left over.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Windows:
    """Where each window's tokens are.

    Args:
        starts: for each piece the place of its first token in the token stream, windows one after the other.
        lengths: for each piece its targets.
        bounds: (windows + 1,): window i has the pieces ``bounds[i]`` to ``bounds[i + 1]``.
        max_length: targets that fit into a window.
    """

    starts: np.ndarray
    lengths: np.ndarray
    bounds: np.ndarray
    max_length: int

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def pieces(self, window: int) -> list[tuple[int, int]]:
        """(first token, targets) of each piece of a window."""
        first, last = self.bounds[window], self.bounds[window + 1]
        return list(zip(self.starts[first:last].tolist(), self.lengths[first:last].tolist(), strict=True))

    @property
    def efficiency(self) -> float:
        """Share of all window positions that hold a target."""
        return float(self.lengths.sum() / max(1, len(self) * self.max_length))


def pack(begins: np.ndarray, ends: np.ndarray, max_length: int) -> Windows:
    """Windows for the documents whose tokens lie at ``begins[i]`` to ``ends[i]`` (exclusive) of a stream."""
    starts, lengths = cut(begins, ends, max_length)
    order = np.argsort(-lengths, kind="stable")
    windows = best_fit(lengths[order].tolist(), max_length)
    flat = order[[piece for window in windows for piece in window]] if windows else order
    bounds = np.cumsum([0, *(len(window) for window in windows)])
    return Windows(starts[flat], lengths[flat], bounds, max_length)


def cut(begins: np.ndarray, ends: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """First token and number of targets of each piece, in document order."""
    targets = np.maximum(ends - begins - 1, 0)
    pieces = -(-targets // max_length)
    document = np.repeat(np.arange(len(targets)), pieces)
    number = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)  # of the piece in its document
    starts = begins[document] + number * max_length
    return starts, np.minimum(max_length, targets[document] - number * max_length)


def best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Indices of ``lengths`` (longest first) by window. The windows with r places left are found through a bit set of all r."""
    windows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set where by_room[r] is not empty
    for piece, length in enumerate(lengths):
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1  # the least room that is enough
            window = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, window = capacity, len(windows)
            windows.append([])
        windows[window].append(piece)
        if left := room - length:
            by_room[left].append(window)
            rooms |= 1 << left
    return windows
