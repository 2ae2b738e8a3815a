"""Encoders: from records to ids. They are sent to worker processes, so they are small, and nothing here imports torch."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from bumblebee.tokenizer.tokenizer import Tokenizer
from datamodules import record_files
from datamodules.record_files import Record, RecordError
from datamodules.token_cache import text_digest


@dataclass(frozen=True)
class Sample:
    """What a record has become.

    Args:
        sequences: ids, one list or two.
        trained: for each sequence whether each of its tokens is a target; None where all are.
        digest: equal for records that say the same; see ``token_cache.text_digest``.
    """

    sequences: list[list[int]]
    trained: list[list[bool]] | None
    digest: int


@dataclass(frozen=True)
class Block:
    """Many samples, flat, as they are sent between processes and written.

    Args:
        tokens: ids of all sequences.
        trained: bool like ``tokens``, or None.
        lengths: of each sequence.
        digests: of each sample.
        errors: by the place among the encoded records, those that became no sample.
    """

    tokens: np.ndarray
    trained: np.ndarray | None
    lengths: np.ndarray
    digests: np.ndarray
    errors: dict[int, RecordError]


class Encoder(ABC):
    """Records -> samples.

    Args:
        folder: of the tokenizer, read anew in each process.
        tokenizer: what it is in this one.
    """

    sequences = 1  # of a sample
    masked = True  # some tokens are no targets
    threaded = False  # keeps all cores busy without help

    def __init__(self, folder: str, tokenizer: Tokenizer) -> None:
        self.folder, self.tokenizer = folder, tokenizer

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "tokenizer"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, tokenizer=Tokenizer.from_pretrained(state["folder"]))

    @property
    def dtype(self) -> Any:
        """The smallest type that holds all ids."""
        return np.uint16 if self.tokenizer.vocab_size <= 2**16 else np.uint32

    def identity(self) -> list[Any]:
        """What decides, beside tokenizer and files, which ids come out; JSON values, a part of the cache's name.

        The source of an encoder from elsewhere is in it.
        """
        kind = type(self)
        return [kind.__qualname__, None if kind.__module__.startswith("datamodules.") else inspect.getsource(kind)]

    @abstractmethod
    def samples(self, records: Sequence[Record]) -> list[Sample | RecordError]:
        """For each record its sample, or why there is none."""

    def encode(self, items: Sequence[Record | RecordError]) -> Block:
        """``samples`` of the records, flat; errors of reading stay errors."""
        made = iter(self.samples([item for item in items if isinstance(item, Record)]))
        results = [next(made) if isinstance(item, Record) else item for item in items]
        good = [result for result in results if isinstance(result, Sample)]
        sequences = [ids for sample in good for ids in sample.sequences]
        masks = chain.from_iterable(mask for sample in good for mask in sample.trained or ())
        return Block(
            np.fromiter(chain.from_iterable(sequences), self.dtype),
            np.fromiter(masks, bool) if self.masked else None,
            np.array([len(ids) for ids in sequences], np.int64),
            np.array([sample.digest for sample in good], np.uint64),
            {place: result for place, result in enumerate(results) if isinstance(result, RecordError)},
        )


class TextEncoder(Encoder):
    """{"text": ...} -> its ids and an end-of-text id, all of them targets."""

    masked = False
    threaded = True  # the library's own: a batch at a time without the interpreter

    def samples(self, records: Sequence[Record]) -> list[Sample | RecordError]:
        """See the base class."""
        assert self.tokenizer.eos_token_id is not None
        texts = [_text(record) for record in records]
        ids = iter(self.tokenizer.encode_batch([text for text in texts if isinstance(text, str)]))
        return [
            Sample([[*next(ids), self.tokenizer.eos_token_id]], None, text_digest(text)) if isinstance(text, str) else text
            for text in texts
        ]


def _text(record: Record) -> str | RecordError:
    try:
        return record_files.text_of(record)
    except RecordError as error:
        return error
