"""The weight files of a model folder, read one tensor at a time: safetensors, or pickle files if allowed."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bumblebee.checkpoint.adapters.folder import WEIGHTS as ADAPTER
from bumblebee.checkpoint.adapters.folder import adapter_chain, is_adapter_folder
from bumblebee.utils.json_files import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def weight_files(folder: str | Path, allow_pickle: bool = False) -> list[Path]:
    """List the weight files of a model folder in the index's order; pickle files only if there are no safetensors files.

    Raises:
        ValueError: there are no weight files, or one that the index names is missing.
    """
    folder = Path(folder)
    for single, index in ((SINGLE, INDEX), (PICKLE, PICKLE_INDEX))[: 2 if allow_pickle else 1]:
        if (folder / index).is_file():
            return _files_in_index(folder / index)
        if (folder / single).is_file():
            return [folder / single]
    pickled = next(iter(sorted(folder.glob("*.bin"))), None)
    hint = "" if pickled is None else (
        f"; {pickled.name} is a pickle file, which can run code: convert it to safetensors, or read it with"
        " Bumblebee.from_pretrained(folder, allow_pickle=True), which loads only tensors from it"
    )  # fmt: skip
    raise ValueError(f"{folder} has no {SINGLE} or {INDEX}{hint}")


def _files_in_index(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no weight_map")
    names = list(dict.fromkeys(weight_map.values()))
    for name in names:
        if not (index.parent / name).is_file():
            raise ValueError(f"{index.parent} is incomplete: file not found: {index.parent / name}")
    return [index.parent / name for name in names]


def chain_weight_files(folder: str | Path) -> list[tuple[str, Path]]:
    """The (name, file) of all weights that loading a folder reads: the base model's, and of each adapter on top of it.

    Empty for a folder that does not exist or has no weights.
    """
    named: list[tuple[str, Path]] = []
    for number, part in enumerate(adapter_chain(folder)):
        with suppress(ValueError):
            files = [part / ADAPTER] if is_adapter_folder(part) else weight_files(part, allow_pickle=True)
            prefix = f"adapter {number} " if number else ""
            named += [(f"{prefix}{file.name}", file) for file in files if file.is_file()]
    return named


def stored_keys(folder: str | Path) -> set[str]:
    """The keys of the tensors in a folder's safetensors files."""
    keys: set[str] = set()
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as shard:
            keys.update(shard.keys())
    return keys


def stored_tensors(folder: str | Path, allow_pickle: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yield every (key, tensor) of a folder's files, on the CPU, memory-mapped: data is read from disk on first access.

    Raises:
        ValueError: there are no files, or one is damaged or contains objects other than tensors.
    """
    for file in weight_files(folder, allow_pickle):
        yield from _pickled_tensors(file) if file.suffix == ".bin" else _safetensors(file)


def _safetensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(file, framework="pt") as shard:
            for key in shard.keys():  # noqa: SIM118  (safe_open does not return a mapping)
                yield key, shard.get_tensor(key)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or not a safetensors file: {error}") from error


def _pickled_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:  # files written before torch 1.6 are not zip files and cannot be memory-mapped
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{file} is damaged or contains objects other than tensors: {str(error).splitlines()[0]}") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{file} is not a state dict: expected tensors by key")
    yield from tensors.items()
