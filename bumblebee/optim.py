"""Parameter groups and learning-rate schedules.

A schedule is a function of the step: ``factor(step, total)`` times the optimizer's learning rate. All but ReduceOnPlateau are
stateless.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from bumblebee.distributed.deepspeed.sharded_parameters import full_shape

if TYPE_CHECKING:
    from torch import nn

    from bumblebee.distributed.deepspeed.optimizer_types import ParamGroup


if TYPE_CHECKING:
    from torch.optim import Optimizer
else:

    class Optimizer(ABC):  # noqa: B024  (it has no methods of its own)
        """Stands for torch.optim.Optimizer, so that the command line reads an optimizer's options without importing torch."""

        @classmethod
        def __subclasshook__(cls, candidate: type) -> bool:
            return hasattr(candidate, "step") and hasattr(candidate, "zero_grad")


@dataclass(frozen=True)
class GroupRule:
    """Optimizer options of the parameters whose names match a pattern.

    Args:
        pattern: regular expression, searched in names such as model.layers.0.mlp.up_proj.weight.
        lr: learning rate before the schedule; null keeps the optimizer's.
        weight_decay: weight decay; null keeps the default.
    """

    pattern: str
    lr: float | None = None
    weight_decay: float | None = None


def parameter_groups(model: nn.Module, rules: Sequence[GroupRule] = ()) -> list[ParamGroup]:
    """Group trainable parameters: matrices have the optimizer's weight decay; norms, biases and embeddings have none.

    Args:
        model: the model.
        rules: other options by name; the first matching rule applies.

    Raises:
        ValueError: every parameter is frozen, or a rule's pattern is invalid or matches nothing.
    """
    from torch import nn

    patterns = [_compile(rule.pattern) for rule in rules]
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    groups: dict[tuple[float | None, ...], ParamGroup] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        undecayed = len(full_shape(parameter)) < 2 or id(parameter) in embeddings
        options: ParamGroup = {"weight_decay": 0.0} if undecayed else {}
        rule = next((rule for rule, pattern in zip(rules, patterns, strict=True) if pattern.search(name)), None)
        if rule is not None and rule.lr is not None:
            options["lr"] = rule.lr
        if rule is not None and rule.weight_decay is not None:
            options["weight_decay"] = rule.weight_decay
        key = (options.get("lr"), options.get("weight_decay"))
        groups.setdefault(key, {"params": [], **options})["params"].append(parameter)
    if not groups:
        raise ValueError("the model has no trainable parameters: all are frozen")
    _check_all_match(rules, patterns, [name for name, _ in model.named_parameters()])
    # The group with the optimizer's own learning rate first: that rate is logged.
    return sorted(groups.values(), key=lambda group: ("lr" in group, "weight_decay" in group))


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"trainer.groups: {pattern!r} is not a regular expression: {error}") from error


def _check_all_match(rules: Sequence[GroupRule], patterns: Sequence[re.Pattern[str]], names: list[str]) -> None:
    for rule, pattern in zip(rules, patterns, strict=True):
        if not any(pattern.search(name) for name in names):
            raise ValueError(f"trainer.groups: {rule.pattern!r} matches no parameter; names are like {names[0]}, {names[-1]}")


def set_learning_rate(groups: Iterable[ParamGroup], factor: float) -> float:
    """Set each group's learning rate to its initial one times ``factor``; returns the first group's."""
    rates = []
    for group in groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
        rates.append(group["lr"])
    return rates[0]


