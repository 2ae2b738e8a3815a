"""Preferences: prompts with two answers, of which one is better.

Records are in Alpaca's, ShareGPT's or OpenAI's format with ``chosen`` and ``rejected``, see ``conversations.py``. A batch has
two rows for each pair: 2i prompt and chosen answer, 2i + 1 the same prompt and the rejected one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from bumblebee.datamodule import Batch
from datamodules.collate import tensors, width_of
from datamodules.mixture import Files
from datamodules.token_cache import Piece, TokenCache
from datamodules.token_data import TokenData
from datamodules.tokenize_chat import PreferenceEncoder

Pair = tuple[int, Piece, Piece]  # its place among the training samples; prompt and chosen, prompt and rejected answer


class Pairs(Sequence):
    """Pairs that fit into ``max_length`` places.

    Args:
        cache: of groups of two.
        numbers: of its samples.
        max_length: places of a row; a sequence of n tokens takes n - 1.
        too_long: "drop" pairs that do not fit, or "keep_end": cut as much as has to be from the left of the prompt, in both
            rows the same. The answers stay whole, and a token of the prompt before them; where that does not fit, the pair
            is dropped.
    """

    def __init__(self, cache: TokenCache, numbers: np.ndarray, max_length: int, too_long: Literal["drop", "keep_end"]) -> None:
        rows = np.stack([2 * numbers, 2 * numbers + 1])
        tokens, answers = (cache.ends - cache.begins)[rows], np.asarray(cache.targets)[rows]
        prompts = tokens[0] - answers[0]
        assert (prompts == tokens[1] - answers[1]).all()
        over = np.maximum(tokens.max(axis=0) - 1 - max_length, 0)
        fits = over < prompts if too_long == "keep_end" else over == 0
        self.cache, self.numbers = cache, numbers[fits]
        self.starts = (cache.begins[rows] + over)[:, fits]
        self.row_lengths = (tokens - 1 - over)[:, fits]
        self.dropped, self.cut = int(np.sum(~fits)), int(np.sum(over[fits] > 0))
        self.targets = int(answers[:, fits].sum())

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Pair:
        places = zip(self.starts[:, index].tolist(), self.row_lengths[:, index].tolist(), strict=True)
        chosen, rejected = (self.cache.piece(start, length) for start, length in places)
        return int(index), chosen, rejected

    def origin(self, index: int) -> str:
        """FILE:LINE of a pair."""
        return self.cache.origin(int(self.numbers[index]))


class Preferences(TokenData):
    """Preference pairs.

    Args:
        files: a path or glob of .json, .jsonl and .parquet files, or a list of them and of {path, weight} entries, where
            weight is how often each pair comes in an epoch (a part of 1: that share of them).
        tokenizer: folder with tokenizer.json, and perhaps a chat template; without one it is ChatML.
        max_length: tokens in a row.
        system: system prompt of prompts that bring none; null adds none.
        too_long: drop pairs that do not fit, or keep_end: cut prompts from the left. Answers are never cut.
        validation_files: held-out files.
        validation_ratio: share of the pairs to hold out where there are no such files; equal ones are held out together.
        deduplicate: keep one of the pairs that differ in white space only.
        on_bad_record: "stop", or "skip" to leave bad records out and count them.
        cache_dir: where tokens are kept between runs; by default $BUMBLEBEE_CACHE or ~/.cache/bumblebee.

    Raises:
        ValueError: a number out of its range, or a folder without tokenizer.
    """

    records_are = "pairs"

    def __init__(
        self,
        files: Files,
        tokenizer: str,
        max_length: int = 1024,
        system: str | None = None,
        too_long: Literal["drop", "keep_end"] = "drop",
        validation_files: str | list[str] | None = None,
        validation_ratio: float = 0.0,
        deduplicate: bool = False,
        on_bad_record: Literal["stop", "skip"] = "stop",
        cache_dir: str | None = None,
    ) -> None:
        super().__init__(
            files, tokenizer, max_length, validation_files, validation_ratio, deduplicate, on_bad_record, cache_dir
        )
        self.system, self.too_long = system, too_long

    def setup(self, seed: int) -> None:
        """Tokenise, hold out, fit into rows."""
        super().setup(seed)
        self.stop_ids = [self.tokenizer.chat_template.end_of_turn_id]
        train: Any = self.train
        self.lengths = train.row_lengths.max(axis=0)

    def encoder(self) -> PreferenceEncoder:
        """Prompts and answers to ids."""
        return PreferenceEncoder(self.tokenizer_folder, self.tokenizer, self.system)

    def samples(self, cache: TokenCache, numbers: np.ndarray) -> Pairs:
        """Those that fit."""
        return Pairs(cache, numbers, self.max_length, self.too_long)

    def collate(self, samples: list[Pair]) -> Batch:
        """Pairs -> ``input_ids``, ``labels``, ``position_ids``, each (2 * pairs, T) int64, and ``index`` (pairs,) int64.

        Labels mark the answers' tokens. T is the longest row's length, rounded up.
        """
        rows = [[piece] for _, *pieces in samples for piece in pieces]
        batch = tensors(rows, width_of(rows), self.pad_token_id)
        return {**batch, "index": torch.tensor([index for index, *_ in samples])}

    def summary(self) -> dict[str, Any]:
        """Pairs, answers' tokens, what was left out."""
        train: Any = self.train
        lines = super().summary()
        tokens = int(train.row_lengths.sum())
        lines["answers' tokens"] = f"{train.targets} of {tokens} ({train.targets / tokens:.1%})"
        if self.validation is not None:
            lines["held out"] = f"{len(self.validation)} pairs"
        return lines

    def left_out(self, samples: Pairs) -> dict[str, Any]:
        """See the base class."""
        lines = {f"longer than max_length {self.max_length}": f"{samples.dropped} dropped"} if samples.dropped else {}
        return {**lines, **({"prompts cut from the left": samples.cut} if samples.cut else {})}
