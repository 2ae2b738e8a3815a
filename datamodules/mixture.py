"""Mixtures: the meaning of ``files`` in a recipe, and how often each sample occurs in an epoch.

    files: a.jsonl                                        one path or glob
    files: [a.jsonl, "more/*.json"]                       several
    files:                                                several, with weights
      - a.jsonl
      - {path: "more/*.json", weight: 2}                  each sample twice per epoch
      - {path: large.jsonl, weight: 0.25}                 the same quarter of the samples in every epoch

The samples of a fraction are selected by content, so the selection depends neither on the order of the records nor on the seed.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import numpy as np

from bumblebee.utils.formatting import hint
from datamodules import record_files

Files = str | list[str | dict[str, object]]
ENTRY_KEYS = ("path", "weight")
# Odd, so multiplication permutes the digests: a fraction is selected in another order than held-out samples.
PERMUTATION = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class MixtureEntry:
    """Some files and their weight.

    Args:
        path: as written in the recipe.
        files: the files that it expands to.
        weight: passes over their samples per epoch.
    """

    path: str
    files: list[str]
    weight: float


class Mixture:
    """The entries of ``files``.

    Args:
        files: a path, or a list of paths and {path, weight}.

    Raises:
        ValueError: a path that cannot be used, an unknown key, or a weight that is not a positive number.
    """

    def __init__(self, files: Files) -> None:
        self.entries: list[MixtureEntry] = []
        for item in [files] if isinstance(files, str) else files:
            self._add(_parse_entry(item))
        self.files = [file for entry in self.entries for file in entry.files]
        if not self.files:
            raise ValueError("files: no files given")

    def _add(self, entry: MixtureEntry) -> None:
        """Add an entry without the files of earlier entries, which must have the same weight."""
        for earlier in self.entries:
            common = set(map(os.path.realpath, entry.files)) & set(map(os.path.realpath, earlier.files))
            if common and entry.weight != earlier.weight:
                raise ValueError(f"files: {entry.path!r} and {earlier.path!r} give the same file different weights")
            remaining = [file for file in entry.files if os.path.realpath(file) not in common]
            entry = MixtureEntry(entry.path, remaining, entry.weight)
        if entry.files:
            self.entries.append(entry)

    def split_by_entry(self, samples: np.ndarray, sources: np.ndarray) -> list[np.ndarray]:
        """The samples of each entry.

        Args:
            samples: indices of samples.
            sources: (all samples, 2): index of the file, line.
        """
        edges = np.cumsum([0, *(len(entry.files) for entry in self.entries)])
        entry_of = np.searchsorted(edges, sources[samples, 0], side="right") - 1
        return [samples[entry_of == index] for index in range(len(self.entries))]

    def apply_weights(self, samples: np.ndarray, sources: np.ndarray, digests: np.ndarray) -> np.ndarray:
        """The samples of an epoch, each as often as the weight of its entry says.

        Args:
            samples: indices of the samples to train on.
            sources: (all samples, 2): index of the file, line.
            digests: uint64 (all samples,).
        """
        if all(entry.weight == 1 for entry in self.entries):
            return samples
        by_entry = zip(self.entries, self.split_by_entry(samples, sources), strict=True)
        return np.sort(np.concatenate([_repeat(own, entry.weight, digests) for entry, own in by_entry]))


def _repeat(samples: np.ndarray, weight: float, digests: np.ndarray) -> np.ndarray:
    whole = int(weight)
    order = np.argsort(digests[samples] * PERMUTATION, kind="stable")
    fraction = samples[order[: round((weight - whole) * len(samples))]]
    return np.concatenate([np.repeat(samples, whole), fraction])


def _parse_entry(item: str | dict[str, object]) -> MixtureEntry:
    if isinstance(item, str):
        return MixtureEntry(item, record_files.expand(item), 1.0)
    path = item.get("path")
    if not isinstance(path, str) or not path:
        raise ValueError(f"files: expected a path in each entry, such as {{path: data.jsonl, weight: 2}}, got {item!r}")
    for key in item:
        if key not in ENTRY_KEYS:
            similar = hint(str(key), list(ENTRY_KEYS))
            allowed = ", ".join(ENTRY_KEYS)
            raise ValueError(f"files: unknown key {key!r} in the entry of {path!r}{similar}; allowed keys: {allowed}")
    weight = item.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not (math.isfinite(weight) and weight > 0):
        raise ValueError(f"files: the weight of {path!r} must be a number above 0, got {weight!r}")
    return MixtureEntry(path, record_files.expand(path), float(weight))
