"""Attention over the paged KV cache inside ``batch_invariant``: tokens of a step do not affect each other's results.

Windows and masks only hide keys here: chunks of keys begin at position 0 of each sequence, whatever its tokens attend to.

Shapes: N tokens of the step, B decode tokens, S positions of a sequence, H query heads, K key-value heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bumblebee.inference.attention_metadata import AttentionMetadata
from bumblebee.nn.batch_invariant import attention


def attend_invariant(q: Tensor, keys: Tensor, values: Tensor, metadata: AttentionMetadata, window: int | None) -> list[Tensor]:
    """Attention of a step's tokens, whose keys and values are stored already.

    Args:
        q: (N, H, D).
        keys: (blocks, block_size, K, D).
        values: like ``keys``.
        metadata: of the step, for no window.
        window: positions that a token attends to, its own included; None for all.

    Returns:
        Parts of (N, H, D), in order.
    """
    outputs: list[Tensor] = []
    shared = 0  # decode tokens that share calls
    for slots, valid in metadata.decode:
        if window is not None:
            positions = torch.arange(slots.shape[1], device=slots.device)
            valid = valid & (positions >= valid.sum(dim=1, keepdim=True) - window)
        k, v = (x.flatten(0, 1).index_select(0, slots.flatten()).unflatten(0, slots.shape) for x in (keys, values))
        outputs.append(attention(q[shared : shared + len(slots), None], k, v, valid[:, None])[:, 0])
        shared += len(slots)
    for span in metadata.spans[shared:]:
        k, v = (x.index_select(0, span.block_table).flatten(0, 1)[None, : span.length] for x in (keys, values))
        own = q[None, span.offset : span.offset + span.num_queries]
        outputs.append(attention(own, k, v, _visible(span.num_queries, span.length, window, q.device))[0])
    return outputs


def _visible(queries: int, length: int, window: int | None, device: torch.device) -> Tensor:
    """Mask (1, queries, length) of the last queries of a sequence."""
    causal = torch.ones(1, queries, length, dtype=torch.bool, device=device).tril(length - queries)
    return causal if window is None else causal.triu(length - queries - window + 1)
