"""Writing adapter folders in PEFT's layout, with the keys of the family's own model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from bumblebee.checkpoint.adapters.folder import CONFIG, SCORE, WEIGHTS
from bumblebee.checkpoint.adapters.fused import fuse, fused_modules
from bumblebee.checkpoint.safetensors_writer import save_file
from bumblebee.checkpoint.weight_mapping import Rule
from bumblebee.utils.json_files import write_json

ADAPTER_NAME = "default"  # PEFT's name for an adapter within a model; it is left out of the files


def is_adapter_key(name: str) -> bool:
    """Whether a parameter of a model belongs to an adapter, as the head of a reward model does."""
    return ".lora_" in name or name == SCORE


def write_adapter_weights(folder: Path, tensors: Iterable[tuple[str, Tensor]], rules: Iterable[Rule] = ()) -> dict[str, str]:
    """Write adapter_model.safetensors with PEFT's keys.

    Args:
        folder: an existing folder.
        tensors: (parameter name, complete tensor) pairs.
        rules: of the base model's family, see ``fused.py``.

    Returns:
        The SHA-256 of the file, by name.

    Raises:
        OSError: the file cannot be written.
    """
    updates: dict[str, Tensor] = {}
    for name, tensor in tensors:
        assert tensor.numel(), f"{name} is empty: it was not gathered"
        updates[file_key(name)] = tensor.detach().cpu().contiguous()
    return {WEIGHTS: save_file(fuse(updates, fused_modules(rules)), folder / WEIGHTS, metadata={"format": "pt"})}


def file_key(name: str) -> str:
    """Convert "model.x.lora_A.default.weight" to "base_model.model.model.x.lora_A.weight"."""
    key = "base_model.model." + name.replace(f".{ADAPTER_NAME}.", ".")
    return key.removesuffix(".weight") if ".lora_magnitude_vector." in key else key


def write_adapter_config(folder: Path, settings: Mapping[str, object]) -> None:
    """Write adapter_config.json."""
    write_json(folder / CONFIG, settings)
