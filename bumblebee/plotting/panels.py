"""Which metrics a task shows: in the panels of loss.png, and in the progress on the console."""

from __future__ import annotations

from dataclasses import dataclass

from bumblebee.utils.formatting import format_metric


@dataclass(frozen=True)
class ShownMetric:
    """A metric as people read it.

    Args:
        name: in metrics.jsonl, such as "rl/reward"; its validation values are those of "validation_rl/reward".
        label: in legends and on the console.
        axis: label of a plot's axis; by default ``label``.
        fraction: lies between 0 and 1; the console shows it in percent.
        spread: name of a metric with its standard deviation, drawn as a band around it.
    """

    name: str
    label: str
    axis: str = ""
    fraction: bool = False
    spread: str = ""

    def format(self, value: float) -> str:
        """``reward 0.4375``, or ``truncated 12%``."""
        return f"{self.label} {value:.0%}" if self.fraction else f"{self.label} {format_metric(self.name, value)}"


@dataclass(frozen=True)
class Panel:
    """A panel of loss.png: a metric, and optionally another one on an axis of its own.

    What a run does not log is left out. The first panel also shows the learning rate unless it has a second metric.
    """

    left: ShownMetric
    right: ShownMetric | None = None

    @property
    def metrics(self) -> tuple[ShownMetric, ...]:
        """One or two."""
        return (self.left,) if self.right is None else (self.left, self.right)
