"""Adapter folders, which contain a LoRA adapter instead of a complete model, and the base models that they name.

An adapter folder contains adapter_config.json, whose ``base_model_name_or_path`` is a model folder or another adapter folder,
and adapter_model.safetensors (PEFT's layout). Only paths and JSON are read here, so torch is not imported.
"""

from __future__ import annotations

from pathlib import Path

from bumblebee.utils.json_files import read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SCORE = "score.weight"  # of a reward model's head, which an adapter folder holds beside the updates
_SCORING_TASK = "SEQ_CLS"  # PEFT's task type of a model with such a head
_MODEL_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def is_adapter_folder(folder: str | Path) -> bool:
    """Whether a folder contains an adapter and not also a complete model."""
    folder = Path(folder)
    return (folder / CONFIG).is_file() and not any((folder / name).is_file() for name in _MODEL_WEIGHTS)


def adapter_chain(folder: str | Path, base: str | Path | None = None) -> list[Path]:
    """List the base model's folder, then each adapter in training order, ending with ``folder``.

    Args:
        folder: a model or adapter folder.
        base: base model to use instead of the one that ``folder`` names.

    Raises:
        ValueError: a base model is not named, does not exist, or the adapters name each other in a cycle.
    """
    folders = [Path(folder)]
    while is_adapter_folder(folders[-1]):
        below = Path(base) if base is not None and len(folders) == 1 else _existing_base(folders[-1])
        if below.resolve() in [seen.resolve() for seen in folders]:
            names = " -> ".join(str(path) for path in [*folders, below])
            raise ValueError(f"{folder} has no base model: its adapters name each other in a cycle: {names}")
        folders.append(below)
    return folders[::-1]


def base_model_folder(folder: str | Path) -> Path:
    """Return the folder of the base model below all adapters of ``folder``, or ``folder`` itself if it is not an adapter.

    Raises:
        ValueError: see ``adapter_chain``.
    """
    return adapter_chain(folder)[0]


def is_reward_model(folder: str | Path, base: str | Path | None = None) -> bool:
    """Whether a model or adapter folder scores texts instead of predicting tokens.

    Raises:
        ValueError: see ``adapter_chain``.
    """
    model, *adapters = adapter_chain(folder, base)
    if any(read_json(adapter / CONFIG).get("task_type") == _SCORING_TASK for adapter in adapters):
        return True
    config = read_json(model / "config.json") if (model / "config.json").is_file() else {}
    return any(str(name).endswith("ForSequenceClassification") for name in config.get("architectures") or ())


def check_generates(folder: str | Path) -> None:
    """Check that a folder does not hold a reward model.

    Raises:
        ValueError: it does.
    """
    if is_reward_model(folder):
        raise ValueError(
            f"{folder} is a reward model: it scores texts and cannot generate them; it can be a reward of bumblebee.GRPO, as"
            " bumblebee.rewards.RewardModel"
        )


def base_model_name(folder: Path) -> str | None:
    """Read ``base_model_name_or_path`` of an adapter folder; None without adapter_config.json or without a name in it."""
    return read_json(folder / CONFIG).get("base_model_name_or_path") if (folder / CONFIG).is_file() else None


def _existing_base(folder: Path) -> Path:
    name = base_model_name(folder)
    if not name:
        raise ValueError(f"{folder / CONFIG} names no base model: set base_model_name_or_path to a model folder")
    if not Path(name).is_dir():
        raise ValueError(
            f"{folder / CONFIG} names a base model that has moved: folder not found: {name}; restore it, or merge with its new"
            f" path: bumblebee merge --adapter {folder} --base FOLDER --output FOLDER"
        )
    return Path(name)


def folder_with_file(folder: str | Path, name: str) -> Path:
    """Return the nearest folder in the adapter chain that has a file, or ``folder`` if none has.

    Raises:
        ValueError: see ``adapter_chain``; only for an adapter folder without the file.
    """
    if (Path(folder) / name).is_file() or not is_adapter_folder(folder):
        return Path(folder)
    return next((path for path in reversed(adapter_chain(folder)) if (path / name).is_file()), Path(folder))
