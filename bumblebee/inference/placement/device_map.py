"""Device map of a model that is too large for one GPU: consecutive layers on several devices.

The parts - embedding, layers, final norm with head - are assigned in order, to as few devices as can hold the model, since only
one of them computes at a time, and balanced over those. A tied head stays with the embedding. Tensors are read from the folder
straight to their device; pre-hooks on the first modules of a device move the hidden states; each layer's KV cache is where its
weights are.

Why not accelerate's planner (1.15): ``infer_auto_device_map`` reserves room for offloading and sends layers to the disk
although the model fits (two devices of 0.6 of its size each), and ``get_balanced_memory`` uses every GPU even if one is enough.
Neither raises if the model does not fit. Both expect visible GPUs; this planner is plain arithmetic, tested on CPU and meta
devices.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bumblebee.checkpoint.adapters.folder import base_model_folder
from bumblebee.checkpoint.hf_folder import is_supported_folder, load_config
from bumblebee.checkpoint.quantize_weights import LoadQuantizer
from bumblebee.checkpoint.weight_files import weight_files
from bumblebee.checkpoint.weight_loader import load_weights
from bumblebee.hardware.cuda import configure_cuda
from bumblebee.hardware.memory_stats import free_gpu_memory
from bumblebee.model import Bumblebee
from bumblebee.models.base import LanguageModel, resolve_model_class
from bumblebee.models.load_context import load_context, meta_parameters
from bumblebee.nn.attention_kernels import AttentionMask
from bumblebee.nn.quantized import Scheme

MEMORY_FRACTION = 0.8  # of a device's free memory, for weights; the rest is for the KV cache and activations
GIGABYTE = 1e9


@dataclass(frozen=True)
class DeviceMap:
    """Devices of the parts of a model.

    Args:
        embedding: device of the embedding table, the positions and the model's inputs.
        layers: device of each layer.
        head: device of the final norm, the head and the model's outputs.
    """

    embedding: torch.device
    layers: tuple[torch.device, ...]
    head: torch.device

    def device_of(self, key: str) -> torch.device:
        """Device of a parameter or buffer, by its key in the state dict."""
        match key.split("."):
            case ["model", "layers", index, *_]:
                return self.layers[int(index)]
            case ["model", "norm", *_] | ["lm_head", *_]:
                return self.head
            case _:
                return self.embedding


def layer_devices(model: LanguageModel) -> list[torch.device]:
    """Device of each layer's weights."""
    first = next(model.parameters())
    return [next(block.parameters(), first).device for block in model.blocks]


def available_devices(device_map: str, device: str) -> tuple[list[torch.device], list[int]]:
    """Return the devices that a model may be spread over, with the free bytes of each: all GPUs, or the CPU if there are none.

    Raises:
        ValueError: the map is unknown, or a device is named as well.
    """
    if device_map != "auto":
        raise ValueError(f"device_map must be auto or null, got {device_map!r}")
    if device not in ("auto", "cuda"):
        raise ValueError(f"device_map: auto uses all GPUs, but device is {device}: leave one of them out")
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if not gpus:
        return [torch.device("cpu")], [2**62]
    configure_cuda(gpus[0])
    return gpus, [free_gpu_memory(gpu) for gpu in gpus]


def load_on_devices(
    folder: str | Path,
    devices: Sequence[torch.device],
    memory: Sequence[int],
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    quantize: Scheme | None = None,
) -> Bumblebee:
    """Load a model folder onto several devices.

    Args:
        folder: model folder.
        devices: in the order of use.
        memory: free bytes of each device.
        dtype: of the weights; None keeps the checkpoint's.
        trust_remote_code: import the class that the folder names.
        quantize: int8 or int4: quantize the linear layers while loading.

    Raises:
        ValueError: the folder has no model, its architecture is not one of Bumblebee's own, or it does not fit.
    """
    if not is_supported_folder(base_model_folder(folder)):
        raise ValueError(f"device_map: only Bumblebee's own architectures can be spread, and {folder} has another one")
    config = load_config(folder)
    with meta_parameters():
        model = resolve_model_class(Bumblebee, folder, config, trust_remote_code)(config)
    quantized = {} if quantize is None else LoadQuantizer(model, quantize).sizes()
    sizes = part_sizes(model, _bytes_per_parameter(folder, model) if dtype is None else dtype.itemsize, quantized)
    assigned = [devices[index] for index in assign_parts(sizes, [int(MEMORY_FRACTION * free) for free in memory])]
    head = assigned[0] if config.tie_word_embeddings else assigned[-1]
    device_map = DeviceMap(assigned[0], tuple(assigned[1:-1]), head)
    with load_context(quantize=quantize):
        load_weights(folder, model, dtype, device_map.device_of)
    model.source = Path(folder)
    if len(set(assigned)) > 1:
        add_transfer_hooks(model, device_map)
    return model


