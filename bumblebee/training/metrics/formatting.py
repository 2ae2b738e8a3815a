"""Formatting of metrics for console and log file. Numbers: ``bumblebee/utils/formatting.py``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from bumblebee.utils.formatting import format_metric

if TYPE_CHECKING:
    from bumblebee.training.run_state import RunState


def format_progress(trainer: RunState) -> str:
    """``step 100/1,000, 51,200 tokens``."""
    return f"step {trainer.step:,}/{trainer.plan.max_steps:,}, {trainer.tokens:,} tokens"


def format_metrics(metrics: Mapping[str, float]) -> str:
    """Names and values on one line."""
    return " · ".join(f"{name} {format_metric(name, value)}" for name, value in metrics.items())


def format_validation(step: int, metrics: Mapping[str, float]) -> str:
    """The results of a validation on one line."""
    return f"validation at step {step:,}: " + format_metrics(strip_validation_prefix(metrics))


def strip_validation_prefix(metrics: Mapping[str, float]) -> dict[str, float]:
    """The results of a validation without the ``validation_`` prefix of their names."""
    return {name.removeprefix("validation_"): value for name, value in metrics.items()}
