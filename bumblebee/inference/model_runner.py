"""ModelRunner: one forward pass over a step's chunks, a flat row of tokens in, logits of the tokens to sample out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bumblebee.inference.attention_metadata import AttentionMetadata
from bumblebee.inference.kv_cache import KVCache
from bumblebee.inference.placement.device_map import layer_devices
from bumblebee.inference.sequence import ScheduledChunk
from bumblebee.models.base import LanguageModel

MAX_CPU_PADDING = 2.0  # see AttentionMetadata.build


class ModelRunner:
    """A model with its KV cache.

    Args:
        model: in evaluation mode.
        num_blocks: blocks of the cache.
        block_size: positions per block.
    """

    def __init__(self, model: LanguageModel, num_blocks: int, block_size: int) -> None:
        self.model = model
        weight = next(model.parameters())
        self.kv_cache = KVCache(model.config, num_blocks, block_size, weight.dtype, layer_devices(model))
        self.max_padding = MAX_CPU_PADDING if weight.device.type == "cpu" else math.inf

    @torch.inference_mode()
    def run(self, chunks: Sequence[ScheduledChunk]) -> Tensor:
        """Compute the chunks, decode first; returns logits (n, V) after the n chunks that are their sequence's last."""
        token_ids: list[int] = []
        positions: list[int] = []
        last: list[int] = []
        for chunk in chunks:
            begin, end = chunk.sequence.num_computed, chunk.sequence.num_computed + chunk.num_tokens
            token_ids += chunk.sequence.token_ids[begin:end]
            positions += range(begin, end)
            if chunk.is_last:
                last.append(len(token_ids) - 1)
        device = self.kv_cache.device
        input_ids, position_ids, logits_at = (torch.tensor(x, device=device) for x in (token_ids, positions, last))
        layers = self.kv_cache.prepare(self._metadata(chunks))
        return self.model(input_ids[None], position_ids[None], cache=layers, logits_at=logits_at.long())

    def _metadata(self, chunks: Sequence[ScheduledChunk]) -> AttentionMetadata:
        return AttentionMetadata.build(
            [chunk.sequence.block_table for chunk in chunks],
            [chunk.sequence.num_computed + chunk.num_tokens for chunk in chunks],
            [chunk.num_tokens for chunk in chunks],
            self.kv_cache.block_size,
            self.kv_cache.device,
            self.max_padding,
        )
