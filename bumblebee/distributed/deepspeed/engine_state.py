"""Saving and restoring an engine's training state, sharded over the ranks; see ``checkpoint/sharded_state.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from bumblebee.checkpoint.sharded_state import ShardReader, write_buffers, write_shards
from bumblebee.distributed import process_group
from bumblebee.distributed.deepspeed.optimizer_types import ZeroOptimizer
from bumblebee.distributed.deepspeed.sharded_parameters import full_shape
from bumblebee.distributed.deepspeed.zero_shards import iter_shards, restore_shards, saved_shards


def save(folder: Path, model: nn.Module, optimizer: ZeroOptimizer, stage: int, select: Callable[[str], bool]) -> dict[str, str]:
    """Write this rank's shards of weights and optimizer state into an existing folder, and the buffers on rank 0.

    Args:
        folder: an existing folder.
        model: the module that DeepSpeed trains.
        optimizer: what ``deepspeed.initialize`` returned for it.
        stage: of ZeRO.
        select: whether a model folder has a parameter under a further name.

    Returns:
        The SHA-256 of each file that this rank wrote, by name.

    Raises:
        OSError: they cannot be written.
    """
    rank = process_group.rank()
    digests: dict[str, str] = {}
    if rank == 0 or stage > 0:  # at stage 0 every rank has everything
        count = process_group.world_size() if stage > 0 else 1
        shards = saved_shards(iter_shards(model, optimizer, stage, rank), optimizer)
        aliases = _aliases(model, select)
        named = (replace(shard, aliases=aliases.get(shard.name, [])) for shard in shards)
        digests |= write_shards(folder, f"optimizer-{rank:05d}-of-{count:05d}", named)
    if rank == 0:
        digests |= write_buffers(folder, _buffers(model))
    return digests


def load(folder: Path, model: nn.Module, optimizer: ZeroOptimizer, stage: int) -> None:
    """Restore what ``save`` wrote, at any number of ranks and any stage. Collective.

    Args:
        folder: where ``save`` wrote.
        model: the module that DeepSpeed trains.
        optimizer: what ``deepspeed.initialize`` returned for it.
        stage: of ZeRO.

    Raises:
        ValueError: the folder holds no training state, or that of another model.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    buffers = _buffers(model)
    with ShardReader(folder) as reader:
        shapes = {name: full_shape(p) for name, p in trainable.items()} | _shapes(buffers)
        saved = {**reader.shapes, **_shapes(reader.buffers)}
        if wrong := sorted(set(shapes.items()) ^ set(saved.items())):
            raise ValueError(f"{folder} holds another model: {wrong[0][0]} differs, and {len(wrong) - 1} more")
        for name, buffer in buffers.items():
            buffer.copy_(reader.buffers[name])
        restore_shards(iter_shards(model, optimizer, stage, process_group.rank()), optimizer, reader)
        if stage > 0:  # at stage 0 the optimizer updates the model's own weights
            _restore_model_weights(trainable.items(), stage, reader)


def _restore_model_weights(named: Iterable[tuple[str, nn.Parameter]], stage: int, reader: ShardReader) -> None:
    """Copy the optimizer's fp32 weights into the model's, which may have a lower precision."""
    from deepspeed.runtime.zero import GatheredParameters

    for name, parameter in named:
        if stage < 3:
            parameter.data.copy_(reader.parameter(name))
            continue
        with torch.no_grad(), GatheredParameters([parameter], modifier_rank=0):
            if process_group.is_main():
                parameter.copy_(reader.parameter(name))


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """Persistent buffers, which are the same on all ranks."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {key: tensor for key, tensor in model.state_dict().items() if key not in parameters}


def _aliases(model: nn.Module, select: Callable[[str], bool]) -> dict[str, list[str]]:
    """Further names of parameters that several modules share, such as those of a block that is used twice."""
    first = {id(p): name for name, p in model.named_parameters()}
    aliases: dict[str, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if name != first[id(p)] and select(name):
            aliases.setdefault(first[id(p)], []).append(name)
    return aliases


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
