"""Where ZeRO keeps each parameter's optimizer state, and how to save and restore it.

ZeRO (arXiv 1910.02054) flattens parameters and partitions them over ranks; the optimizer then updates long flat tensors
instead of parameters. A ``Shard`` maps a range of a parameter to a range of a flat tensor on this rank, the same way at every
stage. This reads DeepSpeed's private attributes, which is why its version is pinned.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from bumblebee.checkpoint import state_tree
from bumblebee.checkpoint.sharded_state import WEIGHTS, WHOLE, SavedShard, ShardReader
from bumblebee.distributed.deepspeed.optimizer_types import BaseOptimizer, OptimizerState, ZeroOptimizer
from bumblebee.distributed.deepspeed.sharded_parameters import full_numel, full_shape
from bumblebee.utils.json_files import JSON


class _FragmentAddress(Protocol):
    start: int
    numel: int


class _FragmentMapping(Protocol):
    """DeepSpeed's ``_hp_mapping`` of a parameter. lp: the model's low-precision weights; hp: the optimizer's fp32 copy."""

    lp_fragment_address: _FragmentAddress
    hp_fragment_address: _FragmentAddress
    param_group_index: int


@dataclass(frozen=True)
class Shard:
    """A range of a parameter's elements, and where the optimizer keeps it.

    Args:
        name: the parameter's.
        shape: of the whole parameter.
        start: index of the first element in the flattened parameter.
        numel: number of elements.
        flat: the fp32 tensor that the optimizer updates.
        offset: index of the first element in ``flat``.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    flat: Tensor
    offset: int

    def view(self, flat: Tensor) -> Tensor:
        """The shard's elements of ``flat``, or of optimizer state with as many elements: (numel,)."""
        return flat.detach().view(-1).narrow(0, self.offset, self.numel)


