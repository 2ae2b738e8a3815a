"""Trial: what is known about one trial of a sweep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from bumblebee.sweep.parameter import Value

State = Literal["running", "complete", "pruned", "failed"]


@dataclass(frozen=True)
class Trial:
    """One trial as the storage knows it.

    Args:
        number: from 0, in the order in which trials were started.
        state: running includes trials that were cut off: their worker ended before them.
        values: of the parameters, in the order of the sweep file; some are missing if its start was cut off.
        metric: the last value of the metric; None before the first.
        reports: index of the last value of the metric that was reported, counted from 1.
        message: why it failed.
        host: where it was started.
        seconds: from its start to its end; None while it is running.
    """

    number: int
    state: State
    values: Mapping[str, Value] = field(default_factory=dict)
    metric: float | None = None
    reports: int = 0
    message: str = ""
    host: str = ""
    seconds: float | None = None

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"trial-{self.number:04d}"


def best_of(trials: Sequence[Trial], goal: str) -> Trial | None:
    """The complete trial with the best metric, the first of equals; None if there is none."""
    complete = [
        trial for trial in trials if trial.state == "complete" and trial.metric is not None and math.isfinite(trial.metric)
    ]
    sign = 1 if goal == "minimize" else -1
    return min(complete, key=lambda trial: (sign * (trial.metric or 0.0), trial.number), default=None)
