"""Folders that hold a LoRA adapter instead of a whole model, and the base models that they name.

An adapter folder holds adapter_config.json, whose ``base_model_name_or_path`` is a model folder or another adapter folder, and
adapter_model.safetensors (PEFT's layout). Only paths and JSON are read here, so torch is not imported.
"""

from __future__ import annotations

from pathlib import Path

from bumblebee.json_files import read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_WHOLE_MODEL = ("model.safetensors", "model.safetensors.index.json")


def is_adapter_folder(folder: str | Path) -> bool:
    """Whether a folder holds an adapter and not also a whole model."""
    folder = Path(folder)
    return (folder / CONFIG).is_file() and not any((folder / name).is_file() for name in _WHOLE_MODEL)


def adapter_chain(folder: str | Path, base: str | Path | None = None) -> list[Path]:
    """The folders whose sum is the model: the base model first, then each adapter in training order, ``folder`` last.

    Args:
        folder: a model or adapter folder.
        base: replaces the base model that ``folder`` names.

    Raises:
        ValueError: a base model is not named, does not exist, or is one of the adapters above it.
    """
    folders = [Path(folder)]
    while is_adapter_folder(folders[-1]):
        below = Path(base) if base is not None and len(folders) == 1 else _existing_base(folders[-1])
        if below.resolve() in [seen.resolve() for seen in folders]:
            names = " -> ".join(str(path) for path in [*folders, below])
            raise ValueError(f"{folder} has no base model, its adapters name each other in a circle: {names}")
        folders.append(below)
    return folders[::-1]


def base_model_folder(folder: str | Path) -> Path:
    """The whole model below all adapters of ``folder``; ``folder`` itself if it is not an adapter.

    Raises:
        ValueError: see :func:`adapter_chain`.
    """
    return adapter_chain(folder)[0]


def base_model_name(folder: Path) -> str | None:
    """``base_model_name_or_path`` of an adapter folder; None if there is no adapter_config.json or it names no base model."""
    return read_json(folder / CONFIG).get("base_model_name_or_path") if (folder / CONFIG).is_file() else None


def _existing_base(folder: Path) -> Path:
    name = base_model_name(folder)
    if not name:
        raise ValueError(f"{folder / CONFIG} names no base model: set base_model_name_or_path to a model folder")
    if not Path(name).is_dir():
        raise ValueError(
            f"{folder / CONFIG} names the base model {name}, which is not there: put it back, or merge with its new"
            f" place, bumblebee merge --adapter {folder} --base FOLDER --output FOLDER"
        )
    return Path(name)


def folder_with_file(folder: str | Path, name: str) -> Path:
    """``folder`` if it has the file or no folder below it has, otherwise the nearest one in the adapter chain that has it.

    Raises:
        ValueError: see :func:`adapter_chain`; only if ``folder`` is an adapter that lacks the file.
    """
    if (Path(folder) / name).is_file() or not is_adapter_folder(folder):
        return Path(folder)
    return next((path for path in reversed(adapter_chain(folder)) if (path / name).is_file()), Path(folder))