# -- planning ------------------------------------------------------------------------------------------------------------


def part_sizes(model: Bumblebee, bytes_per_parameter: float, quantized: Mapping[Tensor, float] | None = None) -> list[int]:
    """Bytes of the embedding, of each layer, and of the norm with the head; a tied head takes none.

    Args:
        model: may be on the meta device.
        bytes_per_parameter: of the parameters that are not in ``quantized``.
        quantized: bytes per element of the parameters that are quantized.
    """
    size_of = quantized or {}
    decoder, counted = model.model, set[nn.Parameter]()
    inputs = [module for module in (decoder.embed_tokens, decoder.positions, decoder.rotary) if module is not None]
    parts: list[list[nn.Module]] = [inputs, *([layer] for layer in _layers(model)), [decoder.norm, model.lm_head]]
    sizes = []
    for part in parts:
        weights = {weight for module in part for weight in module.parameters()} - counted
        counted |= weights
        sizes.append(round(sum(size_of.get(weight, bytes_per_parameter) * weight.numel() for weight in weights)))
    return sizes


def assign_parts(sizes: Sequence[int], memory: Sequence[int]) -> list[int]:
    """Assign consecutive parts to the fewest devices that hold them all, each filled to about the same fraction.

    Args:
        sizes: bytes of the parts, in the order of computation.
        memory: bytes that each device has for them.

    Returns:
        The device index of each part, non-decreasing.

    Raises:
        ValueError: the devices are too small.
    """
    for count in range(1, len(memory) + 1):
        if assigned := _balanced(sizes, memory[:count]):
            return assigned
    needed, free = sum(sizes) / GIGABYTE, sum(memory) / MEMORY_FRACTION / GIGABYTE
    raise ValueError(
        f"the model's weights take {needed:.3g} GB; {len(memory)} devices with {free:.3g} GB of free memory cannot hold them:"
        f" each is filled to {MEMORY_FRACTION:.0%}, layer by layer"
    )


def _balanced(sizes: Sequence[int], memory: Sequence[int]) -> list[int] | None:
    """The assignment with the smallest fraction of every device's memory, by bisection; None if there is none."""
    best, low, high = _greedy(sizes, memory), 0.0, 1.0
    for _ in range(40 if best else 0):
        middle = (low + high) / 2
        if assigned := _greedy(sizes, [round(middle * room) for room in memory]):
            best, high = assigned, middle
        else:
            low = middle
    return best


def _greedy(sizes: Sequence[int], memory: Sequence[int]) -> list[int] | None:
    """Fill each device in turn with as many parts as fit."""
    assigned: list[int] = []
    index, used = 0, 0
    for size in sizes:
        while used + size > memory[index]:
            index, used = index + 1, 0
            if index == len(memory):
                return None
        assigned.append(index)
        used += size
    return assigned


def _bytes_per_parameter(folder: str | Path, model: Bumblebee) -> float:
    """From the sizes of the base model's files, without reading them; an adapter is small in comparison."""
    return sum(file.stat().st_size for file in weight_files(base_model_folder(folder))) / model.num_parameters()


# -- transfers -----------------------------------------------------------------------------------------------------------


def add_transfer_hooks(model: Bumblebee, device_map: DeviceMap) -> None:
    """Add pre-hooks that move every layer's inputs to its device, and labels to the head's."""
    names = list(inspect.signature(model.forward).parameters)
    targets = {
        "input_ids": device_map.embedding,
        "position_ids": device_map.embedding,
        "labels": device_map.head,
        "logits_at": device_map.head,
    }

    def move_model_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        return (), {name: to_device(value, targets[name]) if name in targets else value for name, value in inputs.items()}

    model.register_forward_pre_hook(move_model_inputs, with_kwargs=True)
    for layer, device in zip(_layers(model), device_map.layers, strict=True):
        layer.register_forward_pre_hook(_MoveInputs(device), with_kwargs=True)
    model.model.norm.register_forward_pre_hook(_MoveInputs(device_map.head), with_kwargs=True)


def _layers(model: Bumblebee) -> list[nn.Module]:
    return list(model.model.layers)


class _MoveInputs:
    """Forward pre-hook that moves a module's inputs to a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return to_device(args, self.device), {name: to_device(value, self.device) for name, value in kwargs.items()}


def to_device(value: object, device: torch.device) -> Any:
    """Move tensors and masks, also in tuples; anything else, such as a cache, is returned unchanged."""
    if isinstance(value, Tensor | AttentionMask):
        return value.to(device)
    return tuple(to_device(item, device) for item in value) if isinstance(value, tuple) else value
