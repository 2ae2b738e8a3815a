"""The token cache: records are tokenized once, then memory-mapped by every rank and every later run.

A sample is a tokenized record: one sequence of ids (a document or conversation), two (the chosen and the rejected answer after
the same prompt), or several (the turns of a conversation, each in its own context). A cache is a folder, named by a hash of
everything that determines its content (files, tokenizer, template, options). It is written to a temporary folder and renamed,
so it is complete or absent. Its files:

    tokens.bin      all sequences, concatenated; uint16 or uint32
    trained.bin     the target mask, one bit per token, first token in the highest bit; absent if all tokens are targets
    ends.bin        int64 (sequences,): where each sequence ends in tokens.bin
    targets.bin     int64 (sequences,): number of targets of each sequence; absent if all tokens are targets
    samples.bin     int64 (samples,): where each sample ends in ends.bin; absent if all have as many sequences
    digests.bin     uint64 (samples,): hash of each sample's text, ignoring whitespace
    sources.bin     int64 (samples, 2): index of the file, line of the record
    about.json      file names and counts
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterable
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from bumblebee.checkpoint.atomic import remove, written_aside
from bumblebee.nn import IGNORE_INDEX
from bumblebee.utils.json_files import JSON, read_json, write_json
from datamodules.records import Record, RecordError
from datamodules.tokenize import RecordTokenizer, TokenizedBatch
from datamodules.worker_pool import RecordBatch, batched, tokenize_batches

logger = logging.getLogger("bumblebee.datamodules")  # the command line shows the messages of bumblebee

DTYPES = ("uint16", "uint32")  # of ids
FORMAT = 3  # increase whenever the content of a cache changes for the same inputs

Segment = tuple[np.ndarray, np.ndarray]  # inputs and labels, int64 (T,) each; a label is the next token or IGNORE_INDEX


class TokenCache:
    """A complete cache, opened for reading. Only the pages that are accessed are read from disk.

    Args:
        folder: the folder of the cache.

    Raises:
        ValueError: a file is damaged, missing or of another size than it was written with; the message names it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.about = _read_about(folder / "about.json")
        samples, sequences, tokens = (self.about[name] for name in ("samples", "sequences", "tokens"))
        self.tokens = _map(folder / "tokens.bin", self.about["dtype"], (tokens,))
        self.ends = _map(folder / "ends.bin", "int64", (sequences,))
        self.digests = _map(folder / "digests.bin", "uint64", (samples,))
        self.sources = _map(folder / "sources.bin", "int64", (samples, 2))
        self._sample_ends: np.ndarray | None = None
        if self.about["group"] is None:
            self._sample_ends = _map(folder / "samples.bin", "int64", (samples,))
        self.values: np.ndarray | None = None  # of each sequence
        if self.about.get("valued"):
            self.values = _map(folder / "values.bin", "float64", (sequences,))
        self._mask_bits: np.ndarray | None = None
        if self.about["masked"]:
            self._mask_bits = _map(folder / "trained.bin", "uint8", (-(-tokens // 8),))
            _map(folder / "targets.bin", "int64", (sequences,))  # opened later

    def __reduce__(self) -> tuple[object, ...]:
        return TokenCache, (self.folder,)  # another process maps the files again: pickled maps would be copies

    def __len__(self) -> int:
        return len(self.digests)

    @cached_property
    def begins(self) -> np.ndarray:
        """Where each sequence begins in ``tokens``."""
        return np.concatenate([[0], self.ends[:-1]]).astype(np.int64) if len(self.ends) else np.zeros(0, np.int64)

    @cached_property
    def targets(self) -> np.ndarray:
        """Number of targets of each sequence. The first token never is one."""
        if self._mask_bits is not None:
            return _map(self.folder / "targets.bin", "int64", self.ends.shape)
        return np.maximum(self.ends - self.begins - 1, 0)

    def sequences_of(self, samples: np.ndarray) -> np.ndarray:
        """Indices of the sequences of some samples, in their order."""
        if self._sample_ends is None:
            counts = np.full(len(samples), self.about["group"])
            firsts = samples * self.about["group"]
        else:
            firsts = np.where(samples > 0, self._sample_ends[samples - 1], 0)
            counts = self._sample_ends[samples] - firsts
        offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # of each sequence in its sample
        return np.repeat(firsts, counts) + offsets

    def samples_at(self, tokens: np.ndarray) -> np.ndarray:
        """Index of the sample that each position of ``tokens`` belongs to."""
        sequences = np.searchsorted(self.ends, tokens, side="right")
        if self._sample_ends is None:
            return sequences // self.about["group"]
        return np.searchsorted(self._sample_ends, sequences, side="right")

    def target_mask(self, begin: int, end: int) -> np.ndarray:
        """Whether each token in [begin, end) is a target: bool (end - begin,)."""
        if self._mask_bits is None:
            return np.ones(end - begin, dtype=bool)
        first = begin // 8
        bits = np.unpackbits(self._mask_bits[first : -(-end // 8)])
        return bits[begin - 8 * first : end - 8 * first].astype(bool)

    def segment(self, start: int, length: int) -> Segment:
        """``length`` inputs from token ``start`` on, and their labels."""
        tokens = self.tokens[start : start + length + 1].astype(np.int64)
        if self._mask_bits is None:
            return tokens[:-1], tokens[1:]
        return tokens[:-1], np.where(self.target_mask(start + 1, start + length + 1), tokens[1:], IGNORE_INDEX)

    def spaced_tokens(self, count: int = 256, length: int = 256) -> np.ndarray:
        """``count`` runs of ``length`` ids at evenly spaced positions; all ids if there are not more."""
        starts = np.linspace(0, max(0, len(self.tokens) - length), count).astype(np.int64)
        runs = [self.tokens] if len(self.tokens) <= count * length else [self.tokens[at : at + length] for at in starts]
        return np.concatenate(runs)

    def origin(self, sample: int) -> str:
        """FILE:LINE of a sample."""
        file, line = self.sources[sample]
        return f"{self.about['files'][file]}:{line}"


def _map(file: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    size, expected = file.stat().st_size if file.is_file() else None, math.prod(shape) * np.dtype(dtype).itemsize
    if size != expected:
        raise ValueError(f"{file} is damaged: it {'is missing' if size is None else f'has {size} bytes, expected {expected}'}")
    return np.memmap(file, dtype=dtype, mode="r", shape=shape) if shape[0] else np.zeros(shape, dtype)  # cannot map 0 bytes


def _read_about(file: Path) -> dict[str, Any]:
    try:
        about = read_json(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: {str(error).removeprefix(f'{file}: ')}") from error
    counts = ("samples", "sequences", "tokens", "bad_records")
    valid = all(type(about.get(name)) is int and about[name] >= 0 for name in counts) and about.get("dtype") in DTYPES
    group = about.get("group", 0)
    if not (valid and type(about.get("masked")) is bool and (group is None or type(group) is int and group > 0)):
        raise ValueError(f"{file} is damaged: its counts are not those of a cache")
    if not isinstance(about.get("files"), list):
        raise ValueError(f"{file} is damaged: it names no files")
    return about


def find_damage(folder: Path, vocab_size: int) -> str | None:
    """What is wrong with a cache; None if there is nothing. The ids are not read, except for a small part.

    Args:
        folder: of a complete cache.
        vocab_size: of the tokenizer; all ids are below it.
    """
    try:
        cache = TokenCache(folder)
    except ValueError as error:
        return str(error)
    edges = {"ends.bin": (cache.ends, len(cache.tokens)), "sources.bin": (cache.sources[:, 0], len(cache.about["files"]))}
    if cache._sample_ends is not None:
        edges["samples.bin"] = cache._sample_ends, len(cache.ends)
    for name, (values, limit) in edges.items():
        # In the order of the records, from the first one on.
        if len(values) and (values[0] < 0 or values[-1] > limit or np.any(values[1:] < values[:-1])):
            return f"{folder / name} is damaged: its values are not in order or exceed {limit}"
    if len(cache.ends) and cache.ends[-1] != len(cache.tokens):
        return f"{folder / 'ends.bin'} is damaged: the last sequence ends at {cache.ends[-1]} of {len(cache.tokens)} tokens"
    if len(ids := cache.spaced_tokens()) and ids.max() >= vocab_size:
        return f"{folder / 'tokens.bin'} is damaged: it has id {ids.max()}, the tokenizer has {vocab_size}"
    return None


def discard_damaged(folder: Path, vocab_size: int) -> None:
    """Delete a cache that is damaged, with a warning, so that it is written again.

    Raises:
        ValueError: it cannot be deleted.
    """
    if not is_complete(folder) or find_damage(folder, vocab_size) is None:
        return
    try:
        with write_lock(folder):  # another run may have replaced it meanwhile
            if damage := find_damage(folder, vocab_size):
                logger.warning("%s; the files are tokenized again", damage)
                remove(folder)
    except OSError as error:
        raise ValueError(f"{find_damage(folder, vocab_size)}, and cannot be deleted: {error.strerror}") from error


# -- writing -------------------------------------------------------------------------------------------------------------


def write_token_cache(
    folder: Path,
    records: Iterable[Record | RecordError],
    tokenizer: RecordTokenizer,
    files: list[str],
    skip_bad_records: bool,
    show_progress: bool,
    workers: int = 1,
) -> None:
    """Tokenize records and write a cache. Only a few batches are in memory at a time.

    Args:
        folder: complete or absent when this returns.
        records: iterated once; a RecordError takes the place of a record that cannot be read.
        tokenizer: from records to ids.
        files: the files that the records come from, in order.
        skip_bad_records: omit and count bad records instead of raising the first one.
        show_progress: show a progress bar.
        workers: see :func:`tokenize_batches`.

    Raises:
        RecordError: a bad record.
        OSError: the disk is full or the folder is not writable.
    """
    progress = tqdm(records, desc="tokenizing", unit=" records", disable=None if show_progress else True, leave=False)
    with written_aside(folder) as temporary:
        with _Writer(temporary, tokenizer, files) as writer:
            for batch, tokenized in tokenize_batches(tokenizer, batched(progress), workers):
                if tokenized.errors and not skip_bad_records:
                    raise tokenized.errors[min(tokenized.errors)]
                writer.write(batch, tokenized)
        write_json(temporary / "about.json", writer.about)


class _Writer(ExitStack):
    """The open files of a cache that is being written."""

    def __init__(self, folder: Path, tokenizer: RecordTokenizer, files: list[str]) -> None:
        super().__init__()
        self._file_index = {file: index for index, file in enumerate(files)}
        names = ["tokens", "ends", "digests", "sources", *(["trained", "targets"] if tokenizer.masked else [])]
        names += ["values"] if tokenizer.valued else []
        names += ["samples"] if tokenizer.sequences_per_sample is None else []
        self._files: dict[str, IO[bytes]] = {name: self.enter_context(open(folder / f"{name}.bin", "wb")) for name in names}
        self._pending_bits = np.zeros(0, bool)  # of the last byte of the mask, until it is full
        self.about: dict[str, Any] = {
            "files": files,
            "group": tokenizer.sequences_per_sample,
            "masked": tokenizer.masked,
            "valued": tokenizer.valued,
            "dtype": np.dtype(tokenizer.dtype).name,
            "samples": 0,
            "sequences": 0,
            "tokens": 0,
            "bad_records": 0,
        }

    def write(self, batch: RecordBatch, tokenized: TokenizedBatch) -> None:
        """Append a batch."""
        ends = np.cumsum(tokenized.lengths)
        good = [record for index, record in enumerate(batch) if index not in tokenized.errors]
        self._append("tokens", tokenized.tokens)
        self._append("ends", ends + self.about["tokens"])
        if "samples" in self._files:
            self._append("samples", np.cumsum(tokenized.counts) + self.about["sequences"])
        self._append("digests", tokenized.digests)
        self._append("sources", np.array([(self._file_index[record.file], record.line) for record in good], np.int64))
        if tokenized.values is not None:
            assert len(tokenized.values) == len(ends), "each sequence has a value"
            self._append("values", tokenized.values)
        if tokenized.target_mask is not None:
            self._append_mask(tokenized.target_mask, tokenized.lengths, ends)
        self.about["samples"] += len(good)
        self.about["sequences"] += len(ends)
        self.about["tokens"] += len(tokenized.tokens)
        self.about["bad_records"] += len(tokenized.errors)

    def _append_mask(self, mask: np.ndarray, lengths: np.ndarray, ends: np.ndarray) -> None:
        counts = np.concatenate([[0], np.cumsum(mask)])
        first = mask[np.minimum(ends - lengths, max(len(mask) - 1, 0))] if len(mask) else np.zeros(len(ends), bool)
        self._append("targets", counts[ends] - counts[ends - lengths] - (first & (lengths > 0)))
        bits = np.concatenate([self._pending_bits, mask])
        full = len(bits) // 8 * 8
        self._append("trained", np.packbits(bits[:full]))
        self._pending_bits = bits[full:]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        if len(self._pending_bits):
            self._append("trained", np.packbits(self._pending_bits))
        return super().__exit__(kind, error, traceback)

    def _append(self, name: str, values: np.ndarray) -> None:
        self._files[name].write(np.ascontiguousarray(values).data)


# -- locks ---------------------------------------------------------------------------------------------------------------


def is_complete(folder: Path) -> bool:
    """Whether a folder holds a cache."""
    return (folder / "about.json").is_file()


def write_lock(folder: Path) -> FileLock:
    """The lock to hold while writing a cache: another run that needs the same one waits. Released when a process dies."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(folder.parent / f".{folder.name}.lock")


def remove_unfinished(parent: Path) -> None:
    """Delete what killed processes have left of unfinished caches, except those that a live process is writing."""
    for temporary in parent.glob(".*.partial"):
        name = temporary.name.removeprefix(".").removesuffix(".partial")
        try:
            with write_lock(parent / name).acquire(blocking=False):
                remove(temporary)
        except Timeout:  # another process is writing it, or we are, and begin by deleting it
            continue


# -- keys ----------------------------------------------------------------------------------------------------------------


def cache_key(*parts: JSON) -> str:
    """A short hash of the parts, used as folder name."""
    return hashlib.sha256(json.dumps([FORMAT, *parts], sort_keys=True).encode()).hexdigest()[:20]


def arrays_digest(*arrays: np.ndarray) -> str:
    """SHA-256 of the integers in some arrays, whatever their dtype, and of the arrays' shapes."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.shape}".encode())
        dtype = np.uint64 if array.dtype.kind == "u" else np.int64
        digest.update(np.ascontiguousarray(array, dtype=np.dtype(dtype).newbyteorder("<")).data)
    return digest.hexdigest()
