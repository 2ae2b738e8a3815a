"""Generation: the model's answers to prompts, compared with the expected ones.

{"prompt": "What is 2 + 2?", "answer": "4"}        "answer" may be a list: the best score counts
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from bumblebee.evaluation.context import EvaluationContext
from bumblebee.evaluation.records import TaskRecord, read_records
from bumblebee.evaluation.tasks.prompts import chat_ids, examples_before, plain_prompt
from bumblebee.evaluation.tasks.scorers import named_scorers
from bumblebee.evaluation.tasks.task import EvaluationTask, Progress, SampleResult
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


class Generation(EvaluationTask[Prompt]):
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
        self.file, self.max_new_tokens, self.stop = file, max_new_tokens, list(stop or [])
        self.fewshot, self.fewshot_file = fewshot, fewshot_file
        self.chat, self.system, self.separator = chat, system, separator
        self._pool: Sequence[Prompt] = ()

    def items(self, context: EvaluationContext) -> list[Prompt]:
        """The prompts of the file."""
        prompts = [self._parse(record) for record in read_records(self.file)]
        self._pool = prompts
        if self.fewshot_file is not None:
            self._pool = [self._parse(record) for record in read_records(self.fewshot_file)]
        return prompts

    def results(self, context: EvaluationContext, items: Sequence[Prompt], progress: Progress) -> list[SampleResult]:
        """An answer to each prompt, with its scores."""
        generator, is_chat = context.generator, context.chat if self.chat is None else self.chat
        params = SamplingParams(temperature=0.0, max_new_tokens=self.max_new_tokens, stop=self.stop)
        if is_chat:
            params = params.ending_with(generator.tokenizer.end_of_turn_ids)
        requests = []
        for number, item in enumerate(items):
            examples = self._examples(context, item)
            ids = chat_ids(context, item.text, examples, self.system) if is_chat else self._plain(item, examples)
            try:
                requests.append(EngineRequest(str(number), generator.prepare(ids, params), params))
            except ValueError as error:
                raise ValueError(f"{item.place}: {error}") from None
        answers = [""] * len(items)
        for output in generator.outputs(requests):
            answers[int(output.id)] += output.text
            if output.finish_reason is not None:
                progress(1)
        return [self._result(context, item, answer) for item, answer in zip(items, answers, strict=True)]

    def _examples(self, context: EvaluationContext, item: Prompt) -> list[tuple[str, str]]:
        count = context.fewshot if self.fewshot is None else self.fewshot
        own = item if self.fewshot_file is None else None
        return [(each.text, each.answers[0]) for each in examples_before(self._pool, own, count)]

    def _plain(self, item: Prompt, examples: Sequence[tuple[str, str]]) -> str:
        return plain_prompt(item.text, examples, self.separator)

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
        return SampleResult(self._plain(item, self._examples(context, item)), answer, expected, scores, details)

    def _parse(self, record: TaskRecord) -> Prompt:
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
