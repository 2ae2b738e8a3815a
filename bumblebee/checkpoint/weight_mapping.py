"""How the tensors of a family's files become ours, and back: rules that lose nothing, one tensor in memory at a time.

A key that no rule names is the same on both sides. A rule says that some tensors of a file and some of ours are the same
numbers, cut at other places: one tensor of the file is split into several of ours, or several are stacked into one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """Tensors of a file and of ours that hold the same numbers; one side is a single tensor. Make one with the methods below.

    Args:
        theirs: keys in the file.
        ours: keys in our model.
        stacked: our tensor has a dimension in front that theirs do not have.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    stacked: bool = False

    @classmethod
    def rename(cls, theirs: str, ours: str) -> Rule:
        """The same tensor has another name."""
        return cls((theirs,), (ours,))

    @classmethod
    def split(cls, theirs: str, ours: Iterable[str]) -> Rule:
        """Their tensor is ours, one behind the other along the first dimension; ours may have different sizes."""
        return cls((theirs,), tuple(ours))

    @classmethod
    def stack(cls, theirs: Iterable[str], ours: str) -> Rule:
        """Our tensor (N, rows, ...) is theirs, in order along the rows: N of them, or a multiple for parts of the rows."""
        return cls(tuple(theirs), (ours,), stacked=True)


@dataclass(frozen=True)
class Place:
    """Where a part of a file's tensor goes.

    Args:
        key: of ours.
        start: index of its first element in ours, flattened.
        shape: of the part.
    """

    key: str
    start: int
    shape: tuple[int, ...]


def places(rules: Iterable[Rule], shapes: Mapping[str, Sequence[int]]) -> dict[str, list[Place]]:
    """Each key that a file must have -> where its parts go, in order along its first dimension.

    Args:
        rules: of the family.
        shapes: of our tensors. A rule about one that is not there does not count: a model may have other parts.
    """
    found = {}
    named: set[str] = set()
    for rule in rules:
        if all(key in shapes for key in rule.ours):
            found.update(_places(rule, shapes))
            named.update(rule.ours)
    return found | {key: [Place(key, 0, tuple(shape))] for key, shape in shapes.items() if key not in named}


def _places(rule: Rule, shapes: Mapping[str, Sequence[int]]) -> dict[str, list[Place]]:
    if not rule.stacked:
        return {rule.theirs[0]: [Place(key, 0, tuple(shapes[key])) for key in rule.ours]}
    count, (key,) = len(rule.theirs), rule.ours
    outer, rows, *rest = shapes[key]
    part = (outer * rows // count, *rest)
    return {name: [Place(key, index * math.prod(part), part)] for index, name in enumerate(rule.theirs)}


def cast(key: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor in another dtype, None for its own; one whose steps are too small for half precision stays as it is."""
    return tensor if dtype is None or key.endswith(".e_score_correction_bias") else tensor.to(dtype)


def shape_of(parts: Sequence[Place]) -> tuple[int, ...]:
    """Of the file's tensor that these are the parts of."""
    first = parts[0].shape
    return (sum(part.shape[0] for part in parts), *first[1:]) if first else first


def cut(tensor: Tensor, parts: Sequence[Place]) -> Sequence[Tensor]:
    """A file's tensor -> its parts, as views."""
    return tensor.split([part.shape[0] for part in parts]) if len(parts) > 1 else [tensor]


def as_stored(rules: Iterable[Rule], tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Our (key, tensor) pairs -> those of the family's files. Parts of a tensor wait for each other, nothing else does."""
    by_key = {key: rule for rule in rules for key in rule.ours}
    waiting: dict[Rule, dict[str, Tensor]] = {}
    for key, tensor in tensors:
        rule = by_key.get(key)
        if rule is None:
            yield key, tensor
        elif rule.stacked:
            yield from zip(rule.theirs, tensor.flatten(0, 1).chunk(len(rule.theirs)), strict=True)
        elif len(found := waiting.setdefault(rule, {}) | {key: tensor}) < len(rule.ours):
            waiting[rule] = found
        else:
            del waiting[rule]
            yield rule.theirs[0], torch.cat([found[part] for part in rule.ours]) if len(found) > 1 else tensor
    for left in waiting.values():  # of a model with other parts, see ``places``
        yield from left.items()
