"""The checkpoints of a run, and trainer_state.json in each: step, data position and callback state."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bumblebee.utils.json_files import read_json

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
        return bool(read_json(checkpoint / TRAINER_STATE).get("last"))
    except (OSError, ValueError):  # one damaged checkpoint must not hide the others
        return False


_COUNTS = ("seed", "samples", "tokens", "ranks")
_OBJECTS = ("position", "loss_scaler", "schedule", "callbacks")


def read_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """Read trainer_state.json of a checkpoint.

    Raises:
        ValueError: it is missing or damaged; the message names it.
    """
    file = checkpoint / TRAINER_STATE
    try:
        state = read_json(file)
    except (ValueError, RecursionError) as error:
        reason = str(error).removeprefix(f"{file}: ")
        raise ValueError(f"{file} is damaged: {reason}") from error
    except OSError as error:
        raise ValueError(f"{checkpoint} is not a checkpoint that can be resumed: {file}: {error.strerror}") from error
    for name, value in _wrong_values(state):
        raise ValueError(f"{file} is damaged: {name} is {value}")
    return state


def _wrong_values(state: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (name, what it is) of each value that is missing or cannot be what was saved."""
    for name in _COUNTS:
        if not _is_count(state.get(name)):
            yield name, _described(state, name, "a number from 0 on")
    for name in _OBJECTS:
        if not isinstance(state.get(name), dict):
            yield name, _described(state, name, "an object")
    if not isinstance(state.get("dtype"), str):
        yield "dtype", _described(state, "dtype", "a name")
    if isinstance(position := state.get("position"), dict):
        for name in ("step", "epoch", "sample", *(["into"] if "into" in position else [])):
            if not _is_count(position.get(name)):
                yield f"position.{name}", _described(position, name, "a number from 0 on")
    sections = state.get("fingerprint", {})  # absent in earlier versions
    if not isinstance(sections, dict) or not all(isinstance(section, dict) for section in sections.values()):
        yield "fingerprint", _described(state, "fingerprint", "an object of objects")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _described(values: dict[str, Any], name: str, expected: str) -> str:
    return f"{json.dumps(values[name])[:40]}, expected {expected}" if name in values else "missing"
