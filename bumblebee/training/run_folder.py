"""The folder of a run: what lies in it, and the checkpoints found there.

output_dir/recipe.yaml metrics.jsonl loss.png ...      written while the run goes on
output_dir/checkpoint-<step>/                          a model folder, and the training state beside it
output_dir/config.json model.safetensors ...           the trained model, when the run is complete; with LoRA instead
output_dir/adapter_config.json adapter_model.safetensors
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TRAINER_STATE = "trainer_state.json"  # written last into a checkpoint
_OF_A_RUN = ("recipe.yaml", "metrics.jsonl", "log.txt", "loss.png", "summary.json", "tensorboard", "config.json",
             "generation_config.json", "tokenizer.json", "tokenizer_config.json", "best.json", "samples.jsonl", "trace.json",
             "profile.txt", "wandb", "adapter_config.json", "adapter_model.safetensors")  # fmt: skip
_GLOBS = ("checkpoint-*", ".checkpoint-*.partial", "model*.safetensors*")


@dataclass(frozen=True)
class SavedCheckpoint:
    """A complete checkpoint on the disk.

    Args:
        path: its folder.
        step: optimizer steps done.
        last: whether it was written because a run ended.
    """

    path: Path
    step: int
    last: bool


def read_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """What the trainer wrote about a checkpoint.

    Raises:
        ValueError: the folder is no checkpoint.
    """
    try:
        return json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{checkpoint} is no checkpoint that can be resumed: {error}") from error


def checkpoints(output_dir: Path) -> list[SavedCheckpoint]:
    """The complete checkpoints of a run, oldest first."""
    found = []
    for path in output_dir.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and (path / TRAINER_STATE).is_file():
            found.append(SavedCheckpoint(path, int(match[1]), bool(read_trainer_state(path).get("last"))))
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def holds_a_run(output_dir: Path) -> bool:
    """Whether a run has come so far here that something would be lost: metrics, a checkpoint or a model."""
    marks = ("metrics.jsonl", "config.json", "adapter_config.json")
    return any((output_dir / name).exists() for name in marks) or bool(checkpoints(output_dir))


def clear(output_dir: Path) -> None:
    """Delete what a run wrote, and nothing else that lies there."""
    for path in _files_of_a_run(output_dir):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _files_of_a_run(output_dir: Path) -> list[Path]:
    named = [output_dir / name for name in _OF_A_RUN if (output_dir / name).exists()]
    return named + [path for pattern in _GLOBS for path in output_dir.glob(pattern)]


def find_resume(resume: str | None, output_dir: Path) -> Path | None:
    """The checkpoint that ``trainer.resume`` means: None, ``auto`` (the newest here, if any), or a path.

    Raises:
        ValueError: a path that is no checkpoint, with those that are there.
    """
    if resume is None:
        return None
    found = checkpoints(output_dir)
    if resume == "auto":
        return found[-1].path if found else None
    if not (Path(resume) / TRAINER_STATE).is_file():
        names = ", ".join(str(checkpoint.path) for checkpoint in found) or "none"
        raise ValueError(f"trainer.resume: {resume} is no complete checkpoint; in {output_dir} there are: {names}")
    return Path(resume)


def check_free(output_dir: Path, resume: str | None, overwrite: bool) -> None:
    """Refuse to mix two runs.

    Raises:
        ValueError: a run is there and neither resume nor overwrite was asked for, or the path is no folder.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"output_dir: {output_dir} is a file, not a folder")
    if resume is None and not overwrite and holds_a_run(output_dir):
        raise ValueError(
            f"output_dir: {output_dir} already holds a run: continue it with --trainer.resume auto,"
            " replace it with --overwrite, or choose another folder"
        )
