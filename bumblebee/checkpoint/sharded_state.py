"""Training state on the disk: for each parameter its fp32 weights and the optimizer's numbers, in pieces.

Each rank writes safetensors files with the pieces that it owns: flat runs of a parameter's elements. Where a piece lies in
its parameter stands in the file's header, so the pieces can be put together again by any number of ranks, at any ZeRO stage,
or one parameter at a time without any rank at all. Keys are KIND/PARAMETER: ``fp32/model.norm.weight``,
``exp_avg/model.norm.weight`` and whatever else the optimizer keeps. Numbers of the model that no optimizer knows, its buffers,
lie whole in a file of their own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = "fp32"  # the kind under which the weights themselves are kept
BUFFERS = "buffers.safetensors"
FILE_BYTES = 2**30


@dataclass(frozen=True)
class Piece:
    """A run of a parameter's elements with what belongs to it.

    Args:
        name: of the parameter.
        shape: of the whole parameter.
        start: index of the first element in the flattened parameter.
        numel: how many elements.
        tensors: for each kind either (numel,) or, where the optimizer keeps one number for the parameter, ().
    """

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    tensors: dict[str, Tensor]


def write_pieces(folder: Path, stem: str, pieces: Iterable[Piece], limit: int = FILE_BYTES) -> None:
    """Write one rank's pieces as ``STEM.safetensors``, and ``STEM-1.safetensors`` and so on where they are many.

    Args:
        folder: where.
        stem: begins with ``optimizer-``.
        pieces: taken one by one, so that they may be fetched from a device or a disk meanwhile.
        limit: bytes, after which another file is begun: no more than that and one piece is ever held in memory.

    Raises:
        OSError: a file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    places: dict[str, Any] = {}
    files = 0
    for piece in pieces:
        places[piece.name] = {"shape": piece.shape, "start": piece.start, "numel": piece.numel}
        for kind, tensor in piece.tensors.items():
            tensors[f"{kind}/{piece.name}"] = tensor.detach().cpu().clone()
        if sum(tensor.nbytes for tensor in tensors.values()) >= limit:
            _write_file(folder / _file_name(stem, files), tensors, places)
            tensors, places, files = {}, {}, files + 1
    if tensors or not files:
        _write_file(folder / _file_name(stem, files), tensors, places)


def _file_name(stem: str, number: int) -> str:
    return f"{stem}-{number}.safetensors" if number else f"{stem}.safetensors"


def _write_file(file: Path, tensors: dict[str, Tensor], places: dict[str, Any]) -> None:
    try:
        save_file(tensors, file, metadata={"pieces": json.dumps(places)})
    except SafetensorError as error:
        raise OSError(f"cannot write {file}: {error}") from error


def write_buffers(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write a model's buffers, where it has any.

    Raises:
        OSError: the file cannot be written.
    """
    if tensors:
        _write_file(folder / BUFFERS, {key: tensor.detach().cpu().clone() for key, tensor in tensors.items()}, {})


def _read_buffers(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file) if file.is_file() else {}
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from error


class PieceReader:
    """All pieces of a checkpoint, read as they are asked for. A context manager: it keeps the files open.

    Args:
        folder: where the ranks' files are.

    Raises:
        ValueError: no files, or damaged ones.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stack = ExitStack()
        self._where: dict[str, list[tuple[Any, int, int]]] = {}  # parameter -> (file, start, numel)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.buffers: dict[str, Tensor] = _read_buffers(folder / BUFFERS)
        files = sorted(folder.glob("optimizer-*.safetensors"))
        if not files:
            raise ValueError(f"{folder} holds no training state")
        for file in files:
            self._open(file)

    def _open(self, file: Path) -> None:
        try:
            opened = self._stack.enter_context(safe_open(file, framework="pt"))
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged: {error}") from error
        for name, place in json.loads(opened.metadata()["pieces"]).items():
            self.shapes[name] = tuple(place["shape"])
            self._where.setdefault(name, []).append((opened, place["start"], place["numel"]))

    def __enter__(self) -> PieceReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def kinds(self, name: str) -> list[str]:
        """What is kept of a parameter beside its weights."""
        opened = self._where[name][0][0]
        return sorted(k.partition("/")[0] for k in opened.keys() if k.partition("/")[2] == name and k != f"{WEIGHTS}/{name}")  # noqa: SIM118

    def read(self, kind: str, name: str, start: int, numel: int, dtype: torch.dtype | None = None) -> Tensor:
        """Elements ``start`` to ``start + numel`` of a flattened parameter: (numel,); a single number as ().

        Each piece is cast to ``dtype`` as it is read, so that a large parameter is never there in fp32 as a whole.

        Raises:
            ValueError: the checkpoint lacks some of them.
        """
        parts, at = [], start
        for opened, first, count in sorted(self._where[name], key=lambda place: place[1]):
            data = opened.get_slice(f"{kind}/{name}")
            if not data.get_shape():
                return opened.get_tensor(f"{kind}/{name}")
            low, high = max(at, first), min(start + numel, first + count)
            if low < high and low == at:
                parts.append(data[low - first : high - first].to(dtype))
                at = high
        if at != start + numel:
            raise ValueError(f"{self.folder} lacks elements {at} to {start + numel} of {kind}/{name}: a rank's file is missing")
        return torch.cat(parts) if len(parts) != 1 else parts[0]

    def whole(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """A parameter's weights in shape."""
        shape = self.shapes[name]
        return self.read(WEIGHTS, name, 0, math.prod(shape), dtype).reshape(shape)

    def weights(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Every (parameter, weights), one at a time, and buffers as they are."""
        for name in self.shapes:
            yield name, self.whole(name, dtype)
        yield from self.buffers.items()
