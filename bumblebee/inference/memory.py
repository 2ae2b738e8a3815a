"""How large is the key-value cache? As asked for, or by the memory there is."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from bumblebee.inference.cache import bytes_per_position
from bumblebee.inference.options import GenerationOptions
from bumblebee.inference.placement import layer_devices
from bumblebee.models import LanguageModel

PAGE_SIZE = 16  # positions of a page
CUDA_SHARE = 0.8  # of the free memory
LEAST = 2**29  # bytes on a CPU, if so much can be of use; what is never written to takes no memory


def pages_for(model: LanguageModel, options: GenerationOptions) -> int:
    """Pages of an engine's cache.

    Without ``cache_tokens``: on a GPU four fifths of the memory that is free. On a CPU as much memory as the weights take, and
    at least half a GB. Never more than the longest sequences that can run at the same time would fill.
    """
    return -(-(options.cache_tokens or _positions(model, options)) // PAGE_SIZE)


def _positions(model: LanguageModel, options: GenerationOptions) -> int:
    weights = list(model.parameters())
    most = model.config.max_position_embeddings * options.max_running
    one_layer = bytes_per_position(model.config, weights[0].dtype) // model.config.num_hidden_layers
    layers = Counter(layer_devices(model))
    room = min(_memory(device, weights) // (one_layer * number) for device, number in layers.items())
    return min(most, max(room, PAGE_SIZE))


def _memory(device: torch.device, weights: list[nn.Parameter]) -> int:
    """Bytes for the cache on a device."""
    if device.type == "cuda":
        return int(CUDA_SHARE * torch.cuda.mem_get_info(device)[0])
    return max(LEAST, sum(weight.numel() * weight.element_size() for weight in weights if weight.device == device))
