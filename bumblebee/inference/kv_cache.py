"""The paged KV cache: keys and values of every layer in blocks, and the attention over them.

On a GPU decode tokens are computed by a kernel that reads the blocks in place (``bumblebee/nn/paged_attention.py``). Otherwise
keys and values are gathered first. A decode token then attends with the query heads that share a key-value head folded into the
query axis: keys and values are read once, and no mask is needed.

Shapes: N tokens of the step, S positions of a sequence, H query heads, K key-value heads, D head dimension.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bumblebee.config import BumblebeeConfig, TransformerConfig, head_width
from bumblebee.hardware.memory_stats import free_gpu_memory
from bumblebee.inference.attention_metadata import AttentionMetadata, QuerySpan
from bumblebee.inference.engine_config import EngineConfig
from bumblebee.inference.invariant_attention import attend_invariant
from bumblebee.inference.placement.device_map import layer_devices
from bumblebee.models.base import LanguageModel
from bumblebee.nn.batch_invariant import is_batch_invariant

BLOCK_SIZE = 16  # positions per block
GPU_MEMORY_FRACTION = 0.8  # of the free memory
MIN_CPU_BYTES = 2**29  # memory that is never written to is not allocated


class PagedLayerCache:
    """Keys and values of one layer, (blocks, block_size, K, D) each."""

    metadata: AttentionMetadata

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        # Uninitialised: a slot is written before it is read, and on a CPU untouched memory costs nothing.
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
        """Store the step's keys and values; each token attends to its sequence up to itself.

        Args:
            q: (1, N, H, D).
            k: (1, N, K, D).
            v: (1, N, K, D).
            window: positions that a token attends to, its own included; None for all.

        Returns:
            (1, N, H, D).
        """
        paged, outputs, first = self.metadata.paged, list[Tensor](), 0
        if paged is not None:
            first = len(paged.rows)
            new = q[0, :first], k[0, :first], v[0, :first]
            outputs.append(paged.kernel(*new, self.keys, self.values, paged.tables, paged.rows, paged.lengths, window))
        if first < q.shape[1]:
            outputs += self._attend_gathered(q, k[0, first:], v[0, first:], window)
        return (torch.cat(outputs) if len(outputs) > 1 else outputs[0])[None]

    def _attend_gathered(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> list[Tensor]:
        """Tokens that the paged kernel does not compute: ``q`` (1, N, H, D), and their keys and values (n, K, D)."""
        self.keys.flatten(0, 1).index_copy_(0, self.metadata.slot_mapping, k)
        self.values.flatten(0, 1).index_copy_(0, self.metadata.slot_mapping, v)
        if is_batch_invariant():
            return attend_invariant(q[0], self.keys, self.values, self.metadata, window)
        metadata = self.metadata.windowed(window)
        outputs: list[Tensor] = []
        shared = 0  # decode tokens that share calls
        for slots, valid in metadata.decode:
            outputs.append(self._attend_decode(q[0, shared : shared + len(slots)], slots, valid))
            shared += len(slots)
        if metadata.packed is not None:
            first = metadata.spans[shared].offset
            return [*outputs, metadata.packed.attend(q[0, first:], self.keys, self.values, window)]
        for span in metadata.spans[shared:]:
            outputs.append(self._attend_span(q[0, span.offset : span.offset + span.num_queries], span))
        return outputs

    def _attend_span(self, q: Tensor, span: QuerySpan) -> Tensor:
        """One sequence: ``q`` (num_queries, H, D) -> (num_queries, H, D)."""
        k, v = (x.index_select(0, span.block_table).flatten(0, 1)[span.start : span.length] for x in (self.keys, self.values))
        k, v = k.transpose(0, 1), v.transpose(0, 1)
        if span.mask is None:
            return scaled_dot_product_attention(q.view(1, len(k), -1, q.shape[-1]), k[None], v[None]).view(q.shape)
        # Query heads of a group read the same keys: expanded as a view, not copied.
        grouped = q.unflatten(1, (len(k), -1)).permute(1, 2, 0, 3)  # (K, H / K, num_queries, D)
        k, v = (x[:, None].expand(-1, grouped.shape[1], -1, -1) for x in (k, v))
        out = scaled_dot_product_attention(grouped, k, v, attn_mask=span.mask)
        return out.permute(2, 0, 1, 3).flatten(1, 2)

    def _attend_decode(self, q: Tensor, slots: Tensor, valid: Tensor) -> Tensor:
        """Decode tokens of B sequences: ``q`` (B, H, D) -> (B, H, D)."""
        # On a CPU index_select takes a sixth of the time of indexing with a tensor.
        k, v = (x.flatten(0, 1).index_select(0, slots.flatten()).unflatten(0, slots.shape) for x in (self.keys, self.values))
        k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, K, S, D)
        grouped = q.unflatten(1, (k.shape[1], -1))  # (B, K, H / K, D)
        return scaled_dot_product_attention(grouped, k, v, attn_mask=valid[:, None, None]).flatten(1, 2)


class KVCache:
    """One ``PagedLayerCache`` per layer of a model.

    Args:
        config: of the model.
        num_blocks: blocks per layer.
        block_size: positions per block.
        dtype: of keys and values: the model's.
        devices: of each layer.
    """

    def __init__(
        self, config: BumblebeeConfig, num_blocks: int, block_size: int, dtype: torch.dtype, devices: Sequence[torch.device]
    ) -> None:
        assert config.head_dim is not None
        shape = (num_blocks, block_size, config.num_key_value_heads, config.head_dim)
        self.layers = [PagedLayerCache(shape, dtype, device) for device in devices]
        self.block_size, self.device = block_size, devices[0]

    def prepare(self, metadata: AttentionMetadata) -> list[PagedLayerCache]:
        """Return the layer caches, set up for a forward pass over the step's tokens."""
        by_device = {device: metadata.to(device) for device in {layer.keys.device for layer in self.layers}}
        for layer in self.layers:
            layer.metadata = by_device[layer.keys.device]
        return self.layers


