"""Sharded training state on disk: the fp32 weights and optimizer state of each parameter.

Each rank writes safetensors files with its shards: contiguous ranges of the flattened parameters. The file's header records
each shard's range, so shards can be reassembled by any number of ranks, at any ZeRO stage, or one parameter at a time without
ranks at all. Keys are KIND/PARAMETER: ``fp32/model.norm.weight``, ``exp_avg/model.norm.weight`` and whatever else the optimizer
keeps. State of another size than the parameter, which exists at stage 0 only, has the keys whole/PATH/PARAMETER, and the header
records its structure. Buffers, which no optimizer updates, are written complete to a file of their own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from bumblebee.checkpoint.safetensors_writer import save_file
from bumblebee.checkpoint.state_tree import unflatten
from bumblebee.utils.json_files import JSON

WEIGHTS = "fp32"  # the kind of the weights themselves
WHOLE = "whole"  # prefix of the kinds of tensors in ``SavedShard.other``
BUFFERS = "buffers.safetensors"
FILE_BYTES = 2**30


class ShardRange(TypedDict, total=False):
    """The range of a parameter that a shard covers, as recorded in a file's header; see ``SavedShard``."""

    shape: tuple[int, ...]
    start: int
    numel: int
    other: dict[str, JSON]
    aliases: list[str]


@dataclass(frozen=True)
class SavedShard:
    """A contiguous range of a parameter's elements, with their weights and optimizer state.

    Args:
        name: of the parameter.
        shape: of the complete parameter.
        start: index of the first element in the flattened parameter.
        numel: number of elements.
        tensors: by kind; (numel,), or () for state with one number per parameter. Those of ``other`` have the kind whole/PATH.
        other: structure of the state that is neither, by kind; see ``state_tree``.
        aliases: further names of the parameter in model folders, if modules share it.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    tensors: dict[str, Tensor]
    other: dict[str, JSON] = field(default_factory=dict)
    aliases: list[str] = field(default_factory=list)


def write_shards(folder: Path, stem: str, shards: Iterable[SavedShard], limit: int = FILE_BYTES) -> dict[str, str]:
    """Write one rank's shards to ``STEM.safetensors``, continued in ``STEM-1.safetensors`` and so on.

    Args:
        folder: an existing folder.
        stem: starts with ``optimizer-``.
        shards: consumed one by one, so that they may be copied from a device or disk while they are written.
        limit: size in bytes after which another file is started; at most this much and one shard are held in memory.

    Returns:
        The SHA-256 of each file, by name.

    Raises:
        OSError: a file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    ranges: dict[str, ShardRange] = {}
    digests: dict[str, str] = {}
    for shard in shards:
        ranges[shard.name] = {"shape": shard.shape, "start": shard.start, "numel": shard.numel}
        if shard.other:
            ranges[shard.name]["other"] = shard.other
        if shard.aliases:
            ranges[shard.name]["aliases"] = shard.aliases
        for kind, tensor in shard.tensors.items():
            tensors[f"{kind}/{shard.name}"] = tensor.detach().cpu().clone()
        if sum(tensor.nbytes for tensor in tensors.values()) >= limit:
            digests |= _write_file(folder / _file_name(stem, len(digests)), tensors, ranges)
            tensors, ranges = {}, {}
    if tensors or not digests:
        digests |= _write_file(folder / _file_name(stem, len(digests)), tensors, ranges)
    return digests


def _file_name(stem: str, number: int) -> str:
    return f"{stem}-{number}.safetensors" if number else f"{stem}.safetensors"


def _write_file(file: Path, tensors: dict[str, Tensor], ranges: dict[str, ShardRange]) -> dict[str, str]:
    return {file.name: save_file(tensors, file, metadata={"pieces": json.dumps(ranges)})}