class Schedule(ABC):
    """Linear warm-up from 0 to 1, then ``decay``.

    The curves are those of transformers' schedulers, whose first step has a learning rate of 0 if there is a warm-up.

    Args:
        warmup_ratio: fraction of all steps for the warm-up, rounded up.
        warmup_steps: number of warm-up steps; takes precedence over warmup_ratio.

    Raises:
        ValueError: a ratio outside [0, 1) or a negative number of steps.
    """

    needs_validation: ClassVar[bool] = False  # whether the curve depends on ``observe``

    def __init__(self, warmup_ratio: float = 0.1, warmup_steps: int | None = None) -> None:
        if not 0 <= warmup_ratio < 1:
            raise ValueError(f"warmup_ratio must be in [0, 1), got {warmup_ratio}")
        if warmup_steps is not None and warmup_steps < 0:
            raise ValueError(f"warmup_steps must be at least 0, got {warmup_steps}")
        self.warmup_ratio = warmup_ratio
        self.warmup_steps = warmup_steps

    def factor(self, step: int, total: int) -> float:
        """The factor of the learning rate in step ``step`` (from 0) of ``total``."""
        warmup = self.warmup_of(total)
        if step < warmup:
            return step / warmup
        return self.decay(step - warmup, max(1, total - warmup), warmup)

    def warmup_of(self, total: int) -> int:
        """Number of warm-up steps in a run of ``total``; a ratio leaves at least one step after the warm-up."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return min(math.ceil(self.warmup_ratio * total), max(0, total - 1))

    @abstractmethod
    def decay(self, step: int, total: int, warmup: int) -> float:
        """The factor after the warm-up, in step ``step`` (from 0) of the ``total`` that follow ``warmup`` steps."""

    def observe(self, metrics: dict[str, float]) -> None:  # noqa: B027  (most schedules ignore them)
        """Receive the metrics of a validation, on every rank."""

    def state_dict(self) -> dict[str, object]:
        """State that a resumed run needs besides the step, as JSON values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Restore ``state_dict``."""


def _check_ratio(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
    return value


class Constant(Schedule):
    """No decay.

    Args:
        warmup_ratio: fraction of all steps for the warm-up, rounded up.
        warmup_steps: number of warm-up steps; takes precedence over warmup_ratio.
    """

    def __init__(self, warmup_ratio: float = 0.0, warmup_steps: int | None = None) -> None:
        super().__init__(warmup_ratio, warmup_steps)

    def decay(self, step: int, total: int, warmup: int) -> float:
        return 1.0


class Linear(Schedule):
    """Linear decay from 1 to ``min_ratio``.

    Args:
        warmup_ratio: fraction of all steps for the warm-up, rounded up.
        warmup_steps: number of warm-up steps; takes precedence over warmup_ratio.
        min_ratio: the factor at the end.
    """

    def __init__(self, warmup_ratio: float = 0.1, warmup_steps: int | None = None, min_ratio: float = 0.0) -> None:
        super().__init__(warmup_ratio, warmup_steps)
        self.min_ratio = _check_ratio("min_ratio", min_ratio)

    def decay(self, step: int, total: int, warmup: int) -> float:
        return self.min_ratio + (1 - self.min_ratio) * max(0.0, 1 - step / total)


class Cosine(Schedule):
    """Half a cosine from 1 to ``min_ratio``, or several with hard restarts (arXiv 1608.03983).

    Args:
        warmup_ratio: fraction of all steps for the warm-up, rounded up.
        warmup_steps: number of warm-up steps; takes precedence over warmup_ratio.
        min_ratio: the factor at the end of each half cosine.
        cycles: number of half cosines.
    """

    def __init__(
        self, warmup_ratio: float = 0.1, warmup_steps: int | None = None, min_ratio: float = 0.0, cycles: int = 1
    ) -> None:
        super().__init__(warmup_ratio, warmup_steps)
        self.min_ratio = _check_ratio("min_ratio", min_ratio)
        if cycles < 1:
            raise ValueError(f"cycles must be at least 1, got {cycles}")
        self.cycles = cycles

    def decay(self, step: int, total: int, warmup: int) -> float:
        progress = 1.0 if step >= total else self.cycles * step / total % 1.0
        return self.min_ratio + (1 - self.min_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


class Polynomial(Schedule):
    """Polynomial decay from 1 to ``min_ratio``.

    Args:
        warmup_ratio: fraction of all steps for the warm-up, rounded up.
        warmup_steps: number of warm-up steps; takes precedence over warmup_ratio.
        power: of the remaining fraction of steps; 1 is linear, 2 decays faster at first.
        min_ratio: the factor at the end.
    """

    def __init__(
        self, warmup_ratio: float = 0.1, warmup_steps: int | None = None, power: float = 2.0, min_ratio: float = 0.0
    ) -> None:
        super().__init__(warmup_ratio, warmup_steps)
        if not power > 0:
            raise ValueError(f"power must be more than 0, got {power}")
        self.power = power
        self.min_ratio = _check_ratio("min_ratio", min_ratio)

    def decay(self, step: int, total: int, warmup: int) -> float:
        return self.min_ratio + (1 - self.min_ratio) * max(0.0, 1 - step / total) ** self.power


class InverseSqrt(Schedule):
    """1 / sqrt(step), scaled to start at 1 (arXiv 1706.03762); independent of the length of the run.

    Args:
        warmup_ratio: fraction of all steps for the warm-up, rounded up.
        warmup_steps: number of warm-up steps; takes precedence over warmup_ratio.
        timescale: steps after which the factor is about 0.7; null for the number of warm-up steps, or 10,000 without a warm-up.
    """

    def __init__(self, warmup_ratio: float = 0.1, warmup_steps: int | None = None, timescale: int | None = None) -> None:
        super().__init__(warmup_ratio, warmup_steps)
        if timescale is not None and timescale < 1:
            raise ValueError(f"timescale must be at least 1, got {timescale}")
        self.timescale = timescale

    def decay(self, step: int, total: int, warmup: int) -> float:
        timescale = self.timescale or warmup or 10_000
        return math.sqrt(timescale / (timescale + step))


class WarmupStableDecay(Schedule):
    """Constant for most of the run, then decay to ``min_ratio`` (arXiv 2404.06395).

    Args:
        warmup_ratio: fraction of all steps for the warm-up, rounded up.
        warmup_steps: number of warm-up steps; takes precedence over warmup_ratio.
        decay_ratio: fraction of all steps for the decay, rounded up.
        min_ratio: the factor at the end.
        shape: of the decay: cosine or linear.
    """

    def __init__(
        self,
        warmup_ratio: float = 0.1,
        warmup_steps: int | None = None,
        decay_ratio: float = 0.2,
        min_ratio: float = 0.0,
        shape: Literal["cosine", "linear"] = "cosine",
    ) -> None:
        super().__init__(warmup_ratio, warmup_steps)
        self.decay_ratio = _check_ratio("decay_ratio", decay_ratio)
        self.min_ratio = _check_ratio("min_ratio", min_ratio)
        self.shape = shape

    def decay(self, step: int, total: int, warmup: int) -> float:
        steps = min(total, math.ceil(self.decay_ratio * (total + warmup)))
        progress = min(1.0, max(0, step - (total - steps)) / max(1, steps))
        decayed = 0.5 * (1 - math.cos(math.pi * progress)) if self.shape == "cosine" else progress
        return 1 - (1 - self.min_ratio) * decayed


class ReduceOnPlateau(Schedule):
    """Constant, and multiplied by ``reduce`` whenever the validation loss stops improving.

    Args:
        warmup_ratio: fraction of all steps for the warm-up, rounded up.
        warmup_steps: number of warm-up steps; takes precedence over warmup_ratio.
        reduce: factor of each reduction.
        patience: number of validations without improvement before a reduction.
        threshold: an improvement is a loss below (1 - threshold) times the best.
        min_ratio: lower bound of the factor.
        metric: name of the validation metric; lower is better.
    """

    needs_validation = True

    def __init__(
        self,
        warmup_ratio: float = 0.0,
        warmup_steps: int | None = None,
        reduce: float = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        min_ratio: float = 0.0,
        metric: str = "validation_loss",
    ) -> None:
        super().__init__(warmup_ratio, warmup_steps)
        if not 0 < reduce < 1:
            raise ValueError(f"reduce must be between 0 and 1, got {reduce}")
        if patience < 0:
            raise ValueError(f"patience must be at least 0, got {patience}")
        self.reduce, self.patience, self.threshold = reduce, patience, threshold
        self.min_ratio, self.metric = _check_ratio("min_ratio", min_ratio), metric
        self.ratio, self.best, self.bad = 1.0, math.inf, 0

    def decay(self, step: int, total: int, warmup: int) -> float:
        return self.ratio

    def observe(self, metrics: dict[str, float]) -> None:
        """Count validations without improvement.

        Raises:
            ValueError: the metric is not measured.
        """
        if self.metric not in metrics:
            raise ValueError(f"schedule.metric: {self.metric!r} is not measured; metrics: {', '.join(metrics)}")
        if metrics[self.metric] < self.best * (1 - self.threshold):
            self.best, self.bad = metrics[self.metric], 0
        else:
            self.bad += 1
        if self.bad > self.patience:
            self.ratio, self.bad = max(self.ratio * self.reduce, self.min_ratio), 0

    def state_dict(self) -> dict[str, object]:
        return {"ratio": self.ratio, "best": None if math.isinf(self.best) else self.best, "bad": self.bad}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ratio, self.bad = state["ratio"], state["bad"]
        self.best = math.inf if state["best"] is None else state["best"]
