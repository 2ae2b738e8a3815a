"""Loading tensors into a model's parameters, which may be on the meta device, complete, or sharded over ranks (ZeRO-3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from bumblebee.checkpoint.weight_mapping import TensorSlice
from bumblebee.distributed import process_group
from bumblebee.distributed.deepspeed.sharded_parameters import full_shape, local_shard

Device = torch.device | Callable[[str], torch.device]


def tied(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Map the key of each tensor that occurs under an earlier key too, such as a tied head, to that earlier key."""
    first = {id(tensor): key for key, tensor in reversed(list(tensors.items()))}
    return {key: first[id(tensor)] for key, tensor in tensors.items() if first[id(tensor)] != key}


class ParameterLoader:
    """The entries of a model's state dict, as targets for loaded tensors.

    Args:
        model: may be on the meta device; its parameters are replaced.
        dtype: dtype of the parameters; None keeps that of the loaded tensors.
        device: device of the parameters, or a function from a key to its device.
        take: called with the key of each parameter that is complete; returns whether it replaced the module that has it.
    """

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype | None,
        device: Device,
        take: Callable[[str], bool] = lambda key: False,
    ) -> None:
        self.model, self.dtype, self.take = model, dtype, take
        self.device_of = device if callable(device) else lambda key: device
        self.tensors: dict[str, Tensor] = model.state_dict(keep_vars=True)
        self.tied = tied(self.tensors)
        for key in self.tied:
            del self.tensors[key]
        self._allocated: set[str] = set()  # keys of which a slice has been loaded
        self._missing = {key: math.prod(shape) for key, shape in self.shapes.items()}  # elements that are not loaded yet

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Full shapes by key, also of sharded parameters."""
        return {key: full_shape(tensor) for key, tensor in self.tensors.items()}

    def load(self, target: TensorSlice, tensor: Tensor) -> None:
        """Load a tensor into a slice: a complete parameter or buffer, or some rows of it."""
        self._copy(target, tensor)
        self._missing[target.key] -= tensor.numel()
        if not self._missing[target.key] and self.take(target.key):
            self.tensors[target.key] = self.tensors[target.key].to("meta")  # frees it

    def _copy(self, target: TensorSlice, tensor: Tensor) -> None:
        old = self.tensors[target.key]
        dtype = (self.dtype or tensor.dtype) if isinstance(old, nn.Parameter) else old.dtype
        if (shard := local_shard(old)) is not None:
            _copy_overlap(shard, target.start, tensor.to(dtype))
            return
        if tensor.numel() == old.numel():
            self._replace(target.key, tensor.reshape(old.shape).to(device=self.device_of(target.key), dtype=dtype))
            return
        if target.key not in self._allocated:
            self._allocated.add(target.key)
            self._replace(target.key, torch.empty(old.shape, dtype=dtype, device=self.device_of(target.key)))
        self.tensors[target.key].detach().flatten()[target.start :][: tensor.numel()].copy_(tensor.flatten())

    def _replace(self, key: str, tensor: Tensor) -> None:
        module_name, _, name = key.rpartition(".")
        old = self.tensors[key]
        self.tensors[key] = nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor
        setattr(self.model.get_submodule(module_name), name, self.tensors[key])

    def finish(self) -> None:
        """Tie tied parameters again, and move the buffers that are not in the files; call it after the last tensor."""
        for key, first in self.tied.items():
            module_name, _, name = key.rpartition(".")
            module = self.model.get_submodule(module_name)
            if hasattr(module, name):  # a module that was replaced has no such parameter
                setattr(module, name, self.tensors[first])
        for module_name, module in self.model.named_modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(self.device_of(f"{module_name}.{name}"))


def _copy_overlap(shard: Tensor, start: int, tensor: Tensor) -> None:
    """Copy the elements of ``tensor`` that this rank's shard holds; ``start`` is the index of its first in the parameter."""
    shard_start = process_group.rank() * shard.numel()
    low, high = max(start, shard_start), min(start + tensor.numel(), shard_start + shard.numel())
    if low < high:
        shard[low - shard_start : high - shard_start].copy_(tensor.flatten()[low - start : high - start])
