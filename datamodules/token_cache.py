"""The token cache: documents tokenised once, then memory-mapped by every rank and every later run.

A cache is a folder named by a hash of what its content follows from (files, tokenizer, options). It is written aside and
renamed, so it is complete or absent. In it:

    tokens.bin      all documents one after the other, each with its end-of-text id; uint16 or uint32
    ends.npy        int64 (documents,): where each document ends in tokens.bin
    digests.npy     uint64 (documents,): hash of each document's text with its white space evened out
    sources.npy     int64 (documents, 2): number of the file, line of the record
    about.json      files, counts
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bumblebee.checkpoint.atomic import write_json, written_aside
from bumblebee.tokenizer import Tokenizer

FORMAT = 1  # raised whenever the content of a cache changes for the same inputs
BATCH = 1024  # documents tokenised at a time, on all cores


@dataclass(frozen=True)
class Document:
    """A text and where it came from (number of the file, line)."""

    text: str
    file: int
    line: int


class TokenCache:
    """A cache on the disk, opened for reading; only the pages that are looked at are read.

    Args:
        folder: of a complete cache.
    """

    def __init__(self, folder: Path) -> None:
        self.about: dict[str, Any] = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        file = folder / "tokens.bin"
        empty = not self.about["tokens"]  # no documents: there is nothing to map then
        self.tokens = np.zeros(0, self.about["dtype"]) if empty else np.memmap(file, dtype=self.about["dtype"], mode="r")
        self.ends = np.load(folder / "ends.npy")
        self.digests = np.load(folder / "digests.npy")
        self.sources = np.load(folder / "sources.npy")

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def begins(self) -> np.ndarray:
        """Where each document begins in ``tokens``."""
        return np.concatenate([[0], self.ends[:-1]]).astype(np.int64)

    def origin(self, document: int) -> str:
        """FILE:LINE of a document."""
        file, line = self.sources[document]
        return f"{self.about['files'][file]}:{line}"


def cache_key(*parts: Any) -> str:
    """A short name that changes whenever a part does."""
    return hashlib.sha256(json.dumps([FORMAT, *parts], sort_keys=True).encode()).hexdigest()[:20]


def file_digest(path: str) -> str:
    """Hash of a file's content."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def text_digest(text: str) -> int:
    """64 bits of a text, equal for texts that differ in white space only."""
    return int.from_bytes(hashlib.blake2b(" ".join(text.split()).encode(), digest_size=8).digest(), "little")


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Let other processes wait, such as another run that was started at the same moment and needs the same cache."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{folder.name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # ends with the process, however that ends
        yield


def build(
    folder: Path, documents: Iterable[Document], about: dict[str, Any], tokenizer: Tokenizer, eos: int, show: bool
) -> None:
    """Write a cache.

    Args:
        folder: where; complete or absent afterwards.
        documents: read once, never all in memory.
        about: what to write into about.json beside the counts: "files", which the documents' numbers stand for, and
            whatever else has become known by the time all documents are read.
        tokenizer: text to ids.
        eos: id appended to each document.
        show: a progress bar.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    ends: list[int] = []
    digests: list[int] = []
    sources: list[tuple[int, int]] = []
    total = 0
    bar = tqdm(documents, desc="tokenising", unit=" documents", disable=None if show else True, leave=False)
    with written_aside(folder) as aside:
        with open(aside / "tokens.bin", "wb") as out:
            for batch in _batches(bar, BATCH):
                for document, ids in zip(batch, tokenizer.encode_batch([d.text for d in batch]), strict=True):
                    out.write(np.array([*ids, eos], dtype=dtype).tobytes())
                    total += len(ids) + 1
                    ends.append(total)
                    digests.append(text_digest(document.text))
                    sources.append((document.file, document.line))
        np.save(aside / "ends.npy", np.array(ends, dtype=np.int64))
        np.save(aside / "digests.npy", np.array(digests, dtype=np.uint64))
        np.save(aside / "sources.npy", np.array(sources, dtype=np.int64).reshape(-1, 2))
        counts = {"documents": len(ends), "tokens": total, "dtype": np.dtype(dtype).name}
        write_json(aside / "about.json", {**about, **counts})


def _batches(items: Iterable[Document], size: int) -> Iterator[list[Document]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
