"""Placement: the layers of a model that is too large for one device, spread over several.

Embedding, layers, and last norm with head are cut into runs that follow each other, one for each device; a device gets a share
of them that fits its memory. As few devices as can hold the model are used: one computes while the others wait, so more make
nothing faster. A tied head stays with the embedding. Tensors are read from the folder straight to their device; hidden states
move in hooks before the first layer of a device, and the key-value cache of a layer lies where its weights are.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bumblebee.adapter_folders import base_model_folder
from bumblebee.checkpoint.hf_folder import is_ours, load_config, load_weights, parameters_on_meta, weight_files
from bumblebee.model import Bumblebee
from bumblebee.models.base import LanguageModel
from bumblebee.models.custom_class import class_for
from bumblebee.nn.attention_kernels import AttentionMask

SHARE = 0.8  # of a device's free memory for weights; the rest is for the cache and what is being computed
GIGABYTE = 1e9


@dataclass(frozen=True)
class Placement:
    """Where the parts of a model are.

    Args:
        embedding: device of the embedding table, the positions and what goes in.
        layers: device of each layer.
        head: device of the head and what comes out.
    """

    embedding: torch.device
    layers: tuple[torch.device, ...]
    head: torch.device

    def of(self, key: str) -> torch.device:
        """Device of a parameter or buffer, by its key in the state dict."""
        match key.split("."):
            case ["model", "layers", number, *_]:
                return self.layers[int(number)]
            case ["model", "norm", *_] | ["lm_head", *_]:
                return self.head
            case _:
                return self.embedding


def layer_devices(model: LanguageModel) -> list[torch.device]:
    """Device of each layer's weights."""
    first = next(model.parameters())
    return [next(block.parameters(), first).device for block in model.blocks]


def devices_for(device_map: str, device: str) -> tuple[list[torch.device], list[int]]:
    """The devices that a model may be spread over, with the free bytes of each: all GPUs, or the CPU where there are none.

    Raises:
        ValueError: an unknown map, or a device that is named beside it.
    """
    if device_map != "auto":
        raise ValueError(f"device_map must be auto or null, got {device_map!r}")
    if device not in ("auto", "cuda"):
        raise ValueError(f"device_map: auto takes all GPUs, device says {device}: leave one of them out")
    found = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
    if not found:
        return [torch.device("cpu")], [2**62]
    return found, [torch.cuda.mem_get_info(each)[0] for each in found]


def spread(
    folder: str | Path,
    devices: Sequence[torch.device],
    memory: Sequence[int],
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> Bumblebee:
    """Read a model folder onto several devices.

    Args:
        folder: the model folder.
        devices: in the order in which they are to be used.
        memory: free bytes of each.
        dtype: of the weights; None keeps the file's.
        trust_remote_code: import the class that the folder names.

    Raises:
        ValueError: no model folder, a model that Bumblebee does not compute itself, or one too large for all of them.
    """
    if not is_ours(base_model_folder(folder)):
        raise ValueError(f"device_map: only models that Bumblebee computes itself can be spread, and {folder} holds another")
    config = load_config(folder)
    with parameters_on_meta():
        model = class_for(Bumblebee, folder, config, trust_remote_code)(config)
    sizes = part_sizes(model, _bytes_per_parameter(folder, model) if dtype is None else dtype.itemsize)
    numbers = plan(sizes, [int(SHARE * each) for each in memory])
    places = [devices[number] for number in numbers]
    tied = config.tie_word_embeddings
    placement = Placement(places[0], tuple(places[1:-1]), places[0] if tied else places[-1])
    load_weights(folder, model, dtype, placement.of)
    model.source = Path(folder)
    if len(set(places)) > 1:
        connect(model, placement)
    return model


def part_sizes(model: Bumblebee, bytes_per_parameter: float) -> list[int]:
    """Bytes of the embedding, of each layer, and of the norm and head; a tied head takes none."""
    decoder, seen = model.model, set[nn.Parameter]()
    below = [part for part in (decoder.embed_tokens, decoder.positions, decoder.rotary) if part is not None]
    parts: list[list[Any]] = [below, *([layer] for layer in decoder.layers)]
    sizes = []
    for part in [*parts, [decoder.norm, model.lm_head]]:
        weights = {weight for module in part for weight in module.parameters()} - seen
        seen |= weights
        sizes.append(round(bytes_per_parameter * sum(weight.numel() for weight in weights)))
    return sizes


def plan(sizes: Sequence[int], memory: Sequence[int]) -> list[int]:
    """Which device each part goes to: the first few that hold all, each filled to about the same share of its memory.

    Args:
        sizes: bytes of the parts, in the order in which they are computed.
        memory: bytes that each device has for them.

    Returns:
        A device's number for each part; the numbers never fall.

    Raises:
        ValueError: the devices are too small.
    """
    for count in range(1, len(memory) + 1):
        if placed := _evenly(sizes, memory[:count]):
            return placed
    needed, there = sum(sizes) / GIGABYTE, sum(memory) / SHARE / GIGABYTE
    raise ValueError(
        f"the model's weights take {needed:.3g} GB; {len(memory)} devices with {there:.3g} GB of free memory cannot hold them:"
        f" each is filled to {SHARE:.0%}, layer by layer"
    )


def _evenly(sizes: Sequence[int], memory: Sequence[int]) -> list[int] | None:
    """The plan with the smallest share of every device's memory, found by halving; None if there is none."""
    best, low, high = _filled(sizes, memory), 0.0, 1.0
    for _ in range(40 if best else 0):
        middle = (low + high) / 2
        if placed := _filled(sizes, [round(middle * each) for each in memory]):
            best, high = placed, middle
        else:
            low = middle
    return best


def _filled(sizes: Sequence[int], memory: Sequence[int]) -> list[int] | None:
    """Each device in turn takes as many parts as fit."""
    placed: list[int] = []
    number, used = 0, 0
    for size in sizes:
        while used + size > memory[number]:
            number, used = number + 1, 0
            if number == len(memory):
                return None
        placed.append(number)
        used += size
    return placed


def _bytes_per_parameter(folder: str | Path, model: Bumblebee) -> float:
    """Of the folder's files, so that nothing has to be read; an adapter is small beside its base model."""
    return sum(file.stat().st_size for file in weight_files(base_model_folder(folder))) / model.num_parameters()


# -- moving between devices ----------------------------------------------------------------------------------------------


def connect(model: Bumblebee, placement: Placement) -> None:
    """Let every layer's input come to its device, and the model's results to the head's."""
    names = list(inspect.signature(model.forward).parameters)

    def bring_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        goals = {"input_ids": placement.embedding, "position_ids": placement.embedding}
        goals |= {"labels": placement.head, "logits_at": placement.head}
        return (), {name: moved(value, goals[name]) if name in goals else value for name, value in given.items()}

    model.register_forward_pre_hook(bring_inputs, with_kwargs=True)
    layers: Any = model.model.layers
    for layer, device in zip(layers, placement.layers, strict=True):
        layer.register_forward_pre_hook(_Bring(device), with_kwargs=True)
    norm: nn.Module = model.model.norm
    norm.register_forward_pre_hook(_Bring(placement.head), with_kwargs=True)


class _Bring:
    """A hook that moves what a module is called with to a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return moved(args, self.device), {name: moved(value, self.device) for name, value in kwargs.items()}


def moved(value: Any, device: torch.device) -> Any:
    """Tensors and masks, also in tuples, on a device; anything else, such as a cache, as it is."""
    if isinstance(value, torch.Tensor | AttentionMask):
        return value.to(device)
    return tuple(moved(each, device) for each in value) if isinstance(value, tuple) else value
