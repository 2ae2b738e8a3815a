"""The token cache: records tokenised once, then memory-mapped by every rank and every later run.

A sample is what a record becomes: one sequence of ids (a document, a conversation) or two (the chosen and the rejected answer
behind the same prompt). A cache is a folder named by a hash of what its content follows from (files, tokenizer, template,
options). It is written aside and renamed, so it is complete or absent. In it:

    tokens.bin      all sequences one after the other; uint16 or uint32
    trained.bin     one bit for each token, first token in the highest bit: whether it is a target; absent where all are
    ends.bin        int64 (sequences,): where each sequence ends in tokens.bin
    targets.bin     int64 (sequences,): tokens of each that are trained; absent where all are
    digests.bin     uint64 (samples,): hash of each sample's text with its white space evened out
    sources.bin     int64 (samples, 2): number of the file, line of the record
    about.json      files, counts

Reading and naming are here; ``cache_writer.py`` writes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bumblebee.checkpoint.atomic import remove
from bumblebee.json_files import read_json, write_json
from bumblebee.nn import IGNORE_INDEX

FORMAT = 2  # raised whenever the content of a cache changes for the same inputs
LARGE = 1 << 26  # bytes; the digests of larger files are remembered

Piece = tuple[
    np.ndarray, np.ndarray
]  # inputs and labels, int64 (T,) each: the label is the token that follows, or IGNORE_INDEX


class TokenCache:
    """A cache on the disk, opened for reading; only the pages that are looked at are read.

    Args:
        folder: of a complete cache.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.about: dict[str, Any] = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        samples, sequences, tokens = (self.about[name] for name in ("samples", "sequences", "tokens"))
        self.tokens = _mapped(folder / "tokens.bin", self.about["dtype"], (tokens,))
        self.ends = _mapped(folder / "ends.bin", "int64", (sequences,))
        self.digests = _mapped(folder / "digests.bin", "uint64", (samples,))
        self.sources = _mapped(folder / "sources.bin", "int64", (samples, 2))
        self._bits: np.ndarray | None = None
        if self.about["masked"]:
            self._bits = _mapped(folder / "trained.bin", "uint8", (-(-tokens // 8),))

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenCache, (self.folder,)  # another process maps the files anew: pickled maps would be copies

    def __len__(self) -> int:
        return len(self.digests)

    @cached_property
    def begins(self) -> np.ndarray:
        """Where each sequence begins in ``tokens``."""
        return np.concatenate([[0], self.ends[:-1]]).astype(np.int64) if len(self.ends) else np.zeros(0, np.int64)

    @cached_property
    def targets(self) -> np.ndarray:
        """How many tokens of each sequence are targets; its first token never is one."""
        if self._bits is not None:
            return _mapped(self.folder / "targets.bin", "int64", self.ends.shape)
        return np.maximum(self.ends - self.begins - 1, 0)

    def trained(self, start: int, stop: int) -> np.ndarray:
        """Whether each token from ``start`` to ``stop`` (exclusive) is a target: bool (stop - start,)."""
        if self._bits is None:
            return np.ones(stop - start, dtype=bool)
        first = start // 8
        bits = np.unpackbits(self._bits[first : -(-stop // 8)])
        return bits[start - 8 * first : stop - 8 * first].astype(bool)

    def piece(self, start: int, length: int) -> Piece:
        """``length`` inputs that begin at token ``start``, each with the token that follows as its label."""
        tokens = self.tokens[start : start + length + 1].astype(np.int64)
        if self._bits is None:
            return tokens[:-1], tokens[1:]
        return tokens[:-1], np.where(self.trained(start + 1, start + length + 1), tokens[1:], IGNORE_INDEX)

    def origin(self, sample: int) -> str:
        """FILE:LINE of a sample."""
        file, line = self.sources[sample]
        return f"{self.about['files'][file]}:{line}"


def _mapped(file: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.memmap(file, dtype=dtype, mode="r", shape=shape) if shape[0] else np.zeros(shape, dtype)  # nothing to map


# -- names ---------------------------------------------------------------------------------------------------------------


def cache_key(*parts: Any) -> str:
    """A short name that changes whenever a part does."""
    return hashlib.sha256(json.dumps([FORMAT, *parts], sort_keys=True).encode()).hexdigest()[:20]


def file_digest(path: str, memory: Path | None = None) -> str:
    """Hash of a file's content.

    Args:
        path: of the file.
        memory: folder in which the digests of large files are kept, as long as a file's size, place and times are the same.
    """
    state = os.stat(path)
    if memory is None or state.st_size < LARGE:
        return _content_digest(path)
    now = [os.path.realpath(path), state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns]
    note = memory / f"{cache_key(now[0])}.json"
    try:
        then = read_json(note)
    except (OSError, ValueError):
        then = {}
    if then.get("file") != now:
        then = {"file": now, "digest": _content_digest(path)}
        memory.mkdir(parents=True, exist_ok=True)
        write_json(note, then)
    return then["digest"]


def _content_digest(path: str) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def text_digest(text: str) -> int:
    """64 bits of a text, equal for texts that differ in white space only."""
    return int.from_bytes(hashlib.blake2b(" ".join(text.split()).encode(), digest_size=8).digest(), "little")


def is_complete(folder: Path) -> bool:
    """Whether a cache is there."""
    return (folder / "about.json").is_file()


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Let other processes wait, such as another run that was started at the same moment and needs the same cache."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{folder.name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # ends with the process, however that ends
        yield


def remove_leftovers(parent: Path) -> None:
    """Delete what processes that were killed while they wrote have left beside complete caches."""
    for aside in parent.glob(".*.partial"):
        lock = parent / f"{aside.name.removesuffix('.partial')}.lock"
        with open(lock, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:  # it is being written; or it is our own, which begins by deleting it
                continue
            remove(aside)