# -- size ----------------------------------------------------------------------------------------------------------------


def bytes_per_position(config: TransformerConfig, dtype: torch.dtype) -> int:
    """Bytes of one position's keys and values in all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_width(config) * dtype.itemsize


def num_blocks(model: LanguageModel, config: EngineConfig) -> int:
    """Number of blocks of an engine's cache.

    Without ``cache_tokens``: on a GPU, 80 % of the free memory; on a CPU, as much memory as the weights take and at least 512
    MiB. Never more than ``max_running`` sequences of full length can fill.

    Raises:
        ValueError: ``cache_tokens`` does not fit in memory.
    """
    if config.cache_tokens is not None:
        _check_fits(model, config.cache_tokens)
    return -(-(config.cache_tokens or _default_positions(model, config)) // BLOCK_SIZE)


def _default_positions(model: LanguageModel, config: EngineConfig) -> int:
    limit = model.config.max_position_embeddings * config.max_running
    fitting = min(_default_bytes(model, device) // size for device, size in _position_bytes(model).items())
    return min(limit, max(fitting, BLOCK_SIZE))


def _default_bytes(model: LanguageModel, device: torch.device) -> int:
    """Bytes of a device that the cache takes when ``cache_tokens`` is not set."""
    if device.type == "cuda":
        return int(GPU_MEMORY_FRACTION * free_gpu_memory(device))
    return max(MIN_CPU_BYTES, sum(weight.nbytes for weight in model.parameters() if weight.device == device))


def _position_bytes(model: LanguageModel) -> dict[torch.device, int]:
    """Bytes of one position on each device."""
    per_layer = bytes_per_position(model.config, next(model.parameters()).dtype) // model.config.num_hidden_layers
    return {device: per_layer * layers for device, layers in Counter(layer_devices(model)).items()}


def _check_fits(model: LanguageModel, cache_tokens: int) -> None:
    """Raise if the cache does not fit. A CPU would overcommit and kill the process when the memory is written to."""
    for device, size in _position_bytes(model).items():
        needed, total = cache_tokens * size, _total_bytes(device)
        if needed > total:
            raise ValueError(
                f"cache_tokens: {cache_tokens:,} positions take {needed / 2**30:,.1f} GiB on {device}, which has"
                f" {total / 2**30:,.1f} GiB: at most {total // size:,} fit"
            )


def _total_bytes(device: torch.device) -> int:
    """Free bytes of a GPU, or physical memory of the machine."""
    if device.type == "cuda":
        return free_gpu_memory(device)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
