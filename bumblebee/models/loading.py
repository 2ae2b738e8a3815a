"""Which class a model folder is loaded with: Bumblebee where the architecture is ours, else a model of transformers."""

from __future__ import annotations

from pathlib import Path

import torch

from bumblebee.adapter_folders import base_model_folder
from bumblebee.checkpoint.hf_folder import is_ours
from bumblebee.model import Bumblebee
from bumblebee.models.base import LanguageModel
from bumblebee.models.huggingface import HuggingFaceModel


def load_model(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Read a model folder of any architecture, or an adapter folder on one.

    Args:
        folder: path to config.json and safetensors, or to an adapter.
        dtype: of the weights; None keeps the file's.
        device: where they go.
        trust_remote_code: run code that the folder names or holds.

    Raises:
        ValueError: see ``from_pretrained`` of both classes.
    """
    kind = Bumblebee if is_ours(base_model_folder(folder)) else HuggingFaceModel
    return kind.from_pretrained(folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
