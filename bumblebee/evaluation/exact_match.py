"""Answers: does a model answer the questions of its data as they are answered there? Chosen greedily, compared as text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

from tqdm import tqdm

from bumblebee.datamodule import DataModule
from bumblebee.inference.generator import Generator
from bumblebee.inference.request import EngineRequest
from bumblebee.inference.sampling_params import SamplingParams
from bumblebee.nn import IGNORE_INDEX

ROLES = ("system", "user", "assistant")  # what is left of a turn's mark in many templates, without its special token


@dataclass(frozen=True)
class Question:
    """Where an answer begins.

    Args:
        prompt: ids of everything before the answer; in a conversation, earlier answers as the data give them.
        answer: ids of the answer in the data, the end of the turn included.
        turn: which question of its conversation it is, from 1.
        asked: how many ids of the prompt come behind the answer before.
    """

    prompt: list[int]
    answer: list[int]
    turn: int
    asked: int


@dataclass(frozen=True)
class Answered:
    """A question with what the model says.

    Args:
        question: its text, special tokens left out.
        turn: which question of its conversation it is, from 1.
        expected: text of the answer in the data.
        given: text of the model's answer.
    """

    question: str
    turn: int
    expected: str
    given: str

    @property
    def right(self) -> bool:
        """Whether both answers are the same text."""
        return self.given.strip() == self.expected.strip()


def questions(data: DataModule, samples: Sequence[Any]) -> Iterator[Question]:
    """The questions of all conversations in some samples, in their order."""
    for index in range(len(samples)):
        batch = data.collate([samples[index]])
        for row in zip(*(batch[name].tolist() for name in ("input_ids", "labels", "position_ids")), strict=True):
            yield from _in_row(*row)


def _in_row(input_ids: list[int], labels: list[int], position_ids: list[int]) -> Iterator[Question]:
    """A piece of a row begins wherever the position is 0; its runs of targets are answers, and padding has none."""
    begins = [place for place, position in enumerate(position_ids) if position == 0]
    for begin, end in zip(begins, [*begins[1:], len(labels)], strict=True):
        runs = groupby(range(begin, end), lambda place: labels[place] != IGNORE_INDEX)
        answers = [list(places) for trained, places in runs if trained]
        said = begin  # where what is not yet answered begins
        for turn, (first, *rest) in enumerate(answers, start=1):
            last = first + len(rest)
            yield Question(input_ids[begin : first + 1], labels[first : last + 1], turn, first + 1 - said)
            said = last + 1


def answered(generator: Generator, asked: Iterable[Question], limit: int | None = None) -> list[Answered]:
    """The model's greedy answers, in the questions' order.

    Args:
        generator: the model.
        asked: questions.
        limit: how many of them; None for all.
    """
    chosen, decode = list(islice(asked, limit)), generator.tokenizer.decode
    given = [""] * len(chosen)
    with tqdm(total=len(chosen), desc="answering", unit=" questions", disable=None, leave=False) as bar:
        ends = generator.tokenizer.end_of_turn_ids
        for output in generator.outputs([_request(number, question, ends) for number, question in enumerate(chosen)]):
            given[int(output.id)] += output.text
            bar.update(output.finish_reason is not None)
    return [
        Answered(_without_roles(decode(question.prompt[-question.asked :])), question.turn, decode(question.answer), text)
        for question, text in zip(chosen, given, strict=True)
    ]


def _request(number: int, question: Question, ends: list[int]) -> EngineRequest:
    """What goes on for longer than the answer in the data is wrong, whatever it would say."""
    params = SamplingParams(temperature=0.0, max_new_tokens=len(question.answer) + 1, stop_ids=ends)
    return EngineRequest(str(number), question.prompt, params)


def _without_roles(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if line.strip() not in ROLES).strip()
