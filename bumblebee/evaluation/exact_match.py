"""Exact-match evaluation: greedy answers to the questions of a dataset, compared as text with the reference answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice

from bumblebee.datamodule import DataModule, SampleT
from bumblebee.evaluation.documents import Document, documents_of
from bumblebee.inference.generator import Generator
from bumblebee.inference.request import EngineRequest
from bumblebee.inference.sampling.sampling_params import SamplingParams
from bumblebee.nn import IGNORE_INDEX

ROLES = ("system", "user", "assistant")  # left over from many chat templates when special tokens are removed


@dataclass(frozen=True)
class Question:
    """A point in a conversation where an answer begins.

    Args:
        prompt: token ids before the answer; earlier answers of the conversation are the reference ones.
        answer: token ids of the reference answer, including the end of the turn.
        turn: number of the question in its conversation, from 1.
        length: number of ids at the end of the prompt that follow the previous answer.
    """

    prompt: list[int]
    answer: list[int]
    turn: int
    length: int


@dataclass(frozen=True)
class Answer:
    """A model's answer beside the reference.

    Args:
        question: text of the question, without special tokens.
        turn: number of the question in its conversation, from 1.
        expected: text of the reference answer.
        text: the model's answer.
    """

    question: str
    turn: int
    expected: str
    text: str

    @property
    def is_match(self) -> bool:
        """Whether both answers are the same text, ignoring surrounding whitespace."""
        return self.text.strip() == self.expected.strip()


def questions(data: DataModule[SampleT], samples: Sequence[SampleT]) -> Iterator[Question]:
    """Yield the questions of all conversations in some samples, in order."""
    for index in range(len(samples)):
        for row in documents_of(data, samples[index]):
            for conversation in row:
                yield from _in_conversation(conversation)


def _in_conversation(conversation: Document) -> Iterator[Question]:
    """Split a conversation at its runs of targets, the answers."""
    ids, labels = conversation
    runs = groupby(range(len(labels)), lambda index: labels[index] != IGNORE_INDEX)
    answers = [list(indices) for is_target, indices in runs if is_target]
    previous_end = 0
    for turn, (first, *rest) in enumerate(answers, start=1):
        last = first + len(rest)  # labels are shifted: the label at an index is the token after it
        yield Question(ids[: first + 1], labels[first : last + 1], turn, first + 1 - previous_end)
        previous_end = last + 1


def answer(
    generator: Generator,
    asked: Iterable[Question],
    limit: int | None = None,
    progress: Callable[[int], object] = lambda count: None,
) -> list[Answer]:
    """Return the model's greedy answers, in the order of the questions.

    Args:
        generator: the model.
        asked: questions.
        limit: maximum number of questions; None for all.
        progress: called with the number of answers that have just been finished.
    """
    chosen, decode = list(islice(asked, limit)), generator.tokenizer.decode
    stop_ids = generator.tokenizer.end_of_turn_ids
    completions = generator.complete([_request(id, question, stop_ids) for id, question in enumerate(chosen)], progress)
    return [
        Answer(_without_roles(decode(question.prompt[-question.length :])), question.turn, decode(question.answer), each.text)
        for question, each in zip(chosen, completions, strict=True)
    ]


def _request(id: int, question: Question, stop_ids: list[int]) -> EngineRequest:
    """Generate one token more than the reference has: a longer answer is wrong however it continues."""
    params = SamplingParams(temperature=0.0, max_new_tokens=len(question.answer) + 1, stop_ids=stop_ids)
    return EngineRequest(str(id), question.prompt, params)


def _without_roles(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if line.strip() not in ROLES).strip()
