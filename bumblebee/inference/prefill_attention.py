"""Attention of prompt chunks by torch's ``varlen_attn``, on GPUs that can run it: one call for all chunks of a step, no mask.

Keys and values are gathered into one row, sequence after sequence. The queries of a sequence are its last positions; the
kernel aligns its causal mask to the lower right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bumblebee.inference.transfers import upload
from bumblebee.nn.attention_kernels import causal_varlen, problems, varlen_supports

if TYPE_CHECKING:
    from bumblebee.inference.attention_metadata import QuerySpan


@dataclass
class PackedSpans:
    """The chunks of n sequences.

    Args:
        slots: (sum of lengths,) int64, where their keys and values lie in the cache.
        ends: (2, n + 1) int32, cumulative numbers of queries and of keys.
        queries: largest number of queries.
        keys: largest number of keys.
    """

    slots: Tensor
    ends: Tensor
    queries: int
    keys: int

    @classmethod
    def of(cls, spans: Sequence[QuerySpan], block_size: int) -> PackedSpans:
        """Of at least one span."""
        queries, keys = [span.num_queries for span in spans], [span.length - span.start for span in spans]
        device = spans[0].block_table.device
        within = torch.arange(block_size, device=device)
        slots = [(span.block_table[:, None] * block_size + within).flatten()[span.start : span.length] for span in spans]
        ends = upload([[0, *accumulate(queries)], [0, *accumulate(keys)]], device, torch.int32)
        return cls(torch.cat(slots), ends, max(queries), max(keys))

    def to(self, device: torch.device) -> PackedSpans:
        """The chunks for layers on another device."""
        return replace(self, slots=self.slots.to(device), ends=self.ends.to(device))

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
        """Each query attends to its sequence up to itself.

        Args:
            q: (sum of queries, H, D).
            keys: of the cache, (blocks, block_size, K, D).
            values: likewise.
            window: positions that a token attends to; None for all.

        Returns:
            (sum of queries, H, D).
        """
        k, v = (x.flatten(0, 1).index_select(0, self.slots) for x in (keys, values))
        queries, in_cache = self.ends
        return causal_varlen(q, k, v, (queries, in_cache), (self.queries, self.keys), window)


def can_pack(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether ``varlen_attn`` can compute the chunks of a model; else each has a call of its own, with a mask."""
    return device.type == "cuda" and not problems("varlen", dtype) and varlen_supports(head_dim, 0.0)
