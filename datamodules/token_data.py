"""TokenData: what all DataModules of files share: mixes, the token cache, held-out samples, duplicates, counts.

A subclass says how a record becomes ids (``encoder``), how ids become training samples (``samples``), and how these make a
batch (``collate``).
"""

from __future__ import annotations

import inspect
import os
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bumblebee.cache_dir import resolve_cache_dir
from bumblebee.datamodule import DataModule
from bumblebee.distributed import process_group
from bumblebee.distributed.local_main_first import local_main_first
from bumblebee.tokenizer.tokenizer import Tokenizer
from datamodules import record_files
from datamodules.cache_writer import build
from datamodules.mixture import Files, Mix
from datamodules.record_files import Record, RecordError
from datamodules.token_cache import TokenCache, cache_key, file_digest, is_complete, one_at_a_time, remove_leftovers
from datamodules.tokenize import Encoder
from datamodules.worker_pool import how_many

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


class TokenData(DataModule):
    """Samples from files of records, tokenised once.

    Args:
        files: a path or glob, or a list of them and of {path, weight} entries, where weight is how often each sample comes in
            an epoch (a part of 1: that share of the samples). Kinds are .json, .jsonl, .parquet, .txt and .md.
        tokenizer: folder with tokenizer.json.
        max_length: tokens in a window.
        validation_files: held-out files.
        validation_ratio: share of the samples to hold out where there are no such files; equal texts are held out together.
        deduplicate: keep one of the samples that differ in white space only.
        on_bad_record: "stop", or "skip" to leave bad records out and count them.
        cache_dir: where tokens are kept between runs; by default $BUMBLEBEE_CACHE or ~/.cache/bumblebee.

    Raises:
        ValueError: a number out of its range, or a folder without tokenizer.
    """

    records_are = "documents"

    cache: TokenCache  # of ``files``
    mix: Mix
    tokenizer: Tokenizer

    def __init__(
        self,
        files: Files,
        tokenizer: str,
        max_length: int = 1024,
        validation_files: str | list[str] | None = None,
        validation_ratio: float = 0.0,
        deduplicate: bool = False,
        on_bad_record: Literal["stop", "skip"] = "stop",
        cache_dir: str | None = None,
    ) -> None:
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        if not 0 <= validation_ratio < 1:
            raise ValueError(f"validation_ratio must be in [0, 1), got {validation_ratio}")
        if validation_ratio and validation_files:
            raise ValueError("validation_files and validation_ratio are both set: choose one")
        self.files, self.validation_files = files, validation_files
        self.max_length, self.validation_ratio = max_length, validation_ratio
        self.deduplicate, self.on_bad_record = deduplicate, on_bad_record
        self.cache_dir = resolve_cache_dir(cache_dir)
        self.tokenizer_folder = tokenizer

    @abstractmethod
    def encoder(self) -> Encoder:
        """From records to ids."""

    @abstractmethod
    def samples(self, cache: TokenCache, numbers: np.ndarray) -> Any:
        """From numbers of the cache's samples, some of them perhaps several times, to a sequence of training samples."""

    def setup(self, seed: int) -> None:
        """Tokenise (or find the cache), hold out, mix. See the class for what may be wrong."""
        self.tokenizer = Tokenizer.from_pretrained(self.tokenizer_folder)
        self.mix = Mix(self.files)
        self.cache = self.open_cache(self.mix)
        self.kept, self.held_out = self.split(self.cache)
        if not len(self.kept):
            held = f": all {len(self.held_out)} {self.records_are} are held out" if len(self.held_out) else ""
            raise ValueError(f"files: there is no text to train on in {self.files}{held}")
        self.chosen = self.mix.repeat(self.kept, self.cache.sources, self.cache.digests)
        self.train = self._some_samples("files", self.cache, self.chosen)
        if self.validation_files is not None:
            other = self.open_cache(Mix([*record_files.expand(self.validation_files)]))
            self.held_out = np.arange(len(other))
            self.validation = self._some_samples("validation_files", other, self.held_out)
        elif len(self.held_out):
            self.validation = self._some_samples("validation_ratio", self.cache, self.held_out)

    def _some_samples(self, option: str, cache: TokenCache, numbers: np.ndarray) -> Any:
        made = self.samples(cache, numbers)
        if not len(made):
            why = "".join(f"; {what}: {count}" for what, count in self.left_out(made).items())
            raise ValueError(f"{option}: none of {len(numbers)} {self.records_are} is left{why}")
        return made

    # -- tokens --------------------------------------------------------------------------------------------------------

    def open_cache(self, mix: Mix) -> TokenCache:
        """The tokens of some files, from the disk or tokenised now, by one rank of each machine."""
        encoder = self.encoder()
        with local_main_first() as first:
            folder = self.cache_dir / "tokens" / self.cache_name(mix, encoder)
            if first and not is_complete(folder):
                self.tokenise(folder, mix, encoder)
        return TokenCache(folder)

    def cache_name(self, mix: Mix, encoder: Encoder) -> str:
        """Of the folder: a hash of everything its content follows from."""
        memory = self.cache_dir / "digests"
        digests = [file_digest(file, memory) for file in mix.files]
        paths = [Path(self.tokenizer_folder) / name for name in TOKENIZER_FILES]
        tokenizer = [file_digest(str(path)) if path.is_file() else None for path in paths]
        return cache_key(digests, mix.files, tokenizer, encoder.identity(), *self.reading())

    def tokenise(self, folder: Path, mix: Mix, encoder: Encoder) -> None:
        """Write the cache of some files, unless another run has done so in the meantime."""
        with one_at_a_time(folder):
            if is_complete(folder):
                return
            remove_leftovers(folder.parent)
            skip, show = self.on_bad_record == "skip", process_group.is_main()
            build(folder, self.read(mix), encoder, mix.files, skip, show, how_many(encoder, size_of(mix.files)))

    def reading(self) -> list[Any]:
        """What decides, beside the files' content, which records ``read`` gives; JSON values, a part of the cache's name.

        The source of an overridden ``read`` is in it. A subclass that reads by options of its own adds them.
        """
        kind = type(self)
        return [self.on_bad_record, *([] if kind.read is TokenData.read else [inspect.getsource(kind.read)])]

    def read(self, mix: Mix) -> Iterator[Record | RecordError]:
        """The records of some files; an error stands in the place of each that cannot be read but stepped over.

        Raises:
            RecordError: damage that hides where the next record begins.
        """
        bad: list[RecordError] = []
        try:
            for file in mix.files:
                for record in record_files.read(file, bad.append):
                    yield from bad
                    bad.clear()
                    yield record
        except RecordError:
            yield from bad
            raise
        yield from bad

    def split(self, cache: TokenCache) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the samples to train on and to hold out. By content: the same text is never on both sides."""
        numbers = np.arange(len(cache))
        if self.deduplicate:
            numbers = np.sort(np.unique(cache.digests, return_index=True)[1])
        if not self.validation_ratio or not len(numbers):
            return numbers, numbers[:0]
        digests = cache.digests[numbers]
        wanted = max(1, round(self.validation_ratio * len(numbers)))
        held_out = digests <= np.sort(digests)[wanted - 1]
        return numbers[~held_out], numbers[held_out]

    # -- for people ----------------------------------------------------------------------------------------------------

    @property
    def pad_token_id(self) -> int:
        """What fills rows; never a target, so that any id will do."""
        found = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(token for token in found if token is not None)

    def origin(self, index: int) -> str:
        """FILE:LINE of each record in a training sample."""
        train: Any = self.train
        return train.origin(index)

    def left_out(self, samples: Any) -> dict[str, Any]:
        """What did not become a training sample, or not whole, and how many."""
        return {}

    def summary(self) -> dict[str, Any]:
        """Files and what became of their records. A subclass adds what became of the samples."""
        lines: dict[str, Any] = {"files": ", ".join(self.mix.files), self.records_are: len(self.kept)}
        if self.cache.about["bad_records"]:
            lines["bad records skipped"] = self.cache.about["bad_records"]
        if self.deduplicate:
            held_out = len(self.held_out) if self.validation_files is None else 0
            lines["duplicates left out"] = len(self.cache) - len(self.kept) - held_out
        if any(entry.weight != 1 for entry in self.mix.entries):
            own = self.mix.members(self.kept, self.cache.sources)
            used = self.mix.members(self.chosen, self.cache.sources)
            lines["mix"] = ", ".join(
                f"{entry.path} {len(before)} × {entry.weight:g} = {len(after)}"
                for entry, before, after in zip(self.mix.entries, own, used, strict=True)
            )
        return {**lines, **self.left_out(self.train)}


def size_of(files: list[str]) -> int:
    """About how many bytes of text there are."""
    return sum(os.path.getsize(file) * (4 if file.endswith((".gz", ".parquet")) else 1) for file in files)
