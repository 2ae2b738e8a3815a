"""Pretrain: plain text in packed windows.

Each document ends in a trained end-of-text token. A window holds pieces of several documents that do not attend to each
other: their positions begin again at 0, from which the model knows. See ``packing.py`` and ``token_cache.py``.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from bumblebee import distributed
from bumblebee.datamodule import Batch, DataModule
from bumblebee.nn import IGNORE
from bumblebee.tokenizer import Tokenizer
from datamodules import formats, python_docs
from datamodules.packing import Windows, pack
from datamodules.token_cache import Document, TokenCache, build, cache_key, file_digest, one_at_a_time


class PackedWindows(Sequence):
    """Windows as samples: for each a list of pieces, which are int64 arrays of their tokens (one more than their targets)."""

    def __init__(self, cache: TokenCache, documents: np.ndarray, max_length: int) -> None:
        self.cache = cache
        self.documents = documents
        self.windows: Windows = pack(cache.begins[documents], cache.ends[documents], max_length)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: Any) -> list[np.ndarray]:
        tokens = self.cache.tokens
        return [tokens[start : start + length + 1].astype(np.int64) for start, length in self.windows.pieces(index)]


class Pretrain(DataModule):
    """Text files, packed.

    Args:
        files: paths or globs of .json, .jsonl and .txt files (also .gz); records are {"text": ...}. The word python_docs
            stands for the documentation of the running Python.
        tokenizer: folder with tokenizer.json.
        max_length: tokens in a window.
        validation_files: held-out files.
        validation_ratio: share of the documents to hold out where there are no such files; equal texts are held out
            together.
        deduplicate: keep one of the documents that differ in white space only.
        on_bad_record: "stop", or "skip" to leave bad records out and count them.
        cache_dir: where tokens are kept between runs; by default $BUMBLEBEE_CACHE or ~/.cache/bumblebee.

    Raises:
        ValueError: a number out of its range, or a folder without tokenizer.
    """

    def __init__(
        self,
        files: str | list[str],
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
        self.cache_dir = Path(cache_dir or os.environ.get("BUMBLEBEE_CACHE") or Path.home() / ".cache" / "bumblebee")
        self.tokenizer_folder = tokenizer

    def setup(self, seed: int) -> None:
        """Tokenise (or find the cache), hold out, pack. See the class for what may be wrong."""
        self.tokenizer = Tokenizer.from_pretrained(self.tokenizer_folder)
        if self.tokenizer.eos_token_id is None:
            raise ValueError(f"{self.tokenizer_folder}: tokenizer_config.json names no eos_token to end documents with")
        cache = self.open_cache(formats.expand(self.files))
        documents, held_out = self.split(cache)
        if not len(documents):
            held = f": all {len(held_out)} documents are held out" if len(held_out) else ""
            raise ValueError(f"files: there is no text to train on in {self.files}{held}")
        self.train = PackedWindows(cache, documents, self.max_length)
        if self.validation_files is not None:
            other = self.open_cache(formats.expand(self.validation_files))
            self.validation = PackedWindows(other, np.arange(len(other)), self.max_length)
        elif len(held_out):
            self.validation = PackedWindows(cache, held_out, self.max_length)

    # -- tokens --------------------------------------------------------------------------------------------------------

    def open_cache(self, files: list[str]) -> TokenCache:
        """The tokens of some files, from the disk or tokenised now, by one rank of each machine."""
        assert self.tokenizer is not None and self.tokenizer.eos_token_id is not None
        digests = [python_docs.fingerprint() if file == formats.CORPUS else file_digest(file) for file in files]
        tokenizer_digest = file_digest(str(Path(self.tokenizer_folder) / "tokenizer.json"))
        key = cache_key(digests, files, tokenizer_digest, self.tokenizer.eos_token_id, *self.reading())
        folder = self.cache_dir / "tokens" / key
        with distributed.first_on_each_machine() as first:
            if first and not (folder / "about.json").is_file():
                self.tokenise(folder, files)
        return TokenCache(folder)

    def tokenise(self, folder: Path, files: list[str]) -> None:
        """Write the cache of some files, unless another run has done so in the meantime."""
        assert self.tokenizer is not None and self.tokenizer.eos_token_id is not None
        with one_at_a_time(folder):
            if not (folder / "about.json").is_file():
                about = {"files": files, "bad_records": 0}
                documents = self.read(files, about)
                build(folder, documents, about, self.tokenizer, self.tokenizer.eos_token_id, show=distributed.is_main())

    def reading(self) -> list[Any]:
        """What decides, beside the files' content, which documents ``read`` gives; JSON values, a part of the cache's name.

        The source of an overridden ``read`` is in it. A subclass that reads by options of its own adds them.
        """
        kind = type(self)
        return [self.on_bad_record, *([] if kind.read is Pretrain.read else [inspect.getsource(kind.read)])]

    def read(self, files: list[str], about: dict[str, Any]) -> Iterator[Document]:
        """The documents of some files; skipped records are counted in ``about["bad_records"]``.

        Raises:
            ValueError: a bad record, with its file, line and reason.
        """

        def bad(error: formats.RecordError) -> None:
            if self.on_bad_record == "stop":
                raise error
            about["bad_records"] += 1

        for number, file in enumerate(files):
            for record in formats.read(file, on_error=bad):
                try:
                    text = formats.text_of(record)
                except formats.RecordError as error:
                    bad(error)
                else:
                    yield Document(text, number, record.line)

    def split(self, cache: TokenCache) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the documents to train on and to hold out. By content: the same text is never on both sides."""
        documents = np.arange(len(cache))
        if self.deduplicate:
            documents = np.sort(np.unique(cache.digests, return_index=True)[1])
        if not self.validation_ratio or not len(documents):
            return documents, documents[:0]
        digests = cache.digests[documents]
        wanted = max(1, round(self.validation_ratio * len(documents)))
        held_out = digests <= np.sort(digests)[wanted - 1]
        return documents[~held_out], documents[held_out]

    # -- batches -------------------------------------------------------------------------------------------------------

    def collate(self, samples: list[list[np.ndarray]]) -> Batch:
        """Windows -> ``input_ids``, ``labels``, ``position_ids``, each (B, max_length) int64."""
        assert self.tokenizer is not None
        shape = (len(samples), self.max_length)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        input_ids = np.full(shape, pad, dtype=np.int64)
        labels = np.full(shape, IGNORE, dtype=np.int64)
        position_ids = np.zeros(shape, dtype=np.int64)  # each place of the padding is a document of its own
        for row, pieces in enumerate(samples):
            at = 0
            for tokens in pieces:
                place = slice(at, at + len(tokens) - 1)
                input_ids[row, place], labels[row, place] = tokens[:-1], tokens[1:]
                position_ids[row, place] = np.arange(len(tokens) - 1)
                at = place.stop
        arrays = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def origin(self, index: int) -> str:
        """FILE:LINE of each document in a window."""
        train: Any = self.train
        cache, starts = train.cache, [start for start, _ in train.windows.pieces(index)]
        documents = np.searchsorted(cache.ends, starts, side="right")
        return " ".join(dict.fromkeys(cache.origin(document) for document in documents))

    def summary(self) -> dict[str, Any]:
        """Documents, tokens, windows."""
        train: Any = self.train
        cache = train.cache
        validation: Any = self.validation
        held_out = 0 if validation is None else len(validation.documents)
        duplicates = len(cache) - len(train.documents) - (held_out if self.validation_files is None else 0)
        lines: dict[str, Any] = {"files": ", ".join(cache.about["files"]), "documents": len(train.documents)}
        if cache.about["bad_records"]:
            lines["bad records skipped"] = cache.about["bad_records"]
        if self.deduplicate:
            lines["duplicates left out"] = duplicates
        lines["targets"] = int(train.windows.lengths.sum())
        lines["windows"] = f"{len(train)} of {self.max_length} tokens, {train.windows.efficiency:.1%} full"
        if validation is not None:
            targets = int(validation.windows.lengths.sum())
            lines["held out"] = f"{held_out} documents, {targets} targets, {len(validation)} windows"
        return lines
