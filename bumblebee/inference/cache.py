"""The key-value cache: what attention has computed of earlier tokens, for a batch of sequences of different lengths.

Row b's token at position p has its keys and values at place p of the row. A query at position p sees places 0 to p, so what
lies behind (the padding of a shorter prompt) is never looked at, and is overwritten as the row grows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bumblebee.config import BumblebeeConfig


class LayerCache:
    """Keys and values of one layer, (B, capacity, K, D) each."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.rows = torch.arange(shape[0], device=device)[:, None]

    def place(self, position_ids: Tensor, used: int) -> None:
        """Where the next ``update`` writes: (B, T) positions, the largest of which is ``used`` - 1."""
        self.position_ids, self.used = position_ids, used

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """``k``, ``v`` (B, T, K, D) of the new positions -> (B, used, K, D) of all."""
        self.keys[self.rows, self.position_ids] = k
        self.values[self.rows, self.position_ids] = v
        return self.keys[:, : self.used], self.values[:, : self.used]


class KVCache:
    """One LayerCache for each layer of a model.

    Args:
        config: the model's.
        batch: rows.
        capacity: positions of a row.
        dtype: of keys and values: the model's.
        device: where.
    """

    def __init__(self, config: BumblebeeConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        assert config.head_dim is not None
        shape = (batch, capacity, config.num_key_value_heads, config.head_dim)
        self.layers = [LayerCache(shape, dtype, device) for _ in range(config.num_hidden_layers)]

    def at(self, position_ids: Tensor, used: int) -> list[LayerCache]:
        """The layer caches, ready for a forward pass over tokens at these positions; see ``LayerCache.place``."""
        for layer in self.layers:
            layer.place(position_ids, used)
        return self.layers
