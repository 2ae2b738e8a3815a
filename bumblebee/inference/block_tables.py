"""Block tables on the device: which blocks of the KV cache hold each running sequence.

A sequence keeps its row as long as it runs, so a step writes only the entries that changed: all of a row when a sequence is
first computed, one when a prompt block is replaced by a cached one, and mostly none. The tensor is never reallocated, so that
its address can be part of a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from bumblebee.inference.sequence import Sequence
from bumblebee.inference.transfers import upload_lists


class BlockTables:
    """One row per running sequence.

    Args:
        rows: sequences of one step at most.
        width: blocks of one sequence at most.
        device: of the KV cache.

    Attributes:
        tensor: (rows, width) int64 block numbers; what lies beyond a sequence's blocks is arbitrary but valid.
    """

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        self.tensor = torch.zeros(rows, width, dtype=torch.int64, device=device)
        self._rows: dict[Sequence, int] = {}  # least recently used first
        self._written: list[list[int]] = [[] for _ in range(rows)]  # what each row of the tensor holds

    def update(self, sequences: SequenceOf[Sequence]) -> list[int]:
        """Write what has changed in the tables of these sequences, and return their rows."""
        rows = [self._row(sequence, sequences) for sequence in sequences]
        at: list[int] = []
        blocks: list[int] = []
        for sequence, row in zip(sequences, rows, strict=True):
            if sequence.block_table != self._written[row]:
                self._collect(row, sequence.block_table, at, blocks)
        if at:
            index, values = upload_lists([at, blocks], self.tensor.device)
            self.tensor.view(-1).index_copy_(0, index, values)
        return rows

    def of(self, row: int, count: int) -> Tensor:
        """The first blocks of a row, as a view."""
        return self.tensor[row, :count]

    def _collect(self, row: int, table: list[int], at: list[int], blocks: list[int]) -> None:
        """Add the changed entries of a row to the flat indices and block numbers that are written."""
        written, offset = self._written[row], row * self.tensor.shape[1]
        for column, block in enumerate(table):
            if column >= len(written) or written[column] != block:
                at.append(offset + column)
                blocks.append(block)
        self._written[row] = list(table)

    def _row(self, sequence: Sequence, sequences: SequenceOf[Sequence]) -> int:
        """The row of a sequence; a new one takes the row of a sequence that has not been computed for the longest time."""
        row = self._rows.pop(sequence, None)
        if row is None:
            row = len(self._rows) if len(self._rows) < len(self._written) else self._free_row(sequences)
        self._rows[sequence] = row
        return row

    def _free_row(self, sequences: SequenceOf[Sequence]) -> int:
        oldest = next(sequence for sequence in self._rows if sequence not in sequences)
        return self._rows.pop(oldest)
