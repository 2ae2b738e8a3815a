"""Documents of packed rows: where they begin and end, found on the host before a batch is moved to its device.

Attention kernels for packed rows take the boundaries as arguments. Finding them on a GPU would make the CPU wait for it in
every forward pass, so they travel with the tensor of position ids from which they were found. A tensor made from it, such as a
slice, has none, and the boundaries are then found on its device.

Shapes: B rows, T positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Documents:
    """The documents of a batch, in the order of its flattened rows. A row begins a document, and so does each position 0.

    Args:
        cu_seqlens: (documents + 1,) int32, the index at which each begins in the flattened batch, and B * T.
        longest: tokens of the longest one.
        one_per_row: no row holds more than one, so that plain causal attention is right.
    """

    cu_seqlens: Tensor
    longest: int
    one_per_row: bool

    @classmethod
    def find(cls, position_ids: Tensor) -> Documents:
        """Find the documents of ``position_ids`` (B, T). Synchronizes with a GPU."""
        return cls.of_starts(position_ids == 0)

    @classmethod
    def of_starts(cls, starts: Tensor) -> Documents:
        """Find the documents that begin where ``starts`` (B, T) is True, and at each row. Synchronizes with a GPU."""
        starts = starts.clone()
        starts[:, :1] = True
        begins = starts.flatten().nonzero().flatten()
        cu_seqlens = pad(begins, (0, 1), value=starts.numel())
        longest = int(cu_seqlens.diff().max()) if len(begins) else 0
        return cls(cu_seqlens.to(torch.int32), longest, len(begins) == len(starts))

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1

    def padded_places(self, positions: int) -> Tensor:
        """Where each of the batch's B * T positions lies in (documents, longest), flattened: (B * T,) int64."""
        starts, lengths = self.cu_seqlens[:-1].long(), self.cu_seqlens.diff()
        begins = torch.arange(len(self), device=starts.device) * self.longest
        return torch.arange(positions, device=starts.device) + torch.repeat_interleave(
            begins - starts, lengths, output_size=positions
        )

    def to(self, device: torch.device) -> Documents:
        """The documents with their tensor on another device; does not wait for it."""
        return Documents(self.cu_seqlens.to(device, non_blocking=True), self.longest, self.one_per_row)


def move_with_documents(position_ids: Tensor, device: torch.device) -> Tensor:
    """Move position ids (B, T) from the host to a device, without waiting, with the documents found on the host."""
    documents = Documents.find(position_ids)
    moved = position_ids.to(device, non_blocking=True)
    moved.documents = (moved._version, documents.to(device))  # type: ignore[attr-defined]
    return moved


def documents_of(position_ids: Tensor) -> Documents | None:
    """The documents that position ids (B, T) came with. Without them, they are found here: synchronizes with a GPU.

    Returns:
        None for tensors without values: meta tensors, and those that torch.compile traces.
    """
    if position_ids.is_meta or torch.compiler.is_compiling():
        return getattr(position_ids, "documents", (None, None))[1]
    version, documents = getattr(position_ids, "documents", (None, None))
    if documents is not None and version == position_ids._version:  # not if they were changed in place
        return documents
    return Documents.find(position_ids)
