"""Truncation: what becomes of sequences that are longer than a window. The recipe names one of four ways.

    drop          the whole sample is left out
    keep_start    its first tokens stay
    keep_end      its last tokens stay
    split         it is cut into pieces; each target is trained once, with the context of its own piece

A sequence of n tokens takes n - 1 places of a window, since its last token is only a label. Pieces without a target are left
out: they would cost time and teach nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from datamodules.packing import cut
from datamodules.token_cache import TokenCache

TooLong = Literal["drop", "keep_start", "keep_end", "split"]


@dataclass(frozen=True)
class Pieces:
    """Where the pieces of some sequences are, and what was left out.

    Args:
        starts: first token of each piece.
        lengths: places that each takes; it reads one token more.
        targets: trained tokens of each.
        too_long: sequences that did not fit.
        without_targets: pieces that were left out since they have no target.
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
        """Behind the last token of each."""
        return self.starts + self.lengths + 1


def fitted(cache: TokenCache, sequences: np.ndarray, max_length: int, too_long: TooLong) -> Pieces:
    """The pieces of sequences, none longer than ``max_length`` places, in the order of the sequences.

    Args:
        cache: where they are.
        sequences: their numbers; one may come several times.
        max_length: places in a window.
        too_long: what to do with longer ones.
    """
    begins, ends = cache.begins[sequences], cache.ends[sequences]
    long = ends - begins - 1 > max_length
    if too_long == "drop":
        begins, ends = begins[~long], ends[~long]
    elif too_long == "keep_start":
        ends = np.minimum(ends, begins + max_length + 1)
    elif too_long == "keep_end":
        begins = np.maximum(begins, ends - max_length - 1)
    starts, lengths = cut(begins, ends, max_length)
    targets = _targets(cache, starts, lengths)
    useful = targets > 0
    empty = int(np.sum(ends - begins < 2))  # of one token: nothing is predicted, so there is not even a piece
    without = int(np.sum(~useful)) + empty
    return Pieces(starts[useful], lengths[useful], targets[useful], int(np.sum(long)), without)


def _targets(cache: TokenCache, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Of each piece. Those of whole sequences are known, the others are counted."""
    sequence = np.searchsorted(cache.ends, starts, side="right")
    targets = np.asarray(cache.targets)[sequence]
    part = np.flatnonzero(lengths != cache.ends[sequence] - cache.begins[sequence] - 1)
    for piece in part.tolist():
        start = int(starts[piece])
        targets[piece] = np.count_nonzero(cache.trained(start + 1, start + 1 + int(lengths[piece])))
    return targets
