"""How metrics are written for people. No callback: several of them use it. Numbers: ``bumblebee/formatting.py``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from bumblebee.formatting import number

if TYPE_CHECKING:
    from bumblebee.trainer import Trainer


def say(text: str) -> None:
    """Print in the middle of a run: above the progress bar, where there is one."""
    from tqdm import tqdm

    tqdm.write(text)
    sys.stdout.flush()


def progress(trainer: Trainer) -> str:
    """How far a run has come."""
    return f"{trainer.step:,} of {trainer.plan.max_steps:,} steps, {trainer.tokens:,} tokens"


def sentence(metrics: Mapping[str, float]) -> str:
    """Names and values on one line."""
    return " · ".join(f"{name} {number(value)}" for name, value in metrics.items())


def validation_sentence(step: int, metrics: Mapping[str, float]) -> str:
    """What a validation gave, on one line."""
    return f"validation at step {step:,}: " + sentence(without_prefix(metrics))


def without_prefix(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics of a validation, whose names all begin with ``validation_``, under their short names."""
    return {name.removeprefix("validation_"): value for name, value in metrics.items()}
