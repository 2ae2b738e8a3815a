"""MultipleChoice: the model picks the most probable of several answers.

{"context": "The capital of France is", "choices": ["Paris", "Rome"], "gold": 0}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from bumblebee.evaluation.context import EvaluationContext
from bumblebee.evaluation.records import TaskRecord
from bumblebee.evaluation.scoring import Continuation, score
from bumblebee.evaluation.tasks.prompts import Example, split_ids
from bumblebee.evaluation.tasks.question_file import QuestionFileTask
from bumblebee.evaluation.tasks.task import Progress, SampleResult


@dataclass(frozen=True)
class Choice:
    """A question with its choices.

    Args:
        context: what precedes each choice.
        choices: the answers.
        gold: index of the right one.
    """

    context: str
    choices: list[str]
    gold: int


class MultipleChoice(QuestionFileTask[Choice]):
    """Multiple choice by log-likelihood. ``acc`` counts questions whose right choice has the highest log-probability,
    ``acc_norm`` those where it has the highest log-probability per byte of the choice.

    Args:
        file: JSON Lines with "context", "choices" and "gold", the index of the right choice.
        fewshot: solved examples before each question; null for the evaluation's setting.
        fewshot_file: file of the examples, in the same format; null takes the first other records of ``file``.
        chat: ask through the chat template; null for the evaluation's setting.
        system: system prompt of chats.
        separator: between context and choice, without the chat template.
    """

    metric: ClassVar[str] = "acc"

    def __init__(
        self,
        file: str,
        fewshot: int | None = None,
        fewshot_file: str | None = None,
        chat: bool | None = None,
        system: str | None = None,
        separator: str = " ",
    ) -> None:
        super().__init__(file, fewshot, fewshot_file, chat, system, separator)

    def example_of(self, item: Choice) -> Example:
        """See the base class."""
        return item.context, item.choices[item.gold]

    def parse(self, record: TaskRecord) -> Choice:
        """See the base class."""
        context, choices, gold = record.text("context"), record.texts("choices"), record.get("gold")
        if len(choices) < 2:
            record.fail("'choices' must hold at least two strings")
        if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
            record.fail(f"'gold' must be the index of the right choice, from 0 to {len(choices) - 1}, got {gold!r}")
        return Choice(context, choices, gold)

    def results(self, context: EvaluationContext, items: Sequence[Choice], progress: Progress) -> list[SampleResult]:
        """Log-probabilities of all choices of each question."""
        requests, counts = [], [len(item.choices) for item in items]
        for item in items:
            requests += [Continuation(*self._ids(context, item, choice)) for choice in item.choices]
        finished, total = 0.0, 0

        def advance(count: int) -> None:  # from choices to questions
            nonlocal finished, total
            finished += count * len(items) / max(len(requests), 1)
            done = round(finished)
            progress(done - total)
            total = done

        scores = iter(score(context.generator, requests, advance))
        log_probs = [[next(scores).log_prob for _ in range(count)] for count in counts]
        return [self._result(context, item, each) for item, each in zip(items, log_probs, strict=True)]

    def _ids(self, context: EvaluationContext, item: Choice, choice: str) -> tuple[list[int], list[int]]:
        if self.is_chat(context):
            return self.chat_prompt(context, item), context.generator.tokenizer.encode(choice)
        return split_ids(context, self.plain_prompt(context, item), self.separator + choice)

    def _result(self, context: EvaluationContext, item: Choice, log_probs: list[float]) -> SampleResult:
        per_byte = [log_prob / len(choice.encode()) for log_prob, choice in zip(log_probs, item.choices, strict=True)]
        best, best_norm = (values.index(max(values)) for values in (log_probs, per_byte))
        prompt = self.plain_prompt(context, item)
        scores = {"acc": float(best == item.gold), "acc_norm": float(best_norm == item.gold)}
        details = {"choices": item.choices, "gold": item.gold, "log_probs": log_probs}
        return SampleResult(prompt, item.choices[best], item.choices[item.gold], scores, details)
