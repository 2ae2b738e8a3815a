"""Writing a token cache: records in, files of fixed-width numbers out; in memory are a few batches at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from bumblebee.checkpoint.atomic import written_aside
from bumblebee.json_files import write_json
from datamodules.record_files import Record, RecordError
from datamodules.tokenize import Block, Encoder
from datamodules.worker_pool import Items, encoded

RECORDS, CHARACTERS = 1024, 1 << 19  # of a batch, whichever comes first


def build(
    folder: Path,
    records: Iterable[Record | RecordError],
    encoder: Encoder,
    files: list[str],
    skip: bool,
    show: bool,
    processes: int = 1,
) -> None:
    """Write a cache.

    Args:
        folder: where; complete or absent afterwards.
        records: read once, never all in memory; errors stand in the place of records that cannot be read.
        encoder: from records to ids.
        files: which the records are from, in order.
        skip: leave bad records out and count them; otherwise the first of them ends it.
        show: a progress bar.
        processes: see ``workers.encoded``.

    Raises:
        RecordError: a bad record.
        OSError: the disk is full or the folder cannot be written.
    """
    bar = tqdm(records, desc="tokenising", unit=" records", disable=None if show else True, leave=False)
    with written_aside(folder) as aside:
        with _Writer(aside, encoder, files) as writer:
            for items, block in encoded(encoder, batches(bar), processes):
                if block.errors and not skip:
                    raise block.errors[min(block.errors)]
                writer.write(items, block)
        write_json(aside / "about.json", writer.about)


def batches(items: Iterable[Record | RecordError]) -> Iterator[Items]:
    """Items in lists. What was read before an error is given before the error is raised."""
    batch: Items = []
    size = 0
    try:
        for item in items:
            batch.append(item)
            size += _characters(item)
            if len(batch) == RECORDS or size >= CHARACTERS:
                yield batch
                batch, size = [], 0
    except RecordError:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


def _characters(item: Record | RecordError) -> int:
    values = item.value.values() if isinstance(item, Record) else ()
    return sum(len(value) for value in values if isinstance(value, str))


class _Writer(ExitStack):
    """The open files of a cache."""

    def __init__(self, folder: Path, encoder: Encoder, files: list[str]) -> None:
        super().__init__()
        self.numbers = {file: number for number, file in enumerate(files)}
        names = ["tokens", "ends", "digests", "sources", *(["trained", "targets"] if encoder.masked else [])]
        self.files: dict[str, IO[bytes]] = {name: self.enter_context(open(folder / f"{name}.bin", "wb")) for name in names}
        self.bits = np.zeros(0, bool)  # of the last byte, as long as it is not full
        self.about: dict[str, Any] = {
            "files": files, "group": encoder.sequences, "masked": encoder.masked, "dtype": np.dtype(encoder.dtype).name,
            "samples": 0, "sequences": 0, "tokens": 0, "bad_records": 0,
        }  # fmt: skip

    def write(self, items: Items, block: Block) -> None:
        """Append a batch."""
        ends = np.cumsum(block.lengths)
        good = [item for place, item in enumerate(items) if place not in block.errors]
        self._append("tokens", block.tokens)
        self._append("ends", ends + self.about["tokens"])
        self._append("digests", block.digests)
        self._append("sources", np.array([(self.numbers[item.file], item.line) for item in good], np.int64))
        if block.trained is not None:
            self._write_trained(block.trained, block.lengths, ends)
        self.about["samples"] += len(good)
        self.about["sequences"] += len(ends)
        self.about["tokens"] += len(block.tokens)
        self.about["bad_records"] += len(block.errors)

    def _write_trained(self, trained: np.ndarray, lengths: np.ndarray, ends: np.ndarray) -> None:
        counts = np.concatenate([[0], np.cumsum(trained)])
        first = trained[np.minimum(ends - lengths, max(len(trained) - 1, 0))] if len(trained) else np.zeros(len(ends), bool)
        self._append("targets", counts[ends] - counts[ends - lengths] - (first & (lengths > 0)))
        bits = np.concatenate([self.bits, trained])
        full = len(bits) // 8 * 8
        self._append("trained", np.packbits(bits[:full]))
        self.bits = bits[full:]

    def __exit__(self, *error: Any) -> bool | None:
        if len(self.bits):
            self._append("trained", np.packbits(self.bits))
        return super().__exit__(*error)

    def _append(self, name: str, values: np.ndarray) -> None:
        self.files[name].write(np.ascontiguousarray(values).data)