def write_buffers(folder: Path, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Write a model's buffers, if it has any.

    Returns:
        The SHA-256 of the file, by name.

    Raises:
        OSError: the file cannot be written.
    """
    if not tensors:
        return {}
    return _write_file(folder / BUFFERS, {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, {})


def _read_buffers(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file) if file.is_file() else {}
    except (SafetensorError, RuntimeError, ValueError, OSError) as error:
        raise ValueError(f"{file} is damaged: {_first_line(error)}") from error


def _check_keys(keys: Iterable[str], ranges: dict[str, ShardRange]) -> None:
    for key in keys:
        kind, _, name = key.partition("/")
        if kind != WHOLE and not (kind.isidentifier() and name in ranges):
            raise ValueError(f"unexpected tensor {key!r}")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class ShardReader:
    """Reads the shards of a checkpoint on demand. A context manager, since it keeps the files open.

    Args:
        folder: contains the ranks' files.

    Raises:
        ValueError: there are no files, or one is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.buffers: dict[str, Tensor] = _read_buffers(folder / BUFFERS)
        self.aliases: dict[str, list[str]] = {}  # further names of parameters that modules share
        self._other: dict[str, dict[str, JSON]] = {}
        self._shards: dict[str, list[tuple[safe_open, int, int]]] = {}  # parameter -> (open file, start, numel)
        files = sorted(folder.glob("optimizer-*.safetensors"))
        if not files:
            raise ValueError(f"{folder} has no training state: optimizer-*.safetensors is missing")
        with ExitStack() as stack:
            for file in files:
                self._open(file, stack)
            self._check_complete()
            self._files = stack.pop_all()  # if a file is damaged, those opened before it are closed

    def _open(self, file: Path, stack: ExitStack) -> None:
        try:
            tensors = stack.enter_context(safe_open(file, framework="pt"))
            ranges = json.loads(tensors.metadata()["pieces"])
            _check_keys(tensors.keys(), ranges)
            for name, extent in ranges.items():
                self._add(tensors, name, extent)
        except (SafetensorError, ValueError, TypeError, KeyError, AttributeError, OSError) as error:
            reason = f"no {error} in its header" if isinstance(error, KeyError) else _first_line(error)
            raise ValueError(f"{file} is damaged: {reason}") from error

    def _add(self, tensors: safe_open, name: str, extent: ShardRange) -> None:
        """Add a shard; its header must agree with itself."""
        shape, start, numel = tuple(extent["shape"]), extent["start"], extent["numel"]
        if not all(isinstance(number, int) and number >= 0 for number in (*shape, start, numel)):
            raise ValueError(f"the range of {name} is not one of whole numbers")
        if start + numel > math.prod(shape) or self.shapes.setdefault(name, shape) != shape:
            raise ValueError(f"the shape of {name} is {list(shape)}, which does not fit its range or another file")
        if (weights := tensors.get_slice(f"{WEIGHTS}/{name}").get_shape()) != [numel]:
            raise ValueError(f"{WEIGHTS}/{name} has shape {weights}, expected [{numel}]")
        self._other[name] = extent.get("other", {})
        self.aliases[name] = extent.get("aliases", [])
        self._shards.setdefault(name, []).append((tensors, start, numel))

    def _check_complete(self) -> None:
        """Raise if the shards of a parameter, or of its optimizer state, do not cover it."""
        for name, shape in self.shapes.items():
            covered = 0
            for _, start, numel in sorted(self._shards[name], key=lambda shard: shard[1]):
                covered = max(covered, start + numel) if start <= covered else covered
            if covered != math.prod(shape):
                raise ValueError(
                    f"{self.folder} is damaged: it lacks elements {covered} to {math.prod(shape)} of {name}:"
                    " a rank's file is missing or its header is damaged"
                )

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def kinds(self, name: str) -> list[str]:
        """The kinds of optimizer state of a parameter."""
        keys = self._shards[name][0][0].keys()
        return sorted(key.partition("/")[0] for key in keys if key.partition("/")[2] == name and key != f"{WEIGHTS}/{name}")

    def other_state(self, name: str, device: torch.device) -> dict[str, object]:
        """The optimizer state of a parameter that is not sharded, by kind: tensors of other sizes, and values of Python.

        The tensors are on ``device``: that of the parameter.
        """
        file = self._shards[name][0][0]
        trees = self._other[name].items()
        return {
            kind: unflatten(tree, lambda path: file.get_tensor(f"{WHOLE}/{path}/{name}").to(device)) for kind, tree in trees
        }

    def read(self, kind: str, name: str, start: int, numel: int, dtype: torch.dtype | None = None) -> Tensor:
        """Read elements ``start`` to ``start + numel`` of a flattened parameter: (numel,), or () for a single number.

        Each shard is cast to ``dtype`` as it is read, so that a large parameter is never held in fp32 as a whole.

        Raises:
            ValueError: the checkpoint lacks some of the elements.
        """
        parts, position = [], start
        for file, first, count in sorted(self._shards[name], key=lambda shard: shard[1]):
            data = self._slice(file, f"{kind}/{name}")
            if not data.get_shape():
                return file.get_tensor(f"{kind}/{name}")
            low, high = max(position, first), min(start + numel, first + count)
            if low < high and low == position:
                parts.append(data[low - first : high - first].to(dtype))
                position = high
        if position != start + numel:
            raise ValueError(
                f"{self.folder} lacks elements {position} to {start + numel} of {kind}/{name}: a rank's file is missing"
            )
        return torch.cat(parts) if len(parts) != 1 else parts[0]

    def _slice(self, file: safe_open, key: str) -> Any:
        try:
            return file.get_slice(key)
        except SafetensorError as error:
            raise ValueError(f"{self.folder} is damaged: a file lacks {key}") from error

    def parameter(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Read the weights of a complete parameter."""
        shape = self.shapes[name]
        return self.read(WEIGHTS, name, 0, math.prod(shape), dtype).reshape(shape)

    def weights(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Yield every (parameter, weights) in ``dtype``, under each of its names, then every buffer as it was saved."""
        for name in self.shapes:
            weights = self.parameter(name, dtype)
            yield from ((each, weights) for each in (name, *self.aliases[name]))
        yield from self.buffers.items()
