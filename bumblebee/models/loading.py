"""Loading a model folder of any architecture: with Bumblebee if it is supported, else with transformers."""

from __future__ import annotations

from pathlib import Path

import torch

from bumblebee.checkpoint.adapters.folder import base_model_folder
from bumblebee.checkpoint.hf_folder import is_supported_folder
from bumblebee.model import Bumblebee
from bumblebee.models.base import LanguageModel
from bumblebee.models.huggingface import HuggingFaceModel
from bumblebee.models.load_context import load_context
from bumblebee.nn.quantized import Scheme


def load_model(
    folder: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    quantize: Scheme | None = None,
) -> LanguageModel:
    """Load a model folder of any architecture, or an adapter folder merged with its base model.

    Args:
        folder: path to config.json and safetensors files, or to an adapter.
        dtype: dtype of the weights; None keeps the dtype of the files.
        device: device of the weights.
        trust_remote_code: run code that the folder names or holds.
        quantize: int8 or int4: quantize the linear layers while loading, for inference; None keeps them.

    Raises:
        ValueError: see ``Bumblebee.from_pretrained`` and ``HuggingFaceModel.from_pretrained``.
    """
    model_class = Bumblebee if is_supported_folder(base_model_folder(folder)) else HuggingFaceModel
    with load_context(quantize=quantize):
        return model_class.from_pretrained(folder, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
