"""Exact-match evaluation: greedy answers to the questions of a dataset, compared as text with the reference answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice

from bumblebee.datamodule import DataModule, SampleT
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
        batch = data.collate([samples[index]])
        for row in zip(*(batch[name].tolist() for name in ("input_ids", "labels", "position_ids")), strict=True):
            yield from _in_row(*row)


def _in_row(input_ids: list[int], labels: list[int], position_ids: list[int]) -> Iterator[Question]:
    """Split a row into conversations, which start at position 0, and these at their runs of targets, the answers."""
    starts = [index for index, position in enumerate(position_ids) if position == 0]
    for start, end in zip(starts, [*starts[1:], len(labels)], strict=True):
        runs = groupby(range(start, end), lambda index: labels[index] != IGNORE_INDEX)
        answers = [list(indices) for is_target, indices in runs if is_target]
        previous_end = start
        for turn, (first, *rest) in enumerate(answers, start=1):
            last = first + len(rest)  # labels are shifted: the label at an index is the token after it
            yield Question(input_ids[start : first + 1], labels[first : last + 1], turn, first + 1 - previous_end)
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
    texts = [""] * len(chosen)
    stop_ids = generator.tokenizer.end_of_turn_ids
    for output in generator.outputs([_request(id, question, stop_ids) for id, question in enumerate(chosen)]):
        texts[int(output.id)] += output.text
        if output.finish_reason is not None:
            progress(1)
    return [
        Answer(_without_roles(decode(question.prompt[-question.length :])), question.turn, decode(question.answer), text)
        for question, text in zip(chosen, texts, strict=True)
    ]


def _request(id: int, question: Question, stop_ids: list[int]) -> EngineRequest:
    """Generate one token more than the reference has: a longer answer is wrong however it continues."""
    params = SamplingParams(temperature=0.0, max_new_tokens=len(question.answer) + 1, stop_ids=stop_ids)
    return EngineRequest(str(id), question.prompt, params)


def _without_roles(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if line.strip() not in ROLES).strip()
