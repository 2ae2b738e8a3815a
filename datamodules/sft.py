"""SFT: conversations, of which the assistant's turns are trained. With ``bumblebee.LanguageModeling`` this is fine-tuning.

Records are in Alpaca's, ShareGPT's or OpenAI's format, see ``conversations.py``; the tokenizer folder's chat template makes
the ids. Conversations are packed into windows, whole, or batched with others of similar length.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from bumblebee.datamodule import Batch
from datamodules.collate import Packed, Single, tensors, width_of
from datamodules.mixture import Files
from datamodules.packing import pack
from datamodules.token_cache import Piece, TokenCache
from datamodules.token_data import TokenData
from datamodules.tokenize_chat import ConversationEncoder
from datamodules.truncation import TooLong, fitted


class SFT(TokenData):
    """Conversations.

    Args:
        files: a path or glob of .json, .jsonl and .parquet files, or a list of them and of {path, weight} entries, where
            weight is how often each conversation comes in an epoch (a part of 1: that share of them).
        tokenizer: folder with tokenizer.json, and perhaps a chat template; without one it is ChatML.
        max_length: tokens in a window or row.
        train_on: "all" turns of the assistant, or only the "last" of each conversation.
        system: system prompt of conversations that bring none; null adds none.
        too_long: what to do with conversations that do not fit: drop them, keep_start, keep_end, or split them.
        packing: fill windows with several conversations, kept apart; false pads each to the longest of its batch.
        validation_files: held-out files.
        validation_ratio: share of the conversations to hold out where there are no such files; equal ones are held out
            together.
        deduplicate: keep one of the conversations that differ in white space only.
        on_bad_record: "stop", or "skip" to leave bad records out and count them.
        cache_dir: where tokens are kept between runs; by default $BUMBLEBEE_CACHE or ~/.cache/bumblebee.

    Raises:
        ValueError: a number out of its range, or a folder without tokenizer.
    """

    records_are = "conversations"

    def __init__(
        self,
        files: Files,
        tokenizer: str,
        max_length: int = 1024,
        train_on: Literal["all", "last"] = "all",
        system: str | None = None,
        too_long: TooLong = "drop",
        packing: bool = True,
        validation_files: str | list[str] | None = None,
        validation_ratio: float = 0.0,
        deduplicate: bool = False,
        on_bad_record: Literal["stop", "skip"] = "stop",
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(
            files, tokenizer, max_length, validation_files, validation_ratio, deduplicate, on_bad_record, cache_dir
        )
        self.train_on, self.system = train_on, system
        self.too_long, self.packing = too_long, packing

    def setup(self, seed: int) -> None:
        """Tokenise, hold out, fit into windows or rows."""
        super().setup(seed)
        self.stop_ids = [self.tokenizer.chat_template.end_of_turn_id]
        train: Any = self.train
        self.lengths = None if self.packing else train.pieces.lengths

    def encoder(self) -> ConversationEncoder:
        """Conversations to ids."""
        return ConversationEncoder(self.tokenizer_folder, self.tokenizer, self.system, self.train_on)

    def samples(self, cache: TokenCache, numbers: np.ndarray) -> Packed | Single:
        """Windows or rows."""
        pieces = fitted(cache, numbers, self.max_length, self.too_long)
        if not self.packing:
            return Single(cache, pieces)
        return Packed(cache, pack(pieces.starts, pieces.ends, self.max_length), pieces)

    def collate(self, samples: list[list[Piece]]) -> Batch:
        """Samples -> ``input_ids``, ``labels``, ``position_ids``, each (B, T) int64.

        T is max_length with packing, otherwise the longest sample's length, rounded up.
        """
        return tensors(samples, self.max_length if self.packing else width_of(samples), self.pad_token_id)

    # -- for people ----------------------------------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """Conversations, trained tokens, what was left out, how full windows are."""
        train: Any = self.train
        lines = super().summary()
        targets, tokens = int(train.pieces.targets.sum()), int(train.pieces.lengths.sum())
        lines["trained tokens"] = f"{targets} of {tokens} ({targets / tokens:.1%})"
        if self.packing:
            lines["windows"] = f"{len(train)} of {self.max_length} tokens, {train.windows.efficiency:.1%} full"
        else:
            lines["samples"] = f"{len(train)} of at most {self.max_length} tokens, padded, by length"
        if self.validation is not None:
            held_out: Any = self.validation
            lines["held out"] = f"{len(self.held_out)} conversations, {int(held_out.pieces.targets.sum())} trained tokens"
        return lines

    def left_out(self, samples: Packed | Single) -> dict[str, Any]:
        """See the base class."""
        done = {"drop": "dropped", "keep_start": "cut at the end", "keep_end": "cut at the beginning", "split": "split"}
        pieces = samples.pieces
        assert pieces is not None
        lines = (
            {f"longer than max_length {self.max_length}": f"{pieces.too_long} {done[self.too_long]}"} if pieces.too_long else {}
        )
        if pieces.without_targets:
            lines["without a target"] = f"{pieces.without_targets} dropped"
        return lines
