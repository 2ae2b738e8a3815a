"""What a checkpoint holds beside the model: a folder that all ranks write together, and each rank's random numbers."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy
import torch
from safetensors.torch import load_file, save_file

from bumblebee.checkpoint.atomic import put_in_place, start_aside
from bumblebee.checkpoint.atomic import remove as remove_aside
from bumblebee.distributed import process_group


@contextmanager
def written_together(folder: Path, device: torch.device, whole: bool = False) -> Iterator[Path]:
    """``written_aside`` for a folder into which every rank writes. The body may end early on some ranks: all learn of it.

    Args:
        folder: where the files belong.
        device: of the run, for talking to the other ranks.
        whole: replace a folder that is there with everything in it; see ``put_in_place``.

    Raises:
        OSError: this rank could not write; nothing of the folder is there then.
        OtherRankFailed: another one could not.
    """
    error: BaseException | None = None
    aside = folder.parent / f".{folder.name}.partial"
    if process_group.is_main():
        error = _attempt(lambda: start_aside(folder))
    _raise_if_any(error, device, folder)
    try:
        yield aside
    except Exception as failure:
        error = failure
    if process_group.any_rank(error is not None, device):
        if process_group.is_main():
            remove_aside(aside)
        _raise_if_any(error, device, folder)
    if process_group.is_main():
        error = _attempt(lambda: put_in_place(aside, folder, whole))
    _raise_if_any(error, device, folder)


def _attempt(action: object) -> Exception | None:
    try:
        action()  # type: ignore[operator]
    except Exception as error:
        return error
    return None


def _raise_if_any(error: BaseException | None, device: torch.device, folder: Path) -> None:
    """Leave together: with one's own error, or with the news of another rank's."""
    if process_group.any_rank(error is not None, device):
        raise error or process_group.OtherRankFailed(f"another rank could not write {folder}")


def save_random_state(folder: Path, rank: int) -> None:
    """Write the states of torch's, Python's and numpy's generators."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        tensors["cuda"] = torch.cuda.get_rng_state()
    save_file(tensors, folder / f"random-{rank:05d}.safetensors")
    name, keys, *rest = numpy.random.get_state(legacy=True)
    states = {"python": random.getstate(), "numpy": [name, numpy.asarray(keys).tolist(), *rest]}
    (folder / f"random-{rank:05d}.json").write_text(json.dumps(states), encoding="utf-8")


def load_random_state(folder: Path, rank: int) -> None:
    """Take back what ``save_random_state`` wrote; a rank that was not there then keeps its own."""
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
