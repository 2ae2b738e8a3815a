"""Reading the weights of a model folder one tensor at a time, with adapters merged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from bumblebee.checkpoint.adapters.folder import adapter_chain
from bumblebee.checkpoint.adapters.reader import ExpertLayout, merged
from bumblebee.checkpoint.families import expert_shapes, family_of
from bumblebee.checkpoint.hf_folder import TIED_KEY, is_supported_folder, is_tied, load_config
from bumblebee.checkpoint.weight_files import stored_tensors
from bumblebee.checkpoint.weight_mapping import cast


def read_tensors(
    folder: str | Path, dtype: torch.dtype | None = None, base: str | Path | None = None, allow_pickle: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yield every (key, tensor) of a model folder, on the CPU; those of an adapter folder are merged with its base model.

    Keys and shapes are the file's, which differ from the model's in some families.

    Args:
        folder: a model or adapter folder.
        dtype: dtype to cast to; None keeps the file's, for an adapter folder the base model's.
        base: base model of the adapter, instead of the one that its config names.
        allow_pickle: read pickle files if the model has no safetensors files.

    Raises:
        ValueError: a file is damaged, or an adapter does not fit its base model.
    """
    base_folder, *adapter_folders = adapter_chain(folder, base)
    stored = stored_tensors(base_folder, allow_pickle)
    if not adapter_folders:
        yield from ((key, cast(key, tensor, dtype)) for key, tensor in stored)
        return
    tied = is_tied(base_folder)  # a copy of a tied head in the file is unused
    yield from merged(
        ((key, tensor) for key, tensor in stored if not (tied and key == TIED_KEY)),
        adapter_folders,
        dtype,
        _expert_layout(base_folder),
    )


def _expert_layout(folder: Path) -> ExpertLayout:
    if not is_supported_folder(folder):
        return ExpertLayout.of([], {})
    config = load_config(folder)
    return ExpertLayout.of(family_of(config).rules(config), expert_shapes(config))
