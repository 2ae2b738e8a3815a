"""Damage to checkpoints, as a failing disk does it."""

from __future__ import annotations

from pathlib import Path


def flip_bit(file: Path, position: int = -1) -> None:
    """Flip the lowest bit of one byte; by default the last one, which belongs to the data of a safetensors file."""
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)
