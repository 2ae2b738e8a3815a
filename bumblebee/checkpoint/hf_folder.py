"""Model folders in the Hugging Face layout: how to recognise one, and its config.

A folder holds config.json, generation_config.json and either model.safetensors or shards with model.safetensors.index.json.
An adapter folder (``adapters/folder.py``) stands for its base model with the adapter merged.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from bumblebee.checkpoint.adapters.folder import WEIGHTS, base_model_folder, is_adapter_folder, is_reward_model
from bumblebee.checkpoint.families import is_supported, read_config
from bumblebee.checkpoint.trainer_state import checkpoints
from bumblebee.checkpoint.weight_files import INDEX, SINGLE
from bumblebee.config import BumblebeeConfig
from bumblebee.utils.json_files import read_json

TIED_KEY = "lm_head.weight"  # left out of the files where the head is tied to the embedding, and tied again on load
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

T = TypeVar("T")


def is_model_folder(folder: str | Path) -> bool:
    """Whether a folder holds a model, config.json and its weights, or a complete adapter."""
    folder = Path(folder)
    if is_adapter_folder(folder):
        return (folder / WEIGHTS).is_file()
    return (folder / "config.json").is_file() and any((folder / name).is_file() for name in (SINGLE, INDEX))


def load_config(folder: str | Path) -> BumblebeeConfig:
    """Read the config of a model folder, or of the base model of an adapter folder, with the head of a reward model's adapter.

    Raises:
        ValueError: there is no such folder, it has no config.json, or the config is not supported; the message names the file.
    """
    config = parse_config_json(base_model_folder(folder), read_config)
    return replace(config, score_head=True) if is_reward_model(folder) else config


def is_supported_folder(folder: str | Path) -> bool:
    """Whether Bumblebee implements the architecture of a model folder; others run with transformers.

    Raises:
        ValueError: there is no such folder, or it has no config.json.
    """
    return parse_config_json(folder, is_supported)


def is_tied(folder: Path) -> bool:
    """Whether a model folder's head is tied to its embedding."""
    raw = read_json(folder / "config.json")
    if is_supported(raw):
        return load_config(folder).tie_word_embeddings
    return bool(raw.get("tie_word_embeddings", True))  # the default in transformers


def parse_config_json(folder: str | Path, parse: Callable[[dict[str, Any]], T]) -> T:
    """Parse the config.json of a folder; errors of ``parse`` name the file.

    Raises:
        ValueError: there is no such folder, it has no config.json, or ``parse`` raises.
    """
    file = Path(folder) / "config.json"
    if not file.is_file():
        if not Path(folder).is_dir():
            raise ValueError(f"folder not found: {folder}{_hub_hint(str(folder))}")
        raise ValueError(f"{folder} is not a model folder: config.json not found{_checkpoint_hint(Path(folder))}")
    raw = read_json(file)
    try:
        return parse(raw)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _checkpoint_hint(folder: Path) -> str:
    """A hint for the folder of a run that has not finished, which has checkpoints only."""
    paths = [checkpoint.path for checkpoint in checkpoints(folder) if any(checkpoint.path.glob("*.safetensors"))]
    return f"; the run has not finished, its newest checkpoint is {paths[-1]}" if paths else ""


def _hub_hint(name: str) -> str:
    """A hint for a name that looks like a model hub's: models are never downloaded implicitly."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith(("runs/", "models/")) or Path(name).parent.exists():
        return ""
    target = f"models/{Path(name).name}"
    install = "" if find_spec("huggingface_hub") else "pip install huggingface_hub && "
    command = f"{install}hf download {name} --local-dir {target}"
    return f"; to use the model from the Hugging Face Hub, run: {command}, and name {target}"
