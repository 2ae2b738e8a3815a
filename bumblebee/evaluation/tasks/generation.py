"""Generation: the model's answers to prompts, compared with the expected ones.

{"prompt": "What is 2 + 2?", "answer": "4"}        "answer" may be a list: the best score counts
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from bumblebee.evaluation.context import EvaluationContext
from bumblebee.evaluation.records import TaskRecord
from bumblebee.evaluation.tasks.prompts import Example
from bumblebee.evaluation.tasks.question_file import QuestionFileTask
from bumblebee.evaluation.tasks.scorers import named_scorers
from bumblebee.evaluation.tasks.task import Progress, SampleResult
from bumblebee.inference.request import EngineRequest
from bumblebee.inference.sampling.sampling_params import SamplingParams


@dataclass(frozen=True)
class Prompt:
    """A prompt with its accepted answers.

    Args:
        place: FILE:LINE.
        text: the prompt.
        answers: accepted answers.
    """

    place: str
    text: str
    answers: list[str]


class Generation(QuestionFileTask[Prompt]):
    """Greedy answers to prompts, with a mean for each scorer.

    Args:
        file: JSON Lines with "prompt" and "answer", a string or a list of accepted ones.
        scorers: exact_match, contains, regex ("answer" is a regular expression), or the class paths of Python functions, which
            are called with the model's answer and the expected one and return a number.
        extract: regular expression; its first group (or the whole match) in the answer is scored. No match scores "".
        max_new_tokens: maximum length of an answer.
        stop: strings that end an answer.
        fewshot: solved examples before each prompt; null for the evaluation's setting.
        fewshot_file: file of the examples, in the same format; null takes the first other records of ``file``.
        chat: ask through the chat template; null for the evaluation's setting.
        system: system prompt of chats.
        separator: between prompt and answer of an example, without the chat template.

    Raises:
        ValueError: an unknown scorer, or an invalid regular expression.
    """

    metric: ClassVar[str] = "exact_match"

    def __init__(
        self,
        file: str,
        scorers: list[str] | None = None,
        extract: str | None = None,
        max_new_tokens: int = 64,
        stop: list[str] | None = None,
        fewshot: int | None = None,
        fewshot_file: str | None = None,
        chat: bool | None = None,
        system: str | None = None,
        separator: str = " ",
    ) -> None:
        self.scorers = named_scorers(["exact_match"] if scorers is None else scorers)
        self.metric = next(iter(self.scorers))  # type: ignore[misc]  # of the class: the default
        try:
            self.extract = None if extract is None else re.compile(extract)
        except re.error as error:
            raise ValueError(f"extract: invalid regular expression {extract!r}: {error}") from None
        self.max_new_tokens, self.stop = max_new_tokens, list(stop or [])
        super().__init__(file, fewshot, fewshot_file, chat, system, separator)

    def example_of(self, item: Prompt) -> Example:
        """See the base class."""
        return item.text, item.answers[0]

    def results(self, context: EvaluationContext, items: Sequence[Prompt], progress: Progress) -> list[SampleResult]:
        """An answer to each prompt, with its scores."""
        generator, is_chat = context.generator, self.is_chat(context)
        params = SamplingParams(temperature=0.0, max_new_tokens=self.max_new_tokens, stop=self.stop)
        if is_chat:
            params = params.ending_with(generator.tokenizer.end_of_turn_ids)
        requests = []
        for number, item in enumerate(items):
            ids = self.chat_prompt(context, item) if is_chat else self.plain_prompt(context, item)
            try:
                requests.append(EngineRequest(str(number), generator.prepare(ids, params), params))
            except ValueError as error:
                raise ValueError(f"{item.place}: {error}") from None
        completions = generator.complete(requests, progress)
        return [self._result(context, item, each.text) for item, each in zip(items, completions, strict=True)]

    def _result(self, context: EvaluationContext, item: Prompt, answer: str) -> SampleResult:
        scored = answer
        if self.extract is not None:
            match = self.extract.search(answer)
            scored = "" if match is None else match[1] or "" if match.re.groups else match[0]
        scores = {
            name: max(float(scorer(scored, expected)) for expected in item.answers) for name, scorer in self.scorers.items()
        }
        details = {} if self.extract is None else {"extracted": scored}
        expected = item.answers[0] if len(item.answers) == 1 else item.answers
        return SampleResult(self.plain_prompt(context, item), answer, expected, scores, details)

    def parse(self, record: TaskRecord) -> Prompt:
        """See the base class."""
        answer = record.get("answer")
        answers = [record.text("answer")] if isinstance(answer, str) else record.texts("answer")
        if "regex" in self.scorers:
            for pattern in answers:
                try:
                    re.compile(pattern)
                except re.error as error:
                    record.fail(f"'answer': invalid regular expression {pattern!r}: {error}")
        text = record.text("prompt")
        if not text:
            record.fail("'prompt' is empty")
        return Prompt(record.place, text, answers)
