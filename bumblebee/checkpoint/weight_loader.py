"""A model's parameters as places that loaded tensors are put into: on the meta device, whole, or cut over ranks (ZeRO-3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from bumblebee.checkpoint.weight_mapping import Place
from bumblebee.distributed import process_group
from bumblebee.distributed.deepspeed.sharded_parameters import full_shape, local_shard

Device = torch.device | Callable[[str], torch.device]


def tied(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Keys of tensors that are there before, as a tied head is -> the key that comes first."""
    first = {id(tensor): key for key, tensor in reversed(list(tensors.items()))}
    return {key: first[id(tensor)] for key, tensor in tensors.items() if first[id(tensor)] != key}


class Parameters:
    """What a model's state dict asks for.

    Args:
        model: may be on the meta device; its parameters are replaced.
        dtype: to cast to; None keeps that of what is put.
        device: where the parameters go; a function tells it of each key.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None, device: Device) -> None:
        self.model, self.dtype = model, dtype
        self.device_of = device if callable(device) else lambda key: device
        self.ours: dict[str, Tensor] = model.state_dict(keep_vars=True)
        self.tied = tied(self.ours)
        for key in self.tied:
            del self.ours[key]
        self._begun: set[str] = set()  # keys that some part has made room for

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of whole parameters."""
        return {key: full_shape(old) for key, old in self.ours.items()}

    def put(self, place: Place, part: Tensor) -> None:
        """Put a tensor into its place: a whole parameter or buffer, or some rows of one."""
        old = self.ours[place.key]
        dtype = (self.dtype or part.dtype) if isinstance(old, nn.Parameter) else old.dtype
        if (shard := local_shard(old)) is not None:
            _put_share(shard, place.start, part.to(dtype))
            return
        if part.numel() == old.numel():
            self._replace(place.key, part.reshape(old.shape).to(device=self.device_of(place.key), dtype=dtype))
            return
        if place.key not in self._begun:
            self._begun.add(place.key)
            self._replace(place.key, torch.empty(old.shape, dtype=dtype, device=self.device_of(place.key)))
        self.ours[place.key].detach().flatten()[place.start :][: part.numel()].copy_(part.flatten())

    def _replace(self, key: str, tensor: Tensor) -> None:
        module_name, _, name = key.rpartition(".")
        module = self.model.get_submodule(module_name)
        old = self.ours[key]
        self.ours[key] = nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor
        setattr(module, name, self.ours[key])

    def finish(self) -> None:
        """After all: tie what was tied again, and move the buffers that are in no file."""
        for key, first in self.tied.items():
            module_name, _, name = key.rpartition(".")
            setattr(self.model.get_submodule(module_name), name, self.ours[first])
        for place, module in self.model.named_modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(self.device_of(f"{place}.{name}"))


def _put_share(share: Tensor, start: int, part: Tensor) -> None:
    """Built in shards, a rank keeps its own run of a parameter's elements: copy what lies in it."""
    first = process_group.rank() * share.numel()  # of the run, in the whole parameter
    low, high = max(start, first), min(start + part.numel(), first + share.numel())
    if low < high:
        share[low - first : high - first].copy_(part.flatten()[low - start : high - start])
