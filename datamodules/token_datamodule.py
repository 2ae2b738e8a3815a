"""TokenDataModule: what the DataModules of files share: mixtures, the token cache, held-out samples, duplicates, counts.

A subclass says how a record becomes ids (``record_tokenizer``), how these become training samples (``make_dataset``), and how
training samples become a batch (``collate``).
"""

from __future__ import annotations

import inspect
import os
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np

from bumblebee.checkpoint.digests import remembered_digest
from bumblebee.datamodule import DataModule, SampleT
from bumblebee.distributed import process_group
from bumblebee.distributed.local_main_first import local_main_first
from bumblebee.tokenizer.tokenizer import Tokenizer, tokenizer_folder_of
from bumblebee.utils.cache_dir import resolve_cache_dir
from bumblebee.utils.formatting import plural
from bumblebee.utils.json_files import JSON
from datamodules import record_files
from datamodules.collate import TokenDataset
from datamodules.mixture import Files, Mixture
from datamodules.records import Record, RecordError
from datamodules.token_cache import (
    TokenCache,
    arrays_digest,
    cache_key,
    discard_damaged,
    is_complete,
    remove_unfinished,
    write_lock,
    write_token_cache,
)
from datamodules.tokenize import RecordTokenizer
from datamodules.worker_pool import worker_count

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "vocab.json", "merges.txt",
    "added_tokens.json",
)  # fmt: skip

Digests = dict[str, str | None]  # SHA-256 by file; None if it does not exist

DatasetT = TypeVar("DatasetT", bound=TokenDataset[Any])


