"""Preferences: prompts with two answers, one of which is preferred.

Records are in Alpaca, ShareGPT or OpenAI format with ``chosen`` and ``rejected``, see conversations.py. A batch has two rows
for each pair: 2i is prompt and chosen answer, 2i + 1 the same prompt and the rejected answer.
"""

from __future__ import annotations

import numpy as np
import torch

from bumblebee.datamodule import Batch
from bumblebee.utils.formatting import number, plural
from datamodules.answer_rows import TooLong, fit_answers
from datamodules.answers import AnswerDataModule, AnswerDataset
from datamodules.collate import collate_rows, padded_width
from datamodules.token_cache import Segment, TokenCache
from datamodules.tokenize import PreferenceTokenizer

# Index among the training samples, margin, prompt + chosen and prompt + rejected answer.
Pair = tuple[int, float, Segment, Segment]


class PairDataset(AnswerDataset[Pair]):
    """Pairs that fit into rows of ``max_length`` positions.

    Args:
        cache: samples of two sequences.
        samples: indices of its samples.
        max_length: positions in a row; a sequence of n tokens has n - 1.
        too_long: "drop" pairs that do not fit, or "keep_end": cut as many tokens as necessary from the left of the prompt, the
            same in both rows. Answers stay whole, with at least one token of the prompt before them; a pair that does not fit
            even then is dropped.
    """

    def __init__(self, cache: TokenCache, samples: np.ndarray, max_length: int, too_long: TooLong) -> None:
        rows = fit_answers(cache, np.stack([2 * samples, 2 * samples + 1]), max_length, too_long)
        self.cache, self.samples = cache, samples[rows.fits]
        self.starts, self.row_lengths, self.targets = rows.starts, rows.lengths, int(rows.answers.sum())
        self.dropped, self.truncated = rows.dropped, rows.truncated
        assert cache.values is not None
        self.margins = cache.values[2 * self.samples]
        self.has_margins = not np.isnan(self.margins).all()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Pair:  # type: ignore[override]
        chosen, rejected = (self.cache.segment(start, length) for start, length in self.spans(index))
        return int(index), float(self.margins[index]), chosen, rejected

    def spans(self, index: int) -> list[tuple[int, int]]:
        """See the base class."""
        return list(zip(self.starts[:, index].tolist(), self.row_lengths[:, index].tolist(), strict=True))

    def layout(self) -> tuple[np.ndarray, ...]:
        """See the base class."""
        return self.starts, self.row_lengths

    def origin(self, index: int) -> str:
        """See the base class."""
        return self.cache.origin(int(self.samples[index]))


class Preferences(AnswerDataModule[Pair, PairDataset]):
    """Preference pairs.

    Args:
        files: a path or glob of .json, .jsonl and .parquet files, or a list of them and of {path, weight} entries, where
            weight is how often each pair occurs in an epoch (a fraction selects that share of them).
        tokenizer: folder with tokenizer.json, and optionally a chat template; the default is ChatML.
        max_length: tokens in a row.
        system: system prompt for prompts that do not have one; null adds none.
        too_long: drop pairs that do not fit, or keep_end: cut prompts from the left. Answers are never cut.
        validation_files: held-out files.
        validation_ratio: share of the pairs to hold out if there are no such files; equal ones are held out together.
        deduplicate: keep one of the pairs that differ in whitespace only.
        on_bad_record: "stop", or "skip" to omit bad records and count them.
        cache_dir: where tokens are kept between runs; by default $BUMBLEBEE_CACHE or ~/.cache/bumblebee.
        chat_template: path of a Jinja file, or "chatml", to use instead of the folder's template; saved with the model.

    Raises:
        ValueError: a number is out of range, or the folder has no tokenizer.
    """

    record_noun = "pairs"

    train: PairDataset
    validation: PairDataset | None = None

    def setup(self, seed: int) -> None:
        """Tokenize, hold out, fit into rows."""
        super().setup(seed)
        self.lengths = self.train.row_lengths.max(axis=0)

    def record_tokenizer(self) -> PreferenceTokenizer:
        """Prompts and answers to ids."""
        return PreferenceTokenizer(self.tokenizer_folder, self.tokenizer, self.system)

    def make_dataset(self, cache: TokenCache, samples: np.ndarray) -> PairDataset:
        """The pairs that fit."""
        return PairDataset(cache, samples, self.max_length, self.too_long)

    def collate(self, samples: list[Pair]) -> Batch:
        """Pairs -> ``input_ids``, ``labels``, ``position_ids``, each (2 * pairs, T) int64, and ``index`` (pairs,) int64.

        If any training pair has a margin, also ``margin`` (pairs,) fp32, which is 0 for the others. Labels mark the tokens of
        the answers. T is the length of the longest row, rounded up.
        """
        rows = [[segment] for *_, chosen, rejected in samples for segment in (chosen, rejected)]
        batch = collate_rows(rows, padded_width(rows), self.pad_token_id)
        batch["index"] = torch.tensor([index for index, *_ in samples])
        if self.train.has_margins:
            batch["margin"] = torch.tensor([margin for _, margin, *_ in samples], dtype=torch.float32).nan_to_num()
        return batch

    def summary(self) -> dict[str, object]:
        """Pairs, tokens of the answers, omitted pairs."""
        lines = super().summary()
        tokens = int(self.train.row_lengths.sum())
        lines["answer tokens"] = f"{number(self.train.targets)} of {number(tokens)} ({self.train.targets / tokens:.1%})"
        if self.validation is not None:
            lines["held out"] = plural(len(self.validation), "pair")
        return lines
