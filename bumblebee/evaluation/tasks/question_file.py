"""QuestionFileTask: what tasks on a file of questions share: the file, few-shot examples, the chat template."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from bumblebee.evaluation.context import EvaluationContext
from bumblebee.evaluation.records import TaskRecord, read_records
from bumblebee.evaluation.tasks.prompts import Example, chat_ids, examples_before, plain_prompt
from bumblebee.evaluation.tasks.task import EvaluationTask, ItemT


class QuestionFileTask(EvaluationTask[ItemT]):
    """A task whose items are the lines of a file. What is null is set by the evaluation.

    Args:
        file: JSON Lines.
        fewshot: solved examples before each question.
        fewshot_file: file of the examples, in the same format; null takes the first other records of ``file``.
        chat: ask through the chat template.
        system: system prompt of chats.
        separator: between question and answer of an example, without the chat template.
    """

    def __init__(
        self,
        file: str,
        fewshot: int | None,
        fewshot_file: str | None,
        chat: bool | None,
        system: str | None,
        separator: str,
    ) -> None:
        self.file, self.fewshot, self.fewshot_file = file, fewshot, fewshot_file
        self.chat, self.system, self.separator = chat, system, separator
        self._pool: Sequence[ItemT] = ()

    @abstractmethod
    def parse(self, record: TaskRecord) -> ItemT:
        """The item of a line.

        Raises:
            ValueError: the line cannot be used; names file and line.
        """

    @abstractmethod
    def example_of(self, item: ItemT) -> Example:
        """An item as a solved example."""

    def items(self, context: EvaluationContext) -> list[ItemT]:
        """The lines of the file."""
        items = [self.parse(record) for record in read_records(self.file)]
        self._pool = items
        if self.fewshot_file is not None:
            self._pool = [self.parse(record) for record in read_records(self.fewshot_file)]
        return items

    def is_chat(self, context: EvaluationContext) -> bool:
        """Whether questions are asked through the chat template."""
        return context.chat if self.chat is None else self.chat

    def examples(self, context: EvaluationContext, item: ItemT) -> list[Example]:
        """The solved examples before a question."""
        count = context.fewshot if self.fewshot is None else self.fewshot
        own = item if self.fewshot_file is None else None
        return [self.example_of(each) for each in examples_before(self._pool, own, count)]

    def chat_prompt(self, context: EvaluationContext, item: ItemT) -> list[int]:
        """Token ids of a question after its examples, through the chat template."""
        return chat_ids(context, self.example_of(item)[0], self.examples(context, item), self.system)

    def plain_prompt(self, context: EvaluationContext, item: ItemT) -> str:
        """A question after its examples, as text."""
        return plain_prompt(self.example_of(item)[0], self.examples(context, item), self.separator)
