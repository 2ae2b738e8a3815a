"""The checkpoints of a run, and trainer_state.json in each: step, data position and callback state."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TRAINER_STATE = "trainer_state.json"  # written last: a checkpoint with it is complete
TRAINING_STATE = "training_state"  # subfolder of a checkpoint with each rank's shards


@dataclass(frozen=True)
class SavedCheckpoint:
    """A complete checkpoint on disk.

    Args:
        path: its folder.
        step: number of optimizer steps done.
        last: whether it was saved at the end of a run.
    """

    path: Path
    step: int
    last: bool


def checkpoints(output_dir: Path) -> list[SavedCheckpoint]:
    """The complete checkpoints of a run, oldest first."""
    complete = []
    for path in output_dir.glob("checkpoint-*"):
        step = checkpoint_step(path)
        if step is not None and (path / TRAINER_STATE).is_file():
            complete.append(SavedCheckpoint(path, step, _is_last(path)))
    return sorted(complete, key=lambda checkpoint: checkpoint.step)


def checkpoint_step(path: Path) -> int | None:
    """The step in a checkpoint's name; None for another folder."""
    match = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(match[1]) if match else None


def _is_last(checkpoint: Path) -> bool:
    try:
        return bool(read_trainer_state(checkpoint).get("last"))
    except ValueError:  # one damaged checkpoint must not hide the others
        return False


def read_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """Read trainer_state.json of a checkpoint.

    Raises:
        ValueError: the folder is not a checkpoint.
    """
    try:
        return json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{checkpoint} is not a checkpoint that can be resumed: {error}") from error
