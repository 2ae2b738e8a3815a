"""Each rank's random state in a checkpoint: the generators of torch, Python and numpy."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy
import torch
from safetensors.torch import load_file

from bumblebee.checkpoint.digests import file_digest
from bumblebee.checkpoint.safetensors_writer import save_file
from bumblebee.utils.text_files import write_text


def save_random_state(folder: Path, rank: int) -> dict[str, str]:
    """Write the states of all generators; returns the SHA-256 of each file by name."""
    tensor_file, json_file = folder / f"random-{rank:05d}.safetensors", folder / f"random-{rank:05d}.json"
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        tensors["cuda"] = torch.cuda.get_rng_state()
    name, keys, *rest = numpy.random.get_state(legacy=True)
    states = {"python": random.getstate(), "numpy": [name, numpy.asarray(keys).tolist(), *rest]}
    write_text(json_file, json.dumps(states))
    return {tensor_file.name: save_file(tensors, tensor_file), json_file.name: file_digest(json_file)}


def load_random_state(folder: Path, rank: int) -> None:
    """Restore what ``save_random_state`` wrote; a rank that the saving run did not have keeps its own state."""
    if not (folder / f"random-{rank:05d}.json").is_file():
        return
    tensors = load_file(folder / f"random-{rank:05d}.safetensors")
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])
    states = json.loads((folder / f"random-{rank:05d}.json").read_text(encoding="utf-8"))
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = states["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))
