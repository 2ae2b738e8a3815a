"""Writing a safetensors file and its SHA-256 in one pass.

The bytes are those that ``safetensors.torch.save_file`` writes; that function does not report a digest, and reading the file
again would double the reads of a save. See the format at https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

# In the order in which the format's own implementation sorts tensors: the most strictly aligned come first.
DTYPES = {
    torch.uint64: "U64", torch.int64: "I64", torch.float64: "F64", torch.complex64: "C64", torch.float32: "F32",
    torch.uint32: "U32", torch.int32: "I32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint16: "U16",
    torch.int16: "I16", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_ORDER = {dtype: position for position, dtype in enumerate(DTYPES)}


def save_file(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None) -> str:
    """Write contiguous CPU tensors to a safetensors file, without a copy of their data.

    Returns:
        The SHA-256 of the file, in hexadecimal.

    Raises:
        ValueError: a tensor has a dtype that the format lacks.
        OSError: the file cannot be written; the message names it.
    """
    if unknown := next((key for key, tensor in tensors.items() if tensor.dtype not in DTYPES), None):
        raise ValueError(f"cannot save {unknown} to {file}: safetensors files cannot hold {tensors[unknown].dtype}")
    ordered = sorted(tensors.items(), key=lambda pair: (_ORDER[pair[1].dtype], pair[0]))
    digest = hashlib.sha256()
    try:
        # hashlib and file objects release the GIL: a second thread hashes what this one writes, and may lag behind.
        with file.open("wb") as stream, ThreadPoolExecutor(1) as hashing:
            for part in _parts(ordered, metadata):
                hashing.submit(digest.update, part)
                stream.write(part)
    except OSError as error:
        raise OSError(f"cannot write {file}: {error.strerror}") from error
    return digest.hexdigest()


def _parts(tensors: list[tuple[str, Tensor]], metadata: Mapping[str, str] | None) -> Iterator[bytes | memoryview]:
    """Yield the header, then the data of each tensor, which is not copied."""
    yield _header(tensors, metadata)
    for _, tensor in tensors:
        yield tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def _header(tensors: list[tuple[str, Tensor]], metadata: Mapping[str, str] | None) -> bytes:
    """The length of the JSON that follows as a little-endian 64-bit number, and the JSON padded to 8 bytes."""
    entries: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for key, tensor in tensors:
        end = offset + tensor.nbytes
        entries[key] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
