"""Writing safetensors shards of a limited size, and the index that Hugging Face reads them by."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path

from torch import Tensor

from bumblebee.checkpoint.digests import file_digest, forget_digests
from bumblebee.checkpoint.safetensors_writer import save_file
from bumblebee.checkpoint.weight_files import INDEX, SINGLE
from bumblebee.utils.json_files import write_json

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def write_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_size: str) -> tuple[dict[str, str], str]:
    """Write safetensors shards into an existing folder, holding one shard in memory at a time.

    Args:
        folder: where; not cleaned up on failure.
        tensors: (key, tensor) pairs, consumed one by one, so that they may be gathered while they are written.
        max_shard_size: for example "5GB" or "500MB"; a larger tensor gets a shard of its own.

    Returns:
        The SHA-256 of each file by name, and the dtype of the first tensor, e.g. "bfloat16".

    Raises:
        ValueError: there are no tensors, or the size is invalid.
        OSError: a file cannot be written.
    """
    limit = parse_size(max_shard_size)
    digests: list[str] = []  # of each shard written
    weight_map: dict[str, int] = {}  # key -> number of its shard
    dtype = ""
    shard: dict[str, Tensor] = {}
    total = size = 0
    for key, tensor in tensors:
        assert tensor.numel(), f"{key} is empty: it was not gathered"
        if shard and size + tensor.nbytes > limit:
            digests.append(_write_shard(folder, len(digests), shard))
            shard, size = {}, 0
        weight_map[key] = len(digests)
        dtype = dtype or str(tensor.dtype).removeprefix("torch.")
        shard[key] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
    if not shard:
        raise ValueError(f"cannot write weights to {folder}: the model has no tensors")
    digests.append(_write_shard(folder, len(digests), shard))
    return _finish_shards(folder, digests, weight_map, total), dtype


def remove_stale_weights(folder: Path, names: Collection[str]) -> None:
    """Delete the weight files of an earlier model in the folder: all but those in ``names``."""
    pattern = r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
    stale = [file for file in folder.iterdir() if re.fullmatch(pattern, file.name) and file.name not in names]
    forget_digests(folder, [file.name for file in stale])
    for file in stale:
        file.unlink()


def _write_shard(folder: Path, number: int, shard: dict[str, Tensor]) -> str:
    return save_file(shard, folder / f"model-{number:05d}.partial", metadata={"format": "pt"})


def _finish_shards(folder: Path, digests: list[str], weight_map: dict[str, int], total: int) -> dict[str, str]:
    """Give the shards their final names, which contain the number of shards, and write the index."""
    count = len(digests)
    names = [SINGLE] if count == 1 else [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
    for number, name in enumerate(names):
        (folder / f"model-{number:05d}.partial").rename(folder / name)
    by_name = dict(zip(names, digests, strict=True))
    if count == 1:
        return by_name
    named = {key: names[number] for key, number in weight_map.items()}
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": named})
    return {**by_name, INDEX: file_digest(folder / INDEX)}


def parse_size(text: str) -> int:
    """Convert a size such as "5GB" to bytes.

    Raises:
        ValueError: not a positive number with a supported unit.
    """
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d+)?)\s*([KMG]?I?B?)\s*", text.upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if size > 0:
        return size
    raise ValueError(f"expected a size with a unit, such as 5GB, 500MB or 2GiB, got {text!r}")
