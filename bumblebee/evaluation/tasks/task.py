"""EvaluationTask: the base class of tasks.

A task lists its items (questions, documents, pairs), gets the model's results for some of them, and reduces the results of all
to metrics. Items can therefore be shared out over ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Generic, TypeVar

from bumblebee.evaluation.context import EvaluationContext
from bumblebee.evaluation.statistics import Estimate, mean

ItemT = TypeVar("ItemT")
Progress = Callable[[int], object]  # called with the number of items that have just been finished


@dataclass(frozen=True)
class SampleResult:
    """What the model made of one item; a line of the samples file.

    Args:
        prompt: what the model was given.
        answer: what it answered, or the text that was scored.
        expected: the right answer, if there is one.
        scores: by name; metrics are computed from them.
        details: further JSON values.
    """

    prompt: str
    answer: str
    expected: str | list[str] | None
    scores: Mapping[str, float]
    details: Mapping[str, object] = field(default_factory=dict)


class EvaluationTask(ABC, Generic[ItemT]):
    """A task. ``metric`` names its main metric, which ``callbacks.Evaluate`` logs as ``eval/<task>``."""

    metric: ClassVar[str]

    @abstractmethod
    def items(self, context: EvaluationContext) -> Sequence[ItemT]:
        """Read and check everything that is to be evaluated.

        Raises:
            ValueError: a file or the data cannot be used; names file and line.
        """

    @abstractmethod
    def results(self, context: EvaluationContext, items: Sequence[ItemT], progress: Progress) -> list[SampleResult]:
        """The model's results for some items, in their order."""

    def metrics(self, results: Sequence[SampleResult]) -> dict[str, Estimate]:
        """Metrics over the results of all items; by default the mean of each score."""
        names = dict.fromkeys(name for result in results for name in result.scores)
        return {name: mean([result.scores[name] for result in results if name in result.scores]) for name in names}
