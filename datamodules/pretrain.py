"""Pretrain: plain text in packed windows.

Each document ends in a trained end-of-text token. A window holds pieces of several documents that do not attend to each
other. See ``packing.py``, ``rows.py`` and ``token_cache.py``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bumblebee.datamodule import Batch
from datamodules.collate import Packed, tensors
from datamodules.packing import pack
from datamodules.token_cache import Piece, TokenCache
from datamodules.token_data import TokenData
from datamodules.tokenize import TextEncoder


class Pretrain(TokenData):
    """Text files, packed: records are {"text": ...}."""

    def encoder(self) -> TextEncoder:
        """Text to ids.

        Raises:
            ValueError: the tokenizer knows no end of a text.
        """
        if self.tokenizer.eos_token_id is None:
            raise ValueError(f"{self.tokenizer_folder}: tokenizer_config.json names no eos_token to end documents with")
        return TextEncoder(self.tokenizer_folder, self.tokenizer)

    def samples(self, cache: TokenCache, numbers: np.ndarray) -> Packed:
        """Windows."""
        return Packed(cache, pack(cache.begins[numbers], cache.ends[numbers], self.max_length))

    def collate(self, samples: list[list[Piece]]) -> Batch:
        """Windows -> ``input_ids``, ``labels``, ``position_ids``, each (B, max_length) int64."""
        return tensors(samples, self.max_length, self.pad_token_id)

    def summary(self) -> dict[str, Any]:
        """Documents, tokens, windows."""
        train: Any = self.train
        validation: Any = self.validation
        lines = super().summary()
        lines["targets"] = int(train.windows.lengths.sum())
        lines["windows"] = f"{len(train)} of {self.max_length} tokens, {train.windows.efficiency:.1%} full"
        if validation is not None:
            targets = int(validation.windows.lengths.sum())
            lines["held out"] = f"{len(self.held_out)} documents, {targets} targets, {len(validation)} windows"
        return lines
