"""How the tensors of a family's files map to the model's: lossless rules, applied to one tensor at a time.

A key without a rule is the same in the file and in the model. A rule relates tensors of the file to tensors of the model that
hold the same elements: one tensor of the file is split into several of the model, or several are stacked into one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """Tensors of a file and of a model that hold the same elements; one side is a single tensor. Built by the methods below.

    Args:
        file_keys: keys in the file.
        model_keys: keys in the model.
        stacked: the model's tensor has a leading dimension that the file's tensors lack.
    """

    file_keys: tuple[str, ...]
    model_keys: tuple[str, ...]
    stacked: bool = False

    @classmethod
    def rename(cls, file_key: str, model_key: str) -> Rule:
        """Map a tensor to the same tensor under another key."""
        return cls((file_key,), (model_key,))

    @classmethod
    def split(cls, file_key: str, model_keys: Iterable[str]) -> Rule:
        """Split the file's tensor along its first dimension into tensors of the model, whose sizes may differ."""
        return cls((file_key,), tuple(model_keys))

    @classmethod
    def stack(cls, file_keys: Iterable[str], model_key: str) -> Rule:
        """Stack the file's tensors, in order, into one tensor (N, rows, ...): one or more of them for each of the N."""
        return cls(tuple(file_keys), (model_key,), stacked=True)


@dataclass(frozen=True)
class TensorSlice:
    """A contiguous range of a model tensor's elements, which a tensor of the file (or a part of one) fills.

    Args:
        key: of the model's tensor.
        start: index of the first element in the flattened tensor.
        shape: of the slice.
    """

    key: str
    start: int
    shape: tuple[int, ...]


def slices_by_file_key(rules: Iterable[Rule], shapes: Mapping[str, Sequence[int]]) -> dict[str, list[TensorSlice]]:
    """Map each key that a file must have to the slices that its tensor fills, in order along its first dimension.

    Args:
        rules: of the family.
        shapes: of the model's tensors. A rule about a tensor that is not among them is skipped: subclasses may drop parts.
    """
    slices: dict[str, list[TensorSlice]] = {}
    covered: set[str] = set()
    for rule in rules:
        if all(key in shapes for key in rule.model_keys):
            slices.update(_slices(rule, shapes))
            covered.update(rule.model_keys)
    return slices | {key: [TensorSlice(key, 0, tuple(shape))] for key, shape in shapes.items() if key not in covered}


def _slices(rule: Rule, shapes: Mapping[str, Sequence[int]]) -> dict[str, list[TensorSlice]]:
    if not rule.stacked:
        return {rule.file_keys[0]: [TensorSlice(key, 0, tuple(shapes[key])) for key in rule.model_keys]}
    count, (key,) = len(rule.file_keys), rule.model_keys
    outer, rows, *rest = shapes[key]
    shape = (outer * rows // count, *rest)
    return {name: [TensorSlice(key, index * math.prod(shape), shape)] for index, name in enumerate(rule.file_keys)}


def cast(key: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Cast a tensor; None keeps its dtype. Router bias corrections are never cast: their updates are too small for 16 bits."""
    return tensor if dtype is None or key.endswith(".e_score_correction_bias") else tensor.to(dtype)


def file_shape(slices: Sequence[TensorSlice]) -> tuple[int, ...]:
    """The shape of the file's tensor that fills these slices."""
    first = slices[0].shape
    return (sum(part.shape[0] for part in slices), *first[1:]) if first else first


def split_for(slices: Sequence[TensorSlice], tensor: Tensor) -> Sequence[Tensor]:
    """Split a tensor of the file into one view for each slice."""
    return tensor.split([part.shape[0] for part in slices]) if len(slices) > 1 else [tensor]


def to_file_tensors(rules: Iterable[Rule], tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Convert the model's (key, tensor) pairs to the file's. Streams tensors; only parts of a fused tensor are buffered."""
    by_key = {key: rule for rule in rules for key in rule.model_keys}
    buffered: dict[Rule, dict[str, Tensor]] = {}
    for key, tensor in tensors:
        rule = by_key.get(key)
        if rule is None:
            yield key, tensor
        elif rule.stacked:
            yield from zip(rule.file_keys, tensor.flatten(0, 1).chunk(len(rule.file_keys)), strict=True)
        elif len(parts := buffered.setdefault(rule, {}) | {key: tensor}) < len(rule.model_keys):
            buffered[rule] = parts
        else:
            del buffered[rule]
            yield rule.file_keys[0], torch.cat([parts[name] for name in rule.model_keys]) if len(parts) > 1 else tensor
    for incomplete in buffered.values():  # of a model that lacks some of the parts; see ``slices_by_file_key``
        yield from incomplete.items()
