"""Reference data: the batches and counts of a recipe, recomputed in plain Python from the token stream.

Of the DataModule it takes the files of the token cache and, for each training sample, the spans of the stream that the sample
claims to hold. Everything else is computed again: the inputs, labels and positions of these spans, the samples of a step, and
whether the spans of all samples hold every target of every sequence once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

Span = tuple[int, int]  # first token of a segment in the stream, and its number of positions


class TokenStream(Protocol):
    """The files of a token cache; see datamodules/token_cache.py for their format."""

    folder: Path
    tokens: np.ndarray
    ends: np.ndarray


@runtime_checkable
class SpanDataset(Protocol):
    """Training samples that know which spans of the stream they hold."""

    cache: TokenStream

    def spans(self, index: int) -> list[Span]: ...

    def __len__(self) -> int: ...


class ReferenceData:
    """The token stream of some training samples, read from the files of its cache.

    Args:
        samples: the training samples.
    """

    def __init__(self, samples: SpanDataset) -> None:
        self.samples, self.tokens = samples, samples.cache.tokens
        self.ends = np.asarray(samples.cache.ends)
        bits = samples.cache.folder / "trained.bin"
        self._bits = np.memmap(bits, dtype="uint8", mode="r") if bits.is_file() else None

    def is_target(self, token: int) -> bool:
        """Whether a token of the stream is a target: bit ``token`` of the mask, highest bits first."""
        return self._bits is None or bool(int(self._bits[token // 8]) & (128 >> token % 8))

    def row(self, spans: Sequence[Span], width: int, ignore: int) -> Iterator[tuple[int, int, int, bool] | None]:
        """For each position of a row its input, label, position id, and whether it ends a document; None for padding."""
        for start, length in spans:
            for position in range(length):
                token = start + position
                label = int(self.tokens[token + 1]) if self.is_target(token + 1) else ignore
                yield int(self.tokens[token]), label, position, position == length - 1
        for _ in range(width - sum(length for _, length in spans)):
            yield None

    def lost_and_double(self, samples: np.ndarray, per_sample: int, max_length: int | None) -> tuple[int, int]:
        """Targets that no training sample has, and targets that training samples have too often.

        Args:
            samples: indices of the cache's samples in an epoch; one may occur several times.
            per_sample: sequences of each.
            max_length: samples with a longer sequence may lack targets; None if none may.
        """
        changes = np.zeros(len(self.tokens) + 1, np.int32)  # of the number of spans in which a token is a label
        for index in range(len(self.samples)):
            for start, length in self.samples.spans(index):
                changes[start + 1] += 1
                changes[start + length + 1] -= 1
        labels = np.cumsum(changes[:-1])
        lengths = np.diff(self.ends, prepend=0)
        times = np.repeat(np.bincount(samples, minlength=len(lengths) // per_sample), per_sample)
        expected = np.repeat(times, lengths)
        expected[np.cumsum(lengths)[lengths > 0] - lengths[lengths > 0]] = 0  # the first token is only context
        longest = np.repeat(lengths.reshape(-1, per_sample).max(1), per_sample) - 1
        complete = np.repeat(longest <= (max_length or longest), lengths)
        mask = 1 if self._bits is None else np.unpackbits(self._bits)[: len(self.tokens)]
        missing, excess = np.maximum(expected - labels, 0), np.maximum(labels - expected, 0)
        return int((missing * complete * mask).sum()), int((excess * mask).sum())


def step_samples(order: Sequence[int], step: int, rank: int, sizes: tuple[int, int, int]) -> list[list[int]]:
    """Samples of each micro-batch of a rank in a step of the first epoch.

    Args:
        order: of the epoch.
        step: from 0.
        rank: from 0.
        sizes: samples of a micro-batch, micro-batches of a step, ranks.
    """
    size, accumulate, ranks = sizes
    of_step = order[step * size * accumulate * ranks :][: size * accumulate * ranks]
    across = [of_step[begin : begin + size * ranks] for begin in range(0, len(of_step), size * ranks)]
    return [list(samples[rank * size : (rank + 1) * size]) for samples in across]
