"""The output folder of a run, and the checkpoints in it.

output_dir/recipe.yaml metrics.jsonl loss.png ...      written during the run
output_dir/checkpoint-<step>/                          a model folder with the training state
output_dir/config.json model.safetensors ...           the trained model, once the run is complete; with LoRA instead
output_dir/adapter_config.json adapter_model.safetensors
"""

from __future__ import annotations

import shutil
from pathlib import Path

from bumblebee.checkpoint.integrity import lost_trainer_state
from bumblebee.checkpoint.trainer_state import TRAINER_STATE, checkpoint_step, checkpoints

_RUN_FILES = ("recipe.yaml", "metrics.jsonl", "log.txt", "loss.png", "summary.json", "tensorboard", "config.json",
             "generation_config.json", "tokenizer.json", "tokenizer_config.json", "best.json", "samples.jsonl", "trace.json",
             "profile.txt", "wandb", "adapter_config.json", "adapter_model.safetensors", "SHA256SUMS",
             "verify.json", "evaluation.jsonl", "rollouts")  # fmt: skip
_RUN_GLOBS = ("checkpoint-*", ".checkpoint-*.partial", "model*.safetensors*")


def holds_a_run(output_dir: Path) -> bool:
    """Whether the folder holds results of a run: metrics, a checkpoint or a model."""
    results = ("metrics.jsonl", "config.json", "adapter_config.json")
    return any((output_dir / name).exists() for name in results) or bool(checkpoints(output_dir))


def clear(output_dir: Path) -> None:
    """Delete a run's files, and no others."""
    for path in _run_files(output_dir):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _run_files(output_dir: Path) -> list[Path]:
    named = [output_dir / name for name in _RUN_FILES if (output_dir / name).exists()]
    return named + [path for pattern in _RUN_GLOBS for path in output_dir.glob(pattern)]


def find_resume(resume: str | None, output_dir: Path) -> Path | None:
    """The checkpoint to resume from: none for None, the newest one if any for ``auto``, or the given path.

    Raises:
        ValueError: the path is not a complete checkpoint; the message lists those of the run.
    """
    if resume is None:
        return None
    complete = checkpoints(output_dir)
    if resume == "auto":
        return _newest(output_dir, [checkpoint.path for checkpoint in complete])
    if not (Path(resume) / TRAINER_STATE).is_file():
        names = ", ".join(str(checkpoint.path) for checkpoint in complete) or "none"
        raise ValueError(f"trainer.resume: {resume} is not a complete checkpoint; checkpoints in {output_dir}: {names}")
    return Path(resume)


def _newest(output_dir: Path, complete: list[Path]) -> Path | None:
    """The newest checkpoint, even if it has lost its trainer_state.json, which is damage like any other."""
    damaged = [
        path for path in output_dir.glob("checkpoint-*") if checkpoint_step(path) is not None and lost_trainer_state(path)
    ]
    return max([*complete, *damaged], key=lambda path: checkpoint_step(path) or 0, default=None)


def check_free(output_dir: Path, resume: str | None, overwrite: bool) -> None:
    """Check that a new run does not mix with an earlier one.

    Raises:
        ValueError: the folder holds a run, and neither resume nor overwrite is set; or the path is not a folder.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"output_dir: {output_dir} is a file, not a folder")
    if resume is None and not overwrite and holds_a_run(output_dir):
        raise ValueError(
            f"output_dir: {output_dir} already holds a run: continue it with --trainer.resume auto,"
            " replace it with --overwrite, or choose another folder"
        )
