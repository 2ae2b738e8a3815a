"""How large is the key-value cache? As asked for, or by the memory there is."""

from __future__ import annotations

import os
from collections import Counter

import torch
from torch import nn

from bumblebee.inference.device_map import layer_devices
from bumblebee.inference.engine_config import GenerationOptions
from bumblebee.inference.kv_cache import bytes_per_position
from bumblebee.models.base import LanguageModel

PAGE_SIZE = 16  # positions of a page
CUDA_SHARE = 0.8  # of the free memory
LEAST = 2**29  # bytes on a CPU, if so much can be of use; what is never written to takes no memory


def pages_for(model: LanguageModel, options: GenerationOptions) -> int:
    """Pages of an engine's cache.

    Without ``cache_tokens``: on a GPU four fifths of the memory that is free. On a CPU as much memory as the weights take, and
    at least half a GB. Never more than the longest sequences that can run at the same time would fill.

    Raises:
        ValueError: more than there is room for.
    """
    if options.cache_tokens is not None:
        _require_memory(model, options.cache_tokens)
    return -(-(options.cache_tokens or _positions(model, options)) // PAGE_SIZE)


def _positions(model: LanguageModel, options: GenerationOptions) -> int:
    weights = list(model.parameters())
    most = model.config.max_position_embeddings * options.max_running
    room = min(_memory(device, weights) // each for device, each in _bytes_per_position(model).items())
    return min(most, max(room, PAGE_SIZE))


def _bytes_per_position(model: LanguageModel) -> dict[torch.device, int]:
    """What a position takes on each device."""
    one_layer = bytes_per_position(model.config, next(model.parameters()).dtype) // model.config.num_hidden_layers
    return {device: one_layer * number for device, number in Counter(layer_devices(model)).items()}


def _require_memory(model: LanguageModel, cache_tokens: int) -> None:
    """Refuse what no device holds. A CPU's system would give the memory out, and kill the process once it is written to."""
    for device, each in _bytes_per_position(model).items():
        needed, there = cache_tokens * each, _whole_memory(device)
        if needed > there:
            raise ValueError(
                f"cache_tokens: {cache_tokens:,} positions take {needed / 2**30:,.1f} GiB on {device}, which has"
                f" {there / 2**30:,.1f} GiB: at most {there // each:,} fit there"
            )


def _whole_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU, or that the machine has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _memory(device: torch.device, weights: list[nn.Parameter]) -> int:
    """Bytes for the cache on a device."""
    if device.type == "cuda":
        return int(CUDA_SHARE * torch.cuda.mem_get_info(device)[0])
    return max(LEAST, sum(weight.numel() * weight.element_size() for weight in weights if weight.device == device))
