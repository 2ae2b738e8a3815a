"""Attention metadata of one engine step: where keys and values are written, which blocks are read, and what is masked.

A step is one flat row of tokens: the next tokens, one or many, of several sequences. What all layers have in common is computed
once per step, here, and read by ``kv_cache.py``.

Decode tokens share attention calls, padded to the longest sequence of the call, since a call costs more than its work. A call
gathers a copy of the keys and values of its sequences, so it has no more than fit in ``MAX_GATHERED`` positions. Where lengths
differ so much that a CPU would mostly read padding, each sequence has a call of its own. All other tokens have one call per
sequence, or one for all where ``varlen_attn`` can run (``prefill_attention.py``).

Shapes: N tokens of the step, B decode tokens, S positions of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bumblebee.inference.decode_attention import PagedDecode
from bumblebee.inference.prefill_attention import PackedSpans
from bumblebee.inference.transfers import upload

MAX_GATHERED = 2**18  # positions of a decode call: 0.5 GB of keys and values for 4 key-value heads of width 128 in 16 bits


@dataclass
class QuerySpan:
    """The tokens of one sequence in the flat row.

    Args:
        offset: index of its first token in the row.
        num_queries: tokens of the sequence in this step.
        length: positions of the sequence, these tokens included: S.
        block_table: (blocks,) int64.
        mask: (num_queries, S - start) bool, true where a token attends; None for a decode token, which attends to all, and for
            spans that are packed.
        start: first position attended to, counted like ``length`` from the first entry of ``block_table``; 0 without a window.
    """

    offset: int
    num_queries: int
    length: int
    block_table: Tensor
    mask: Tensor | None
    start: int = 0

    def windowed(self, window: int, block_size: int) -> QuerySpan:
        """The span for a layer whose tokens attend to the last ``window`` positions; blocks before them are skipped."""
        start = max(self.length - self.num_queries - window + 1, 0)
        skipped = start // block_size
        length, start = self.length - skipped * block_size, start - skipped * block_size
        mask = self.mask
        if mask is not None:
            mask = mask[:, -(length - start) :].triu(length - start - self.num_queries - window + 1)
        return QuerySpan(self.offset, self.num_queries, length, self.block_table[skipped:], mask, start)

    def to(self, device: torch.device) -> QuerySpan:
        """The span with its tensors on another device."""
        mask = None if self.mask is None else self.mask.to(device)
        return replace(self, block_table=self.block_table.to(device), mask=mask)


@dataclass
class AttentionMetadata:
    """One step's tokens, for every layer.

    Args:
        slot_mapping: (N,) int64, the slot (block * block_size + offset) that each token's key and value are written to; without
            the tokens of ``paged``.
        spans: one per sequence, in the order of the row: decode tokens first; without those of ``paged``.
        decode: for each call that decode tokens share, the slots (B, S) of their sequences and a bool mask (B, S), false at
            padding; empty if each has a call of its own.
        block_size: positions per block.
        paged: decode tokens, first in the row, that the paged kernel writes and reads; None where it cannot run.
        packed: the spans that are neither in ``decode`` nor in ``paged``, for one call; None where each has its own.
    """

    slot_mapping: Tensor
    spans: list[QuerySpan]
    decode: list[tuple[Tensor, Tensor]]
    block_size: int
    paged: PagedDecode | None = None
    packed: PackedSpans | None = None
    _windowed: dict[int, AttentionMetadata] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        block_tables: Sequence[Sequence[int]],
        lengths: Sequence[int],
        query_counts: Sequence[int],
        block_size: int,
        device: torch.device,
        max_padding: float,
        device_tables: Sequence[Tensor] | None = None,
        paged: PagedDecode | None = None,
        pack: bool = False,
    ) -> AttentionMetadata:
        """Metadata of some sequences, decode tokens first.

        Args:
            block_tables: of each sequence; at least the blocks that its ``length`` positions need.
            lengths: positions of each sequence, new ones included.
            query_counts: new tokens of each sequence.
            block_size: positions per block.
            device: of the cache.
            max_padding: decode tokens share calls if one would read at most this many times the positions that they have.
            device_tables: the same tables on the device, as int64; None to copy them.
            paged: decode tokens before those of these sequences.
            pack: compute what does not share a decode call in one call of ``varlen_attn``.
        """
        spans, slots, offset = [], [], 0 if paged is None else len(paged.rows)
        tables = device_tables or [upload(table, device, torch.int64) for table in block_tables]
        for blocks, table, length, count in zip(block_tables, tables, lengths, query_counts, strict=True):
            slots += [blocks[at // block_size] * block_size + at % block_size for at in range(length - count, length)]
            table = table[: -(-length // block_size)]
            mask = None if pack else _causal(length, count, device)
            spans.append(QuerySpan(offset, count, length, table, mask))
            offset += count
        lengths = [span.length for span in spans if span.num_queries == 1]
        share = len(lengths) > 1 and max(lengths) * len(lengths) <= max_padding * sum(lengths)
        decode = _shared_decode(spans, block_size) if share else []
        packed = _packed(spans, decode, block_size) if pack else None
        return cls(upload(slots, device, torch.int64), spans, decode, block_size, paged, packed)

    def to(self, device: torch.device) -> AttentionMetadata:
        """The metadata for layers on another device."""
        if device == self.slot_mapping.device:
            return self
        decode = [(slots.to(device), valid.to(device)) for slots, valid in self.decode]
        return AttentionMetadata(
            self.slot_mapping.to(device),
            [span.to(device) for span in self.spans],
            decode,
            self.block_size,
            None if self.paged is None else self.paged.to(device),
            None if self.packed is None else self.packed.to(device),
        )

    def windowed(self, window: int | None) -> AttentionMetadata:
        """The metadata for layers with a sliding window, computed once per step; ``None`` means no window."""
        if window is None:
            return self
        if window not in self._windowed:
            spans = [span.windowed(window, self.block_size) for span in self.spans]
            decode = _shared_decode(spans, self.block_size) if self.decode else []
            packed = None if self.packed is None else _packed(spans, decode, self.block_size)
            self._windowed[window] = AttentionMetadata(self.slot_mapping, spans, decode, self.block_size, self.paged, packed)
        return self._windowed[window]


def _causal(length: int, count: int, device: torch.device) -> Tensor | None:
    """Causal mask aligned to the lower right: the last new token attends to every position."""
    if count == 1:
        return None
    return torch.ones(count, length, dtype=torch.bool, device=device).tril(length - count)


def _packed(spans: list[QuerySpan], decode: list[tuple[Tensor, Tensor]], block_size: int) -> PackedSpans | None:
    """The spans that share no decode call; None if there are none."""
    rest = spans[sum(len(slots) for slots, _ in decode) :]
    return PackedSpans.of(rest, block_size) if rest else None


def _shared_decode(spans: list[QuerySpan], block_size: int) -> list[tuple[Tensor, Tensor]]:
    """Cut the decode tokens, in order, into calls of at most ``MAX_GATHERED`` positions, or of one sequence."""
    groups: list[list[QuerySpan]] = []
    longest = 0
    for span in (span for span in spans if span.num_queries == 1):
        longest = max(longest, span.length - span.start)
        if not groups or longest * (len(groups[-1]) + 1) > MAX_GATHERED:
            groups.append([])
            longest = span.length - span.start
        groups[-1].append(span)
    return [_padded_decode(group, block_size) for group in groups]


def _padded_decode(decode: list[QuerySpan], block_size: int) -> tuple[Tensor, Tensor]:
    """Slots (B, S) of the decode tokens' sequences, at least one, and their validity mask.

    Padding repeats a sequence's own first slot, so that no row reads another sequence's values.
    """
    tables = torch.nn.utils.rnn.pad_sequence([span.block_table for span in decode], batch_first=True)
    starts, lengths = upload([(span.start, span.length) for span in decode], tables.device)[:, :, None].unbind(1)
    positions = starts + torch.arange(max(span.length - span.start for span in decode), device=tables.device)
    valid = positions < lengths
    positions = torch.where(valid, positions, starts)
    return tables.gather(1, positions // block_size) * block_size + positions % block_size, valid