def iter_shards(model: nn.Module, optimizer: ZeroOptimizer, stage: int, rank: int) -> Iterator[Shard]:
    """Yield this rank's shard of each trainable parameter that it has one of.

    Args:
        model: the module that DeepSpeed trains.
        optimizer: what ``deepspeed.initialize`` returned for it.
        stage: of ZeRO.
        rank: this process's.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if stage == 0:
        yield from (Shard(name, tuple(p.shape), 0, p.numel(), p, 0) for name, p in named)
    elif stage == 3:
        yield from (shard for name, p in named if (shard := _shard_at_stage_3(name, p, optimizer, rank)).numel > 0)
    else:
        flats = getattr(optimizer, "fp32_groups_flat_partition", None) or optimizer.single_partition_of_fp32_groups
        mapped = ((name, p, vars(p)["_hp_mapping"]) for name, p in named)
        yield from (_shard_at_stage_1_or_2(name, p, mapping, flats) for name, p, mapping in mapped if mapping is not None)


def _shard_at_stage_1_or_2(name: str, parameter: nn.Parameter, mapping: _FragmentMapping, flats: list[Tensor]) -> Shard:
    in_parameter, in_flat = mapping.lp_fragment_address, mapping.hp_fragment_address
    flat = flats[mapping.param_group_index]
    return Shard(name, tuple(parameter.shape), in_parameter.start, in_parameter.numel, flat, in_flat.start)


def _shard_at_stage_3(name: str, parameter: nn.Parameter, optimizer: ZeroOptimizer, rank: int) -> Shard:
    group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = rank * size  # every rank has a shard of the same size; those of the last ranks may hold padding
    numel = max(0, min(size, full_numel(parameter) - start))
    return Shard(name, full_shape(parameter), start, numel, optimizer.fp32_partitioned_groups_flat[group], offset)


def saved_shards(shards: Iterable[Shard], optimizer: ZeroOptimizer) -> Iterator[SavedShard]:
    """Yield the weights and optimizer state of each shard; valid until the next one is yielded.

    Raises:
        ValueError: the optimizer keeps state other than tensors, numbers, strings, and lists or dicts of these.
    """
    for flat, group in _by_flat(shards):
        with in_memory(flat, optimizer):
            yield from (_saved_shard(shard, optimizer) for shard in group)


def _saved_shard(shard: Shard, optimizer: ZeroOptimizer) -> SavedShard:
    tensors = {WEIGHTS: shard.view(shard.flat)}
    other: dict[str, JSON] = {}
    whole: dict[str, Tensor] = {}  # by path
    for kind, value in state_of(optimizer, shard.flat).items():
        if torch.is_tensor(value) and value.dim() and value.shape == shard.flat.shape:
            tensors[kind] = shard.view(value)
        elif torch.is_tensor(value) and value.numel() == 1 and value.dim() < 2:
            tensors[kind] = value.reshape(())
        elif type(value) is int:  # the step count of DeepSpeed's own optimizers
            tensors[kind] = torch.tensor(value)
        else:
            other[kind] = _flatten(kind, value, whole, optimizer)
    if whole and shard.flat.shape != shard.shape:
        raise ValueError(f"cannot save {next(iter(whole))!r} of {_name_of(optimizer)}: only trainer.zero_stage 0 can")
    tensors |= {f"{WHOLE}/{path}": tensor for path, tensor in whole.items()}
    return SavedShard(shard.name, shard.shape, shard.start, shard.numel, tensors, other)


def _flatten(kind: str, value: object, whole: dict[str, Tensor], optimizer: ZeroOptimizer) -> JSON:
    try:
        return state_tree.flatten(value, kind, whole)
    except TypeError as error:
        expected = "expected tensors, numbers, strings, or lists and dicts of these"
        raise ValueError(f"cannot save the state of {_name_of(optimizer)}: {error}; {expected}") from error


def _name_of(optimizer: ZeroOptimizer) -> str:
    return type(base_optimizer(optimizer)).__name__


def unsharded_state(state: OptimizerState, parameter: Tensor) -> Iterator[str]:
    """Yield the kinds of optimizer state that cannot be sharded with their parameter: neither per element nor one value."""
    for kind, value in state.items():
        if value is not None and not isinstance(value, bool | int | float | str):
            if not (torch.is_tensor(value) and value.numel() in (1, parameter.numel())):
                yield kind


def restore_shards(shards: Iterable[Shard], optimizer: ZeroOptimizer, reader: ShardReader) -> None:
    """Copy a checkpoint's weights and optimizer state into this rank's shards, whatever ranks and stage wrote them."""
    for flat, group in _by_flat(shards):
        step_device = _device_of_step(flat, base_optimizer(optimizer))
        with in_memory(flat, optimizer, changed=True):
            for shard in group:
                _restore(shard, base_optimizer(optimizer).state.setdefault(flat, {}), reader, step_device)
    if hasattr(optimizer, "_hp_optimizer_states_linked"):  # stages 1 and 2 keep views of the state
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _device_of_step(flat: Tensor, optimizer: BaseOptimizer) -> torch.device:
    """Where an optimizer of torch keeps the step count of a flat tensor, by the rule of its ``load_state_dict``.

    A fused or capturable one needs it on the tensor's device (pytorch/pytorch#104767); the others would wait for the GPU.
    """
    on_device = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    return flat.device if on_device else torch.device("cpu")


def _restore(shard: Shard, state: OptimizerState, reader: ShardReader, step_device: torch.device) -> None:
    shard.view(shard.flat).copy_(reader.read(WEIGHTS, shard.name, shard.start, shard.numel))
    state.update(cast("OptimizerState", reader.other_state(shard.name, shard.flat.device)))
    for kind in reader.kinds(shard.name):
        value = reader.read(kind, shard.name, shard.start, shard.numel)
        if value.dim() == 0:
            device = step_device if kind == "step" else shard.flat.device
            state[kind] = int(value) if value.dtype == torch.int64 else value.to(device)
            continue
        if not isinstance(whole := state.get(kind), Tensor):
            whole = state[kind] = torch.zeros_like(shard.flat, dtype=value.dtype, requires_grad=False)
        shard.view(whole).copy_(value)


def _by_flat(shards: Iterable[Shard]) -> Iterator[tuple[Tensor, list[Shard]]]:
    for _, group in groupby(shards, key=lambda shard: id(shard.flat)):
        of_flat = list(group)
        yield of_flat[0].flat, of_flat


@contextmanager
def in_memory(flat: Tensor, optimizer: ZeroOptimizer, changed: bool = False) -> Iterator[None]:
    """Hold a flat tensor and its optimizer state in memory, swapping them in from NVMe if they are offloaded.

    Args:
        flat: a flat tensor of the optimizer.
        optimizer: what ``deepspeed.initialize`` returned.
        changed: write them back afterwards.
    """
    index = _swapped_index(flat, optimizer)
    if index is None:
        yield
        return
    optimizer._optimizer_states_and_gradient_swap_in(index)
    try:
        yield
    finally:
        if changed:
            optimizer._writeback_swap_state(index, write_opt_state=True, write_gradients=False)
        else:
            optimizer._release_swap_buffers(index)


def _swapped_index(flat: Tensor, optimizer: ZeroOptimizer) -> int | None:
    """The index of a flat tensor that is offloaded to NVMe; None for one in memory, as small ones are."""
    if not getattr(optimizer, "swap_optimizer", False):
        return None
    index = next(i for i, other in enumerate(optimizer.fp32_partitioned_groups_flat) if other is flat)
    return index if optimizer._swappable_optimizer_subgroup(index) else None


def base_optimizer(optimizer: ZeroOptimizer) -> BaseOptimizer:
    """The optimizer that DeepSpeed wraps; at stage 0, the optimizer itself."""
    return getattr(optimizer, "optimizer", optimizer)


def algorithm_of(optimizer: BaseOptimizer) -> str:
    """Name what an optimizer computes: its class, or that of torch which gives the same results, and what changes its state."""
    name = type(optimizer).__name__
    options = optimizer.param_groups[0]
    if name in ("FusedAdam", "DeepSpeedCPUAdam"):
        name = "AdamW" if getattr(optimizer, "adam_w_mode", True) else "Adam"
    elif name == "Adam" and options.get("decoupled_weight_decay"):
        name = "AdamW"
    return " with ".join([name, *(option for option in ("amsgrad", "centered") if options.get(option))])


def state_of(optimizer: ZeroOptimizer, flat: Tensor) -> OptimizerState:
    """The optimizer's state of a flat tensor; empty before the first step."""
    return base_optimizer(optimizer).state.get(flat, {})
