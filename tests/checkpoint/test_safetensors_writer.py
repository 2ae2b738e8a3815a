"""The safetensors writer: the same bytes as the format's own implementation, and the digest of what is on disk."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import safetensors.torch
import torch

from bumblebee.checkpoint.safetensors_writer import DTYPES, save_file


def tensors_of_every_dtype() -> dict[str, torch.Tensor]:
    tensors = {f"layer.{dtype}".removeprefix("torch."): torch.ones(3, 5).to(dtype) for dtype in DTYPES}
    return {"é": torch.arange(7), "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), **tensors}


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"pieces": '{"a": "ü"}'}])
def test_bytes_are_those_of_safetensors(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    tensors = tensors_of_every_dtype()
    save_file(tensors, tmp_path / "ours", metadata)
    safetensors.torch.save_file(tensors, tmp_path / "theirs", metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_digest_is_that_of_the_file(tmp_path: Path) -> None:
    digest = save_file(tensors_of_every_dtype(), tmp_path / "file")
    assert digest == hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()
    safetensors.torch.load_file(tmp_path / "file")


def test_unsupported_dtype_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot save phase .*cannot hold torch.complex128"):
        save_file({"phase": torch.zeros(1, dtype=torch.complex128)}, tmp_path / "file")
    assert not (tmp_path / "file").exists()
