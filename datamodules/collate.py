"""Rows: from pieces of sequences to the tensors of a batch, and sequences of samples that are made of pieces.

A piece is (inputs, labels), see ``token_cache.Piece``. Positions begin again at 0 with each piece, from which the model knows
that pieces do not attend to each other; each place of the padding is a piece of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from bumblebee.datamodule import Batch
from bumblebee.nn import IGNORE_INDEX
from datamodules.packing import Windows
from datamodules.token_cache import Piece, TokenCache
from datamodules.truncation import Pieces

MULTIPLE = 8  # widths of padded batches; kernels like them, and fewer shapes are met


class Packed(Sequence):
    """Windows as samples: for each a list of its pieces.

    Args:
        cache: where the tokens are.
        windows: which of them belong together.
        pieces: what the windows hold and what was left out, where that is known.
    """

    def __init__(self, cache: TokenCache, windows: Windows, pieces: Pieces | None = None) -> None:
        self.cache, self.windows, self.pieces = cache, windows, pieces

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: Any) -> list[Piece]:
        return [self.cache.piece(start, length) for start, length in self.windows.pieces(index)]

    def origin(self, index: int) -> str:
        """FILE:LINE of each record in a window."""
        sequences = np.searchsorted(self.cache.ends, [start for start, _ in self.windows.pieces(index)], side="right")
        return " ".join(dict.fromkeys(self.cache.origin(sequence) for sequence in sequences.tolist()))


class Single(Sequence):
    """Pieces as samples: each a list of one.

    Args:
        cache: where the tokens are.
        pieces: which of them, and what was left out.
    """

    def __init__(self, cache: TokenCache, pieces: Pieces) -> None:
        self.cache, self.pieces = cache, pieces

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: Any) -> list[Piece]:
        return [self.cache.piece(int(self.pieces.starts[index]), int(self.pieces.lengths[index]))]

    def origin(self, index: int) -> str:
        """FILE:LINE of a sample."""
        return self.cache.origin(int(np.searchsorted(self.cache.ends, self.pieces.starts[index], side="right")))


def width_of(rows: list[list[Piece]]) -> int:
    """The longest row, rounded up."""
    longest = max(sum(len(inputs) for inputs, _ in row) for row in rows)
    return -(-longest // MULTIPLE) * MULTIPLE


def tensors(rows: list[list[Piece]], width: int, pad: int) -> Batch:
    """Rows of pieces -> ``input_ids``, ``labels``, ``position_ids``, each (rows, width) int64, padded on the right."""
    input_ids = np.full((len(rows), width), pad, dtype=np.int64)
    labels = np.full_like(input_ids, IGNORE_INDEX)
    position_ids = np.zeros_like(input_ids)
    for row, pieces in enumerate(rows):
        at = 0
        for inputs, targets in pieces:
            place = slice(at, at + len(inputs))
            input_ids[row, place], labels[row, place] = inputs, targets
            position_ids[row, place] = np.arange(len(inputs))
            at = place.stop
    arrays = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
