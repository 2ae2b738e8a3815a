"""Mixes: what ``files`` in a recipe means, and how often each sample comes in an epoch.

    files: a.jsonl                                        one path or glob
    files: [a.jsonl, "more/*.json"]                       several
    files:                                                several, with weights
      - a.jsonl
      - {path: "more/*.json", weight: 2}                  each sample twice an epoch
      - {path: large.jsonl, weight: 0.25}                 the same quarter of the samples in every epoch

A share of a sample's kind is chosen by content, so that it depends neither on the order of the records nor on the seed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from bumblebee.formatting import hint
from datamodules import record_files

Files = str | list[str | dict[str, Any]]
SCATTER = np.uint64(0x9E3779B97F4A7C15)  # odd: multiplying by it orders digests anew, other than the held-out ones are chosen


@dataclass(frozen=True)
class Entry:
    """Some files and their weight.

    Args:
        path: as it was written.
        files: what it means.
        weight: passes over its samples in an epoch.
    """

    path: str
    files: list[str]
    weight: float


class Mix:
    """The entries of ``files``.

    Args:
        files: a path, or a list of paths and {path, weight}.

    Raises:
        ValueError: a path that cannot be used, an unknown key, a weight that is no number above 0.
    """

    def __init__(self, files: Files) -> None:
        written = [files] if isinstance(files, str) else files
        self.entries: list[Entry] = []
        for item in written:
            self._add(_entry(item))
        self.files = [file for entry in self.entries for file in entry.files]
        if not self.files:
            raise ValueError("files: no files were given")

    def _add(self, entry: Entry) -> None:
        """A file that is named twice counts once, at its first place, as long as nothing contradicts."""
        for other in self.entries:
            both = {record_files.identity(file) for file in entry.files} & {record_files.identity(file) for file in other.files}
            if both and entry.weight != other.weight:
                raise ValueError(f"files: {entry.path!r} and {other.path!r} name the same file in two ways: name it once")
            entry = Entry(entry.path, [f for f in entry.files if record_files.identity(f) not in both], entry.weight)
        if entry.files:
            self.entries.append(entry)

    def members(self, samples: np.ndarray, sources: np.ndarray) -> list[np.ndarray]:
        """For each entry those of the samples that are its own."""
        edges = np.cumsum([0, *(len(entry.files) for entry in self.entries)])
        entry_of = np.searchsorted(edges, sources[samples, 0], side="right") - 1
        return [samples[entry_of == number] for number in range(len(self.entries))]

    def repeat(self, samples: np.ndarray, sources: np.ndarray, digests: np.ndarray) -> np.ndarray:
        """The samples of an epoch: each as often as its entry's weight says.

        Args:
            samples: numbers of those to train on.
            sources: (all samples, 2): number of the file, line.
            digests: uint64 (all samples,).
        """
        if all(entry.weight == 1 for entry in self.entries):
            return samples
        of_entries = zip(self.entries, self.members(samples, sources), strict=True)
        chosen = [_repeated(own, entry.weight, digests) for entry, own in of_entries]
        return np.sort(np.concatenate(chosen))


def _repeated(samples: np.ndarray, weight: float, digests: np.ndarray) -> np.ndarray:
    whole = int(weight)
    order = np.argsort(digests[samples] * SCATTER, kind="stable")
    part = samples[order[: round((weight - whole) * len(samples))]]
    return np.concatenate([np.repeat(samples, whole), part])


def _entry(item: str | dict[str, Any]) -> Entry:
    if isinstance(item, str):
        return Entry(item, record_files.expand(item), 1.0)
    path = item.get("path")
    if not isinstance(path, str) or not path:
        raise ValueError(f"files: expected a path in each entry, such as {{path: data.jsonl, weight: 2}}, got {item!r}")
    allowed = ["path", "weight"]
    for key in item:
        if key not in allowed:
            near = hint(str(key), allowed)
            raise ValueError(f"files: unknown key {key!r} in the entry of {path!r}{near}; it may have {', '.join(allowed)}")
    weight = item.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not (math.isfinite(weight) and weight > 0):
        raise ValueError(f"files: the weight of {path!r} must be a number above 0, got {weight!r}")
    return Entry(path, record_files.expand(path), float(weight))