class TokenDataModule(DataModule[SampleT], Generic[SampleT, DatasetT]):
    """Samples from files of records, tokenized once. Generic over the sample and the dataset, a sequence of samples.

    Args:
        files: a path or glob, or a list of them and of {path, weight} entries, where weight is how often each sample occurs in
            an epoch (a fraction selects that share of the samples). Supported are .json, .jsonl, .parquet, .txt and .md.
        tokenizer: folder with tokenizer.json.
        max_length: tokens in a window.
        validation_files: held-out files.
        validation_ratio: share of the samples to hold out if there are no such files; equal texts are held out together.
        deduplicate: keep one of the samples that differ in whitespace only.
        on_bad_record: "stop", or "skip" to omit bad records and count them.
        cache_dir: where tokens are kept between runs; by default $BUMBLEBEE_CACHE or ~/.cache/bumblebee.

    Raises:
        ValueError: a number is out of range, or the folder has no tokenizer.
    """

    record_noun = "documents"  # what the summary calls the records
    chat_template: str | None = None  # replaces that of the folder: a file or "chatml"

    mixture: Mixture
    cache: TokenCache  # of ``files``
    kept: np.ndarray  # indices of the cache's samples that are trained on
    held_out: np.ndarray  # indices of the held-out samples, in the cache of ``validation_files`` if there are such
    epoch_samples: np.ndarray  # ``kept`` after applying the weights
    tokenizer: Tokenizer
    train: DatasetT
    validation: DatasetT | None = None

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
        check_options(max_length, validation_files, validation_ratio)
        self.files, self.validation_files = files, validation_files
        self.max_length, self.validation_ratio = max_length, validation_ratio
        self.deduplicate, self.on_bad_record = deduplicate, on_bad_record
        self.cache_dir = resolve_cache_dir(cache_dir)
        self.tokenizer_folder = tokenizer

    @abstractmethod
    def record_tokenizer(self) -> RecordTokenizer:
        """The tokenizer from records to ids."""

    @abstractmethod
    def make_dataset(self, cache: TokenCache, samples: np.ndarray) -> DatasetT:
        """Training samples from samples of a cache.

        Args:
            cache: the cache.
            samples: indices of its samples; one may occur several times.
        """

    def setup(self, seed: int) -> None:
        """Tokenize or open the cache, hold samples out, apply weights."""
        folder = tokenizer_folder_of(self.tokenizer_folder)  # an adapter folder has its base model's
        self._tokenizer_digests = self._digest([str(folder / name) for name in TOKENIZER_FILES])
        self.tokenizer = self.load_tokenizer()
        self.mixture = Mixture(self.files)
        self.cache = self.open_cache(self.mixture)
        self.kept, self.held_out = self.split(self.cache)
        if not len(self.kept):
            held_out = plural(len(self.held_out), self.record_noun.removesuffix("s"))
            reason = f": validation_ratio holds out all of it ({held_out})" if len(self.held_out) else ""
            raise ValueError(f"files: there is no text to train on in {self.files}{reason}")
        self.epoch_samples = self.mixture.apply_weights(self.kept, self.cache.sources, self.cache.digests)
        self.train = self._nonempty_dataset("files", self.cache, self.epoch_samples)
        if self.validation_files is not None:
            cache = self.open_cache(Mixture([*record_files.expand(self.validation_files)]))
            self.held_out = np.arange(len(cache))
            self.validation = self._nonempty_dataset("validation_files", cache, self.held_out)
        elif len(self.held_out):
            self.validation = self._nonempty_dataset("validation_ratio", self.cache, self.held_out)

    def load_tokenizer(self) -> Tokenizer:
        """Read the tokenizer, with the chat template that ``chat_template`` names.

        Raises:
            ValueError: the folder has no tokenizer, or there is no such template.
        """
        return load_tokenizer(self.tokenizer_folder, self.chat_template)

    def _nonempty_dataset(self, option: str, cache: TokenCache, samples: np.ndarray) -> DatasetT:
        dataset = self.make_dataset(cache, samples)
        if not len(dataset):
            reasons = "".join(f"; {what}: {count}" for what, count in self.omitted(dataset).items())
            raise ValueError(f"{option}: none of {len(samples)} {self.record_noun} remains{reasons}")
        return dataset

    # -- tokens --------------------------------------------------------------------------------------------------------

    def open_cache(self, mixture: Mixture) -> TokenCache:
        """The tokens of some files; if they are not cached, or the cache is damaged, one rank of each machine tokenizes them.

        Raises:
            ValueError: a file changed meanwhile.
        """
        tokenizer = self.record_tokenizer()
        with local_main_first() as is_first:
            digests = self._digest(mixture.files)
            folder = self.cache_dir / "tokens" / self.cache_name(digests, tokenizer)
            if is_first:
                discard_damaged(folder, tokenizer.tokenizer.vocab_size)
            if is_first and not is_complete(folder):
                self.write_cache(folder, mixture, digests, tokenizer)
        if not is_complete(folder):  # the first rank tokenized other contents under another name
            raise ValueError(f"one of {', '.join(mixture.files)} changed while the ranks started; start again")
        return TokenCache(folder)

    def _digest(self, files: list[str]) -> Digests:
        """The digest of each file, None for one that does not exist."""
        memory = self.cache_dir / "digests"
        return {file: remembered_digest(file, memory) if os.path.isfile(file) else None for file in files}

    def cache_name(self, digests: Digests, tokenizer: RecordTokenizer) -> str:
        """The name of the cache's folder: a hash of everything that determines its content."""
        files: tuple[list[JSON], list[JSON]] = [*digests.values()], [*digests]
        tokenizer_digests: list[JSON] = [*self._tokenizer_digests.values()]
        return cache_key(*files, tokenizer_digests, tokenizer.key_parts(), *self.read_key_parts())

    def write_cache(self, folder: Path, mixture: Mixture, digests: Digests, tokenizer: RecordTokenizer) -> None:
        """Tokenize some files, unless another run has done so in the meantime.

        Raises:
            ValueError: a file, or one of the tokenizer's, no longer has its digest when all have been read.
        """
        with write_lock(folder):
            if is_complete(folder):
                return
            remove_unfinished(folder.parent)
            skip, show = self.on_bad_record == "skip", process_group.is_main()
            workers = worker_count(tokenizer, estimated_text_size(mixture.files))
            records = self._read_unchanged(mixture, digests)
            write_token_cache(folder, records, tokenizer, mixture.files, skip, show, workers)

    def _read_unchanged(self, mixture: Mixture, digests: Digests) -> Iterator[Record | RecordError]:
        """``read``, then digest the files again: the cache is named after their content before reading."""
        yield from self.read(mixture)
        before = digests | self._tokenizer_digests
        after = self._digest([*before])
        for file, digest in before.items():
            if after[file] != digest:
                raise ValueError(f"{file} changed while it was read; nothing is cached: start again when it is complete")

    def read_key_parts(self) -> list[JSON]:
        """What determines, besides the content of the files, which records ``read`` yields; part of the cache's key.

        The source of an overridden ``read`` is included. A subclass whose ``read`` depends on its own options adds them.
        """
        cls = type(self)
        return [self.on_bad_record, *([] if cls.read is TokenDataModule.read else [inspect.getsource(cls.read)])]

    def read(self, mixture: Mixture) -> Iterator[Record | RecordError]:
        """Iterate over the records of some files; an error takes the place of a record that cannot be read.

        Raises:
            RecordError: damage that hides where the next record begins.
        """
        errors: list[RecordError] = []
        try:
            for file in mixture.files:
                for record in record_files.read(file, errors.append):
                    yield from errors
                    errors.clear()
                    yield record
        except RecordError:
            yield from errors
            raise
        yield from errors

    def split(self, cache: TokenCache) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the samples to train on and to hold out, chosen by content: equal texts are always on the same side."""
        samples = np.arange(len(cache))
        if self.deduplicate:
            samples = np.sort(np.unique(cache.digests, return_index=True)[1])
        if not self.validation_ratio or not len(samples):
            return samples, samples[:0]
        digests = cache.digests[samples]
        count = max(1, round(self.validation_ratio * len(samples)))
        held_out = digests <= np.sort(digests)[count - 1]
        return samples[~held_out], samples[held_out]

    # -- properties and summary ----------------------------------------------------------------------------------------

    @property
    def pad_token_id(self) -> int:
        """The id of padding. It never is a target, so any id works."""
        candidates = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(token for token in candidates if token is not None)

    def origin(self, index: int) -> str:
        """FILE:LINE of each record in a training sample."""
        return self.train.origin(index)

    def fingerprint(self) -> dict[str, str]:
        """Digests of the training samples: of their texts, of their tokens, and of how these are cut and packed.

        Texts and tokens are not read again: the texts' hashes are in the cache, and ids are read at evenly spaced positions.
        """
        sequences = self.cache.sequences_of(self.epoch_samples)
        lengths = (self.cache.ends - self.cache.begins)[sequences]
        return {
            "records": arrays_digest(self.cache.digests[self.epoch_samples]),
            "tokens": arrays_digest(lengths, np.asarray(self.cache.targets)[sequences], self.cache.spaced_tokens()),
            "samples": arrays_digest(*self.train.layout()),
        }

    def omitted(self, dataset: DatasetT) -> dict[str, int | str]:
        """Counts of what was truncated or omitted from a dataset."""
        return {}

    def summary(self) -> dict[str, object]:
        """Files and counts of their records. Subclasses add counts of their samples."""
        lines: dict[str, object] = {"files": ", ".join(self.mixture.files), self.record_noun: len(self.kept)}
        if self.cache.about["bad_records"]:
            lines["bad records skipped"] = self.cache.about["bad_records"]
        if self.deduplicate:
            held_out = len(self.held_out) if self.validation_files is None else 0
            lines["duplicates left out"] = len(self.cache) - len(self.kept) - held_out
        if any(entry.weight != 1 for entry in self.mixture.entries):
            kept = self.mixture.split_by_entry(self.kept, self.cache.sources)
            used = self.mixture.split_by_entry(self.epoch_samples, self.cache.sources)
            lines["mix"] = ", ".join(
                f"{entry.path} {len(before)} × {entry.weight:g} = {len(after)}"
                for entry, before, after in zip(self.mixture.entries, kept, used, strict=True)
            )
        lines |= self.omitted(self.train)
        if self.chat_template is not None:
            lines["chat template"] = self.chat_template
        return lines


def check_options(max_length: int, validation_files: str | list[str] | None, validation_ratio: float) -> None:
    """Check what DataModules of files have in common.

    Raises:
        ValueError: a number is out of range, or samples are held out in two ways.
    """
    if max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}")
    if not 0 <= validation_ratio < 1:
        raise ValueError(f"validation_ratio must be in [0, 1), got {validation_ratio}")
    if validation_ratio and validation_files:
        raise ValueError("validation_files and validation_ratio are both set: choose one")


def load_tokenizer(folder: str, chat_template: str | None) -> Tokenizer:
    """Read a tokenizer, with another chat template than the folder's if one is named: a file or "chatml".

    Raises:
        ValueError: the folder has no tokenizer, or there is no such template.
    """
    tokenizer = Tokenizer.from_pretrained(folder)
    try:
        return tokenizer.with_chat_template(chat_template)
    except ValueError as error:
        raise ValueError(f"data.chat_template: {error}") from error


def estimated_text_size(files: list[str]) -> int:
    """Approximate bytes of uncompressed text in some files."""
    return sum(os.path.getsize(file) * (4 if file.endswith((".gz", ".parquet")) else 1) for file in files)
