"""Parameter groups, and learning-rate schedules.

A schedule is a function of the step alone: ``factor(step, total)`` times the optimizer's learning rate. Nothing needs to be
saved or restored, and a resumed run continues on the same curve.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


class Optimizer(ABC):  # noqa: B024  (it has no methods of its own)
    """Stands for torch.optim.Optimizer in type hints, so that the command line need not import torch to know its options."""

    @classmethod
    def __subclasshook__(cls, candidate: type) -> bool:
        return hasattr(candidate, "step") and hasattr(candidate, "zero_grad")


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices with the optimizer's weight decay, and norms, biases and embeddings without.

    Raises:
        ValueError: every parameter is frozen.
    """
    from torch import nn

    decayed: dict[str, Any] = {"params": []}
    kept: dict[str, Any] = {"params": [], "weight_decay": 0.0}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for parameter in model.parameters():
        if parameter.requires_grad:
            group = kept if parameter.ndim < 2 or id(parameter) in embeddings else decayed
            group["params"].append(parameter)
    groups = [group for group in (decayed, kept) if group["params"]]
    if not groups:
        raise ValueError("the model has no trainable parameters: all are frozen")
    return groups


def set_learning_rate(groups: Iterable[dict[str, Any]], factor: float) -> float:
    """Give each group its initial rate times ``factor``; returns the first group's rate."""
    rates = []
    for group in groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        rates.append(group["lr"])
    return rates[0]


class Schedule(ABC):
    """A warm-up from 0 to 1 over the first steps, then ``decay``.

    Args:
        warmup_ratio: share of all steps, rounded up, that the warm-up takes.
        warmup_steps: the same as a number of steps; wins over the ratio.

    Raises:
        ValueError: a ratio outside [0, 1) or a negative number of steps.
    """

    def __init__(self, warmup_ratio: float = 0.1, warmup_steps: int | None = None) -> None:
        if not 0 <= warmup_ratio < 1:
            raise ValueError(f"warmup_ratio {warmup_ratio} must be in [0, 1)")
        if warmup_steps is not None and warmup_steps < 0:
            raise ValueError(f"warmup_steps {warmup_steps} must not be negative")
        self.warmup_ratio = warmup_ratio
        self.warmup_steps = warmup_steps

    def factor(self, step: int, total: int) -> float:
        """What the learning rate is multiplied with in step ``step`` (from 0) of ``total``."""
        warmup = math.ceil(self.warmup_ratio * total) if self.warmup_steps is None else self.warmup_steps
        if step < warmup:
            return (step + 1) / (warmup + 1)  # no step is wasted at a rate of zero
        return self.decay((step - warmup) / max(1, total - warmup))

    @abstractmethod
    def decay(self, progress: float) -> float:
        """The factor after the warm-up; ``progress`` runs from 0 to 1."""


class Constant(Schedule):
    """No decay."""

    def decay(self, progress: float) -> float:
        return 1.0


class Linear(Schedule):
    """A straight line from 1 to ``min_ratio``.

    Args:
        warmup_ratio: see Schedule.
        warmup_steps: see Schedule.
        min_ratio: the factor at the end.
    """

    def __init__(self, warmup_ratio: float = 0.1, warmup_steps: int | None = None, min_ratio: float = 0.0) -> None:
        super().__init__(warmup_ratio, warmup_steps)
        self.min_ratio = min_ratio

    def decay(self, progress: float) -> float:
        return self.min_ratio + (1 - self.min_ratio) * (1 - progress)


class Cosine(Schedule):
    """Half a cosine from 1 to ``min_ratio`` (arXiv 1608.03983 without restarts).

    Args:
        warmup_ratio: see Schedule.
        warmup_steps: see Schedule.
        min_ratio: the factor at the end.
    """

    def __init__(self, warmup_ratio: float = 0.1, warmup_steps: int | None = None, min_ratio: float = 0.0) -> None:
        super().__init__(warmup_ratio, warmup_steps)
        self.min_ratio = min_ratio

    def decay(self, progress: float) -> float:
        return self.min_ratio + (1 - self.min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
