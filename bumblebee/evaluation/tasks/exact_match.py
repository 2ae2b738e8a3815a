"""ExactMatch: greedy answers to the questions of a dataset, compared as text with the reference answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from bumblebee.datamodule import DataModule
from bumblebee.evaluation.context import EvaluationContext
from bumblebee.evaluation.exact_match import Question, answer, questions
from bumblebee.evaluation.tasks.task import EvaluationTask, Progress, SampleResult


class ExactMatch(EvaluationTask[Question]):
    """Share of questions that are answered exactly as in the data, and of first and of later turns alone if there are both.

    The conversation before a question holds the reference answers.

    Args:
        data: conversations; null for the recipe's data.
    """

    metric: ClassVar[str] = "exact_match"

    def __init__(self, data: DataModule | None = None) -> None:
        self.data = data

    def items(self, context: EvaluationContext) -> list[Question]:
        """The questions of all conversations.

        Raises:
            ValueError: the data has no questions.
        """
        for data in filter(None, (self.data or context.data,)):
            if not data.has_prompts:
                raise ValueError(
                    f"data: {type(data).__name__} has no questions to evaluate: use bumblebee validate, or a recipe with"
                    " datamodules.SFT"
                )
        return list(questions(*context.samples(self.data, "exact_match")))

    def results(self, context: EvaluationContext, items: Sequence[Question], progress: Progress) -> list[SampleResult]:
        """The model's answers."""
        answers = answer(context.generator, items, progress=progress)
        multiple = len({min(each.turn, 2) for each in answers}) > 1
        results = []
        for each in answers:
            score = float(each.is_match)
            turn = {"single_turn" if each.turn == 1 else "multi_turn": score} if multiple else {}
            details = {"turn": each.turn}
            results.append(SampleResult(each.question, each.text, each.expected, {"exact_match": score, **turn}, details))
        return results
