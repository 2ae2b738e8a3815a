"""SFT: conversations whose assistant turns are the targets. With ``bumblebee.LanguageModeling`` this is supervised fine-tuning.

Records are in Alpaca, ShareGPT or OpenAI format, see conversations.py; the chat template of the tokenizer folder renders them.
Conversations are packed whole into windows, or padded in batches of similar length. With a chat template that renders earlier
turns differently when others follow, such as Qwen3's, a conversation becomes several sequences (chat_template.py).
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from bumblebee.datamodule import Batch
from bumblebee.utils.formatting import number, plural
from datamodules.collate import PackedDataset, PaddedDataset, collate_rows, padded_width
from datamodules.mixture import Files
from datamodules.packing import Chunks, TooLong, fit_sequences, pack
from datamodules.token_cache import Segment, TokenCache
from datamodules.token_datamodule import TokenDataModule
from datamodules.tokenize import ConversationTokenizer


class SFT(TokenDataModule[list[Segment], PackedDataset | PaddedDataset]):
    """Conversations.

    Args:
        files: a path or glob of .json, .jsonl and .parquet files, or a list of them and of {path, weight} entries, where
            weight is how often each conversation occurs in an epoch (a fraction selects that share of them).
        tokenizer: folder with tokenizer.json, and optionally a chat template; the default is ChatML.
        max_length: tokens in a window or row.
        train_on: train on "all" assistant turns, or only on the "last" of each conversation. A template that rewrites earlier
            turns, such as Qwen3's, gets a sequence for each turn that it rewrites.
        system: system prompt for conversations that do not have one; null adds none.
        too_long: what to do with conversations that do not fit: drop them, keep_start, keep_end, or split them.
        packing: fill windows with several conversations that do not attend to each other; false pads each to the longest of
            its batch.
        validation_files: held-out files.
        validation_ratio: share of the conversations to hold out if there are no such files; equal ones are held out together.
        deduplicate: keep one of the conversations that differ in whitespace only.
        on_bad_record: "stop", or "skip" to omit bad records and count them.
        cache_dir: where tokens are kept between runs; by default $BUMBLEBEE_CACHE or ~/.cache/bumblebee.
        chat_template: path of a Jinja file, or "chatml", to use instead of the folder's template; saved with the model.

    Raises:
        ValueError: a number is out of range, or the folder has no tokenizer.
    """

    record_noun = "conversations"

    train: PackedDataset | PaddedDataset
    validation: PackedDataset | PaddedDataset | None = None

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
        chat_template: str | None = None,
    ) -> None:
        super().__init__(
            files, tokenizer, max_length, validation_files, validation_ratio, deduplicate, on_bad_record, cache_dir
        )
        self.chat_template = chat_template
        self.train_on, self.system = train_on, system
        self.too_long, self.packing = too_long, packing

    def setup(self, seed: int) -> None:
        """Tokenize, hold out, fit into windows or rows."""
        super().setup(seed)
        self.stop_ids = self.tokenizer.chat_template.end_of_turn_ids
        self.lengths = None if self.packing else chunks_of(self.train).lengths

    def record_tokenizer(self) -> ConversationTokenizer:
        """Conversations to ids."""
        return ConversationTokenizer(self.tokenizer_folder, self.tokenizer, self.system, self.train_on)

    def make_dataset(self, cache: TokenCache, samples: np.ndarray) -> PackedDataset | PaddedDataset:
        """Packed windows, or rows of one conversation."""
        chunks = fit_sequences(cache, cache.sequences_of(samples), self.max_length, self.too_long)
        if not self.packing:
            return PaddedDataset(cache, chunks)
        return PackedDataset(cache, pack(chunks.starts, chunks.ends, self.max_length), chunks)

    def collate(self, samples: list[list[Segment]]) -> Batch:
        """Samples -> ``input_ids``, ``labels``, ``position_ids``, each (B, T) int64.

        T is max_length with packing, otherwise the length of the longest sample, rounded up.
        """
        return collate_rows(samples, self.max_length if self.packing else padded_width(samples), self.pad_token_id)

    def summary(self) -> dict[str, object]:
        """Conversations, targets, omitted samples, and how full the windows are."""
        lines = super().summary()
        chunks = chunks_of(self.train)
        sequences = len(self.cache.sequences_of(self.epoch_samples))
        if sequences > len(self.epoch_samples):
            lines["sequences"] = f"{number(sequences)}: the chat template renders earlier turns differently when others follow"
        targets, tokens = int(chunks.targets.sum()), int(chunks.lengths.sum())
        lines["trained tokens"] = f"{number(targets)} of {number(tokens)} ({targets / tokens:.1%})"
        if isinstance(self.train, PackedDataset):
            lines["windows"] = (
                f"{number(len(self.train))} of {number(self.max_length)} tokens, {self.train.windows.efficiency:.1%} full"
            )
        else:
            lines["samples"] = f"{number(len(self.train))} of at most {number(self.max_length)} tokens, padded, by length"
        if self.validation is not None:
            held_out = int(chunks_of(self.validation).targets.sum())
            lines["held out"] = f"{plural(len(self.held_out), 'conversation')}, {plural(held_out, 'trained token')}"
        return lines

    def omitted(self, dataset: PackedDataset | PaddedDataset) -> dict[str, int | str]:
        """See the base class."""
        done = {"drop": "dropped", "keep_start": "cut at the end", "keep_end": "cut at the beginning", "split": "split"}
        chunks = chunks_of(dataset)
        lines: dict[str, int | str] = {}
        if chunks.too_long:
            lines[f"longer than max_length {self.max_length}"] = f"{number(chunks.too_long)} {done[self.too_long]}"
        if chunks.without_targets:
            lines["without a target"] = f"{chunks.without_targets} dropped"
        return lines


def chunks_of(dataset: PackedDataset | PaddedDataset) -> Chunks:
    """The chunks of a dataset of conversations."""
    assert dataset.chunks is not None
    return dataset.chunks
