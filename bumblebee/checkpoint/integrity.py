"""Refusing damaged checkpoints and model folders before they are read, by the digests that were saved with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from bumblebee.checkpoint.digests import describe_damage, read_digests
from bumblebee.checkpoint.sharded_state import ShardReader
from bumblebee.checkpoint.trainer_state import TRAINER_STATE, TRAINING_STATE, checkpoint_step, checkpoints


def state_files(checkpoint: Path) -> list[str]:
    """The files that training resumes from, by path relative to the checkpoint: those on disk, and those that should be.

    None for a checkpoint whose training state has no digests, even if a model folder with digests was consolidated into it.
    """
    listed = [name for name in _listed(checkpoint) if name.startswith(f"{TRAINING_STATE}/")]
    if not listed:
        return []
    on_disk = (checkpoint / TRAINING_STATE).glob("*")
    names = {file.relative_to(checkpoint).as_posix() for file in on_disk if file.suffix in (".safetensors", ".json")}
    return sorted({TRAINER_STATE, *names, *listed})


def weights_of(folder: Path) -> list[str]:
    """The weight files of a model or adapter folder: those that its digests list."""
    return sorted(name for name in _listed(folder) if "/" not in name and ".safetensors" in name)


def _listed(folder: Path) -> list[str]:
    try:
        return list(read_digests(folder) or {})
    except ValueError:  # reported where the digests are compared
        return []


def state_damage(checkpoint: Path) -> str | None:
    """What is wrong with the files that training resumes from; None if they are intact.

    Without digests, only damage that makes weights and optimizer state unreadable or incomplete is noticed.
    """
    return describe_damage(checkpoint, state_files(checkpoint)) or shard_damage(checkpoint)


def shard_damage(checkpoint: Path) -> str | None:
    """What is wrong with the headers of the training state, or None; its data is not read."""
    try:
        with ShardReader(checkpoint / TRAINING_STATE):
            return None
    except ValueError as error:
        return str(error)


def lost_trainer_state(checkpoint: Path) -> bool:
    """Whether a checkpoint has lost its trainer_state.json: unlike a folder that was never a checkpoint, it has its digest."""
    return not (checkpoint / TRAINER_STATE).is_file() and TRAINER_STATE in _listed(checkpoint)


def weight_damage(folder: Path) -> str | None:
    """What is wrong with a folder's weights; None if they are intact, or have no digests."""
    return describe_damage(folder, weights_of(folder))


def check_intact(folder: Path, damage_of: Callable[[Path], str | None], option: str = "") -> None:
    """Raise if a folder is damaged.

    Args:
        folder: a checkpoint or a model folder.
        damage_of: describes the damage of such a folder; may be a collective.
        option: what takes a checkpoint's path, for the message.

    Raises:
        ValueError: names the file, and the previous good checkpoint of the run.
    """
    damage = damage_of(folder)
    if damage is None:
        return
    for checkpoint in _earlier(folder):
        if damage_of(checkpoint) is None:
            raise ValueError(f"{damage}; use the previous good checkpoint: {option}{checkpoint}")
    raise ValueError(f"{damage}; no earlier checkpoint is intact")


def _earlier(folder: Path) -> Iterator[Path]:
    """The checkpoints before a checkpoint, or all checkpoints in a run's output folder, newest first."""
    step = checkpoint_step(folder)
    for checkpoint in reversed(checkpoints(folder if step is None else folder.parent)):
        if step is None or checkpoint.step < step:
            yield checkpoint.path
