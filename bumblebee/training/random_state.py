"""Each rank's random state in a checkpoint: the generators of torch, Python and numpy."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy
import numpy.typing
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

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


@dataclass(frozen=True)
class RandomState:
    """The states of all generators of one rank.

    Args:
        torch: of torch's generator for the CPU.
        cuda: of that for the rank's GPU, if it had one.
        python: of ``random``.
        numpy: of ``numpy.random``.
    """

    torch: Tensor
    cuda: Tensor | None
    python: tuple[object, ...]
    numpy: tuple[str, numpy.typing.NDArray[numpy.uint32], int, int, float]


def load_random_state(folder: Path, rank: int, saved_ranks: int) -> None:
    """Restore what ``save_random_state`` wrote; a rank that the saving run did not have keeps its own state.

    Args:
        folder: the training state.
        rank: this process's.
        saved_ranks: number of ranks of the saving run.

    Raises:
        ValueError: a file is missing or damaged.
    """
    if rank >= saved_ranks:
        return
    state = read_random_state(folder, rank)
    torch.set_rng_state(state.torch)
    if state.cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state.cuda)
    random.setstate(state.python)
    numpy.random.set_state(state.numpy)


def read_random_state(folder: Path, rank: int) -> RandomState:
    """Read a rank's random state, and try it on other generators than the run's.

    Raises:
        ValueError: a file is missing or damaged; the message names it.
    """
    tensor_file, json_file = folder / f"random-{rank:05d}.safetensors", folder / f"random-{rank:05d}.json"
    with _reported(tensor_file):
        tensors = load_file(tensor_file)
        torch.Generator().set_state(tensors["torch"])
        if (cuda := tensors.get("cuda")) is not None and (cuda.dtype, cuda.shape) != (torch.uint8, (16,)):
            raise ValueError(f"the state of the GPU's generator is {cuda.dtype} {list(cuda.shape)}")
    with _reported(json_file):
        states = json.loads(json_file.read_text(encoding="utf-8"))
        version, internal, gauss = states["python"]
        python = version, tuple(internal), gauss
        random.Random().setstate(python)
        name, keys, *rest = states["numpy"]
        of_numpy = str(name), numpy.array(keys, dtype=numpy.uint32), int(rest[0]), int(rest[1]), float(rest[2])
        numpy.random.RandomState().set_state(of_numpy)
    return RandomState(tensors["torch"], cuda, python, of_numpy)


@contextmanager
def _reported(file: Path) -> Iterator[None]:
    """Turn errors of reading a file into one that names it."""
    if not file.is_file():
        raise ValueError(f"{file} is missing")
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{file} is damaged: it lacks {error}") from error
    except (SafetensorError, ValueError, TypeError, RuntimeError, IndexError, OverflowError, OSError) as error:
        raise ValueError(f"{file} is damaged: {(str(error).splitlines() or [type(error).__name__])[0]}") from error
