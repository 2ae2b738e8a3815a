"""Where ZeRO keeps the optimizer's numbers, and how to take them out and put them back.

ZeRO (arXiv 1910.02054) flattens parameters and cuts them over ranks; the optimizer then sees long vectors instead of
parameters. ``spans`` says which run of which vector is which run of which parameter on this rank, at every stage alike. It
reads DeepSpeed's private attributes, which is why the version of DeepSpeed is fixed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from bumblebee.checkpoint.sharded_state import WEIGHTS, Piece, PieceReader


@dataclass(frozen=True)
class Span:
    """A run of a parameter's elements, and the vector of the optimizer that holds them.

    Args:
        name: of the parameter.
        parameter: itself; at stage 3 perhaps empty at the moment.
        shape: of the whole parameter.
        start: index of the first element in the flattened parameter.
        numel: how many elements.
        vector: what the optimizer updates, in fp32.
        offset: index of the first element in it.
    """

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]
    start: int
    numel: int
    vector: Tensor
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """The span's part of a tensor with the vector's elements."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)


def spans(model: nn.Module, optimizer: Any, stage: int, rank: int) -> list[Span]:
    """This rank's spans of all trainable parameters.

    Args:
        model: the module that DeepSpeed trains.
        optimizer: what ``deepspeed.initialize`` returned.
        stage: of ZeRO.
        rank: this one.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if stage == 0:
        return [Span(name, p, tuple(p.shape), 0, p.numel(), p, 0) for name, p in named]
    if stage == 3:
        return [span for name, p in named if (span := _span_at_stage_3(name, p, optimizer, rank)).numel > 0]
    vectors = getattr(optimizer, "fp32_groups_flat_partition", None) or optimizer.single_partition_of_fp32_groups
    return [_span_by_mapping(name, p, vectors) for name, p in named if p._hp_mapping is not None]  # type: ignore[attr-defined]


def _span_by_mapping(name: str, parameter: Any, vectors: list[Tensor]) -> Span:
    mapping = parameter._hp_mapping
    here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
    vector = vectors[mapping.param_group_index]
    return Span(name, parameter, tuple(parameter.shape), here.start, here.numel, vector, there.start)


def _span_at_stage_3(name: str, parameter: Any, optimizer: Any, rank: int) -> Span:
    group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = rank * size  # every rank has a share of equal size; the last ones may hold padding
    numel = max(0, min(size, parameter.ds_numel - start))
    return Span(name, parameter, tuple(parameter.ds_shape), start, numel, optimizer.fp32_partitioned_groups_flat[group], offset)


def pieces(found: list[Span], optimizer: Any) -> Iterator[Piece]:
    """The spans' weights and optimizer state, valid until the next one is asked for.

    Raises:
        ValueError: the optimizer keeps something that is neither one number nor one for each element.
    """
    for vector, run in _by_vector(found):
        with in_memory(vector, optimizer):
            yield from (_piece(span, optimizer) for span in run)


def _piece(span: Span, optimizer: Any) -> Piece:
    tensors = {WEIGHTS: span.of(span.vector)}
    for kind, value in state_of(optimizer, span.vector).items():
        if torch.is_tensor(value) and value.numel() == span.vector.numel() and value.dim():
            tensors[kind] = span.of(value)
        elif torch.is_tensor(value) and value.numel() == 1:
            tensors[kind] = value.reshape(())
        elif isinstance(value, int):  # DeepSpeed's own optimizers count their steps so
            tensors[kind] = torch.tensor(value)
        else:
            raise ValueError(f"{type(base_of(optimizer)).__name__} keeps {kind!r}, which is not one number an element")
    return Piece(span.name, span.shape, span.start, span.numel, tensors)


def restore(found: list[Span], optimizer: Any, reader: PieceReader) -> None:
    """Put a checkpoint's pieces, whoever wrote them, into this rank's vectors and optimizer state."""
    for vector, run in _by_vector(found):
        with in_memory(vector, optimizer, changed=True):
            for span in run:
                _restore_span(span, base_of(optimizer).state.setdefault(vector, {}), reader)
    if hasattr(optimizer, "_hp_optimizer_states_linked"):  # stages 1 and 2 look at the state through views of it
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _restore_span(span: Span, entries: dict[str, Any], reader: PieceReader) -> None:
    span.of(span.vector).copy_(reader.read(WEIGHTS, span.name, span.start, span.numel))
    for kind in reader.kinds(span.name):
        value = reader.read(kind, span.name, span.start, span.numel)
        if value.dim() == 0:
            entries[kind] = value.item() if value.dtype == torch.int64 else value
            continue
        if kind not in entries:
            entries[kind] = torch.zeros_like(span.vector, dtype=value.dtype, requires_grad=False)
        span.of(entries[kind]).copy_(value)


def _by_vector(found: list[Span]) -> Iterator[tuple[Tensor, list[Span]]]:
    for _, run in groupby(found, key=lambda span: id(span.vector)):
        spans_of_it = list(run)
        yield spans_of_it[0].vector, spans_of_it


@contextmanager
def in_memory(vector: Tensor, optimizer: Any, changed: bool = False) -> Iterator[None]:
    """Inside, a vector and its optimizer state are in memory, also where they otherwise lie on NVMe.

    Args:
        vector: of the optimizer.
        optimizer: what ``deepspeed.initialize`` returned.
        changed: write them back.
    """
    number = _number_on_nvme(vector, optimizer)
    if number is None:
        yield
        return
    optimizer._optimizer_states_and_gradient_swap_in(number)
    try:
        yield
    finally:
        if changed:
            optimizer._writeback_swap_state(number, write_opt_state=True, write_gradients=False)
        else:
            optimizer._release_swap_buffers(number)


def _number_on_nvme(vector: Tensor, optimizer: Any) -> int | None:
    """Which of stage 3's vectors it is, if that one is kept on NVMe: small ones are not."""
    if not getattr(optimizer, "swap_optimizer", False):
        return None
    number = next(i for i, other in enumerate(optimizer.fp32_partitioned_groups_flat) if other is vector)
    return number if optimizer._swappable_optimizer_subgroup(number) else None


def base_of(optimizer: Any) -> Any:
    """The optimizer that DeepSpeed wraps, or the optimizer itself at stage 0."""
    return getattr(optimizer, "optimizer", optimizer)


def state_of(optimizer: Any, vector: Tensor) -> dict[str, Any]:
    """What the optimizer keeps for a vector; nothing before the first step."""
    return base_of(optimizer).state.get(vector, {})
