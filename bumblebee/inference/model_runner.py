"""ModelRunner: one forward pass over a step's chunks, a flat row of tokens in, the logits that are needed out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bumblebee.inference.attention_metadata import AttentionMetadata
from bumblebee.inference.block_tables import BlockTables
from bumblebee.inference.cuda_graphs import DecodeGraphs, can_capture, graph_capture
from bumblebee.inference.decode_attention import PagedDecode, select_decode_kernel
from bumblebee.inference.kv_cache import KVCache
from bumblebee.inference.placement.device_map import layer_devices
from bumblebee.inference.prefill_attention import can_pack
from bumblebee.inference.sequence import ScheduledChunk
from bumblebee.inference.transfers import upload_lists
from bumblebee.models.base import LanguageModel

MAX_CPU_PADDING = 2.0  # see AttentionMetadata.build


class ModelRunner:
    """A model with its KV cache.

    Args:
        model: in evaluation mode.
        num_blocks: blocks of the cache.
        block_size: positions per block.
        max_running: sequences of a step at most.
        cuda_graphs: capture decode steps as CUDA graphs where that is possible.
    """

    def __init__(
        self, model: LanguageModel, num_blocks: int, block_size: int, max_running: int, cuda_graphs: bool = True
    ) -> None:
        self.model = model
        weight = next(model.parameters())
        self.kv_cache = KVCache(model.config, num_blocks, block_size, weight.dtype, layer_devices(model))
        width = min(num_blocks, -(-model.config.max_position_embeddings // block_size))
        assert model.config.head_dim is not None
        self.decode_kernel = select_decode_kernel(self.kv_cache.device, weight.dtype, model.config.head_dim)
        self.pack = can_pack(self.kv_cache.device, weight.dtype, model.config.head_dim)
        self.block_tables = BlockTables(max_running, width, self.kv_cache.device)
        self.graphs = self._make_graphs(max_running) if cuda_graphs else None
        self.max_padding = MAX_CPU_PADDING if weight.device.type == "cpu" else math.inf

    @torch.inference_mode()
    def run(self, chunks: Sequence[ScheduledChunk]) -> tuple[Tensor, Tensor]:
        """Compute the chunks, decode first.

        Returns:
            Logits (n, V) after the n chunks that sample, and logits (m, V) for the m tokens that are scored.
        """
        token_ids: list[int] = []
        positions: list[int] = []
        sampled: list[int] = []
        scored: list[int] = []
        for chunk in chunks:
            begin, end = chunk.sequence.num_computed, chunk.sequence.num_computed + chunk.num_tokens
            first_scored = len(token_ids) + chunk.first_scored
            scored += range(first_scored, first_scored + len(chunk.scored))
            token_ids += chunk.sequence.token_ids[begin:end]
            positions += range(begin, end)
            if chunk.samples:
                sampled.append(len(token_ids) - 1)
        rows = self.block_tables.update([chunk.sequence for chunk in chunks])
        if self.graphs is not None and len(token_ids) == len(sampled) and not scored:
            graph_logits = self.graphs.run(token_ids, positions, rows)
            if graph_logits is not None:
                return graph_logits, graph_logits[:0]
        count = self._num_paged(chunks)
        lengths = [position + 1 for position in positions[:count]]
        input_ids, position_ids, logits_at, paged_rows, paged_lengths = upload_lists(
            [token_ids, positions, sampled + scored, rows[:count], lengths], self.kv_cache.device
        )
        layers = self.kv_cache.prepare(self._metadata(chunks[count:], rows[count:], self._paged(paged_rows, paged_lengths)))
        logits: Tensor = self.model(input_ids[None], position_ids[None], cache=layers, logits_at=logits_at)
        return logits[: len(sampled)], logits[len(sampled) :]

    def _make_graphs(self, max_running: int) -> DecodeGraphs | None:
        device, capture = self.kv_cache.device, graph_capture(self.kv_cache.device)
        devices = [layer.keys.device for layer in self.kv_cache.layers]
        if capture is None or self.decode_kernel is None or not can_capture(self.model, devices):
            return None
        return DecodeGraphs(self._decode, max_running, device, capture, self._addresses)

    def _decode(self, inputs: Tensor) -> Tensor:
        """One token of each sequence, without the host: see ``DecodeGraphs``."""
        token_ids, positions, rows = inputs
        paged = self._paged(rows, positions + 1)
        layers = self.kv_cache.prepare(AttentionMetadata(rows[:0], [], [], self.kv_cache.block_size, paged))
        logits: Tensor = self.model(token_ids[None], positions.clamp(min=0)[None], cache=layers)
        return logits[0]

    def _addresses(self) -> tuple[int, ...]:
        tensors = [tensor for layer in self.kv_cache.layers for tensor in (layer.keys, layer.values)]
        return tuple(tensor.data_ptr() for tensor in [self.block_tables.tensor, *tensors])

    def _num_paged(self, chunks: Sequence[ScheduledChunk]) -> int:
        """How many of the chunks, which are sorted, the paged kernel computes: those of one token."""
        return 0 if self.decode_kernel is None else sum(chunk.num_tokens == 1 for chunk in chunks)

    def _paged(self, rows: Tensor, lengths: Tensor) -> PagedDecode | None:
        if self.decode_kernel is None or not len(rows):
            return None
        return PagedDecode(self.decode_kernel, self.block_tables.tensor, rows, lengths)

    def _metadata(self, chunks: Sequence[ScheduledChunk], rows: Sequence[int], paged: PagedDecode | None) -> AttentionMetadata:
        return AttentionMetadata.build(
            [chunk.sequence.block_table for chunk in chunks],
            [chunk.sequence.num_computed + chunk.num_tokens for chunk in chunks],
            [chunk.num_tokens for chunk in chunks],
            self.kv_cache.block_size,
            self.kv_cache.device,
            self.max_padding,
            [self.block_tables.of(row, len(chunk.sequence.block_table)) for row, chunk in zip(rows, chunks, strict=True)],
            paged,
            self.pack,
        )
