"""MultipleChoice: the model picks the most probable of several answers.

{"context": "The capital of France is", "choices": ["Paris", "Rome"], "gold": 0}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from bumblebee.evaluation.context import EvaluationContext
from bumblebee.evaluation.records import TaskRecord, read_records
from bumblebee.evaluation.scoring import Continuation, score
from bumblebee.evaluation.tasks.prompts import chat_ids, examples_before, plain_prompt, split_ids
from bumblebee.evaluation.tasks.task import EvaluationTask, Progress, SampleResult


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


class MultipleChoice(EvaluationTask[Choice]):
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
        self.file, self.fewshot, self.fewshot_file = file, fewshot, fewshot_file
        self.chat, self.system, self.separator = chat, system, separator
        self._pool: Sequence[Choice] = ()

    def items(self, context: EvaluationContext) -> list[Choice]:
        """The questions of the file."""
        questions = [_parse(record) for record in read_records(self.file)]
        self._pool = questions
        if self.fewshot_file is not None:
            self._pool = [_parse(record) for record in read_records(self.fewshot_file)]
        return questions

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

    def _examples(self, context: EvaluationContext, item: Choice) -> list[tuple[str, str]]:
        count = context.fewshot if self.fewshot is None else self.fewshot
        own = item if self.fewshot_file is None else None
        return [(each.context, each.choices[each.gold]) for each in examples_before(self._pool, own, count)]

    def _ids(self, context: EvaluationContext, item: Choice, choice: str) -> tuple[list[int], list[int]]:
        examples = self._examples(context, item)
        if context.chat if self.chat is None else self.chat:
            return chat_ids(context, item.context, examples, self.system), context.generator.tokenizer.encode(choice)
        return split_ids(context, plain_prompt(item.context, examples, self.separator), self.separator + choice)

    def _result(self, context: EvaluationContext, item: Choice, log_probs: list[float]) -> SampleResult:
        per_byte = [log_prob / len(choice.encode()) for log_prob, choice in zip(log_probs, item.choices, strict=True)]
        best, best_norm = (values.index(max(values)) for values in (log_probs, per_byte))
        prompt = plain_prompt(item.context, self._examples(context, item), self.separator)
        scores = {"acc": float(best == item.gold), "acc_norm": float(best_norm == item.gold)}
        details = {"choices": item.choices, "gold": item.gold, "log_probs": log_probs}
        return SampleResult(prompt, item.choices[best], item.choices[item.gold], scores, details)


def _parse(record: TaskRecord) -> Choice:
    context, choices, gold = record.text("context"), record.texts("choices"), record.get("gold")
    if len(choices) < 2:
        record.fail("'choices' must hold at least two strings")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        record.fail(f"'gold' must be the index of the right choice, from 0 to {len(choices) - 1}, got {gold!r}")
    return Choice(context, choices, gold)
