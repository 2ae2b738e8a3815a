"""Pretrain: plain text in packed windows.

Each document ends with an end-of-text token, which is a target. A window holds chunks of several documents, which do not attend
to each other; see packing.py and collate.py.
"""

from __future__ import annotations

import numpy as np

from bumblebee.datamodule import Batch
from bumblebee.utils.formatting import number, plural
from datamodules.collate import PackedDataset, collate_rows
from datamodules.packing import pack
from datamodules.token_cache import Segment, TokenCache
from datamodules.token_datamodule import TokenDataModule
from datamodules.tokenize import TextTokenizer


class Pretrain(TokenDataModule[list[Segment], PackedDataset]):
    """Text files, packed. Records are {"text": ...}."""

    has_prompts = False
    train: PackedDataset
    validation: PackedDataset | None = None

    def record_tokenizer(self) -> TextTokenizer:
        """Text to ids.

        Raises:
            ValueError: the tokenizer has no end-of-text token.
        """
        if self.tokenizer.eos_token_id is None:
            raise ValueError(f"{self.tokenizer_folder}: tokenizer_config.json names no eos_token to end documents with")
        return TextTokenizer(self.tokenizer_folder, self.tokenizer)

    def make_dataset(self, cache: TokenCache, samples: np.ndarray) -> PackedDataset:
        """Packed windows."""
        return PackedDataset(cache, pack(cache.begins[samples], cache.ends[samples], self.max_length))

    def collate(self, samples: list[list[Segment]]) -> Batch:
        """Windows -> ``input_ids``, ``labels``, ``position_ids``, each (B, max_length) int64."""
        return collate_rows(samples, self.max_length, self.pad_token_id)

    def summary(self) -> dict[str, object]:
        """Documents, targets, windows."""
        lines = super().summary()
        lines["targets"] = int(self.train.windows.lengths.sum())
        lines["windows"] = (
            f"{number(len(self.train))} of {number(self.max_length)} tokens, {self.train.windows.efficiency:.1%} full"
        )
        if self.validation is not None:
            targets = int(self.validation.windows.lengths.sum())
            counts = {"document": len(self.held_out), "target": targets, "window": len(self.validation)}
            lines["held out"] = ", ".join(plural(count, noun) for noun, count in counts.items())
        return lines
