"""Questions about Python's functions and classes, answered by the first sentence of their documentation.

A subject is an entry whose documentation begins with a clean sentence. Subjects become conversations (SFT), preference pairs
(DPO) and multiple-choice questions; the wrong answers are the right ones of other subjects, close in length, so that length
does not reveal which one is right.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

from stdlib_docs import Entry

Message = dict[str, str]

QUESTIONS = {
    "function": (
        "What does `{name}` do in Python?",
        "Explain what `{name}` does.",
        "What is `{name}` for?",
        "I came across `{name}` in some Python code. What does it do?",
        "Describe Python's `{name}`.",
        "In Python, when would I use `{name}`?",
    ),
    "class": (
        "What is `{name}` in Python?",
        "Explain the class `{name}`.",
        "What is `{name}` for?",
        "I came across `{name}` in some Python code. What is it?",
        "Describe Python's `{name}`.",
        "In Python, when would I use `{name}`?",
    ),
}
MAX_PHRASINGS = len(QUESTIONS["function"])

MIN_WORDS, MAX_CHARACTERS = 4, 300  # of an answer
PRIVATE = re.compile(r"(^|\.)_")  # private names and special methods are not asked about
# A sentence ends before a capital letter, but not after an abbreviation or an initial.
SENTENCE_END = re.compile(r"(?<!\be\.g)(?<!\bi\.e)(?<!\bvs)(?<!\bcf)(?<!\betc)(?<!\b[A-Za-z])[.!?](?=\s+[A-Z`'\"(]|$)")
STARTS_WITH_A_WORD = re.compile(r"[A-Z][a-z']*,? ")  # rather than a call or a name
# Prompts, arrows, tables, markup and cross references.
NOT_PROSE = re.compile(r">>>|->|--|==|\.\.|::|[|{}<>\\^~]|:\w+:|__\w+__\(|\w+\(.*\(|\s[*#]\s")


@dataclass(frozen=True)
class Subject:
    """A function or class to ask about.

    Attributes:
        name: dotted name, `json.dumps`.
        kind: "function" or "class".
        answer: the first sentence of its documentation.
        first_phrasing: index of the wording that `phrasings` starts with; varies between subjects.
    """

    name: str
    kind: str
    answer: str
    first_phrasing: int

    def phrasings(self, count: int = 1) -> list[str]:
        """``count`` different questions, at most MAX_PHRASINGS."""
        templates = QUESTIONS[self.kind]
        return [templates[(self.first_phrasing + i) % MAX_PHRASINGS].format(name=self.name) for i in range(count)]


def askable(entries: Sequence[Entry]) -> list[tuple[Entry, str]]:
    """(entry, first sentence) of the public functions and classes whose documentation begins with a clean sentence."""
    public = [entry for entry in entries if entry.kind in QUESTIONS and not PRIVATE.search(entry.name)]
    return [(entry, sentence) for entry in public if (sentence := first_sentence(entry.text))]


def select(askable: Sequence[tuple[Entry, str]], count: int) -> list[Subject]:
    """``count`` subjects in the entries' order, chosen by a hash of their names: nearly the same ones in any Python version."""
    names = set(sorted((entry.name for entry, _ in askable), key=_digest)[:count])
    chosen = [(entry, sentence) for entry, sentence in askable if entry.name in names]
    return [Subject(entry.name, entry.kind, sentence, number) for number, (entry, sentence) in enumerate(chosen)]


def _digest(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=8).digest()


# -- records -----------------------------------------------------------------------------------------------------------


def conversations(
    subjects: Sequence[Subject], rng: random.Random, *, repeats: int, max_questions: int
) -> list[dict[str, list[Message]]]:
    """Conversations in OpenAI's format.

    Args:
        subjects: what is asked about.
        rng: shuffles the questions before each repetition.
        repeats: how often each question is asked in total, next to other questions each time.
        max_questions: sizes cycle through 1, 2, ..., max_questions questions per conversation.
    """
    sizes = cycle(range(1, max_questions + 1))
    records = []
    for _ in range(repeats):
        remaining = iter(rng.sample(subjects, len(subjects)))
        while group := list(islice(remaining, next(sizes))):
            records.append({"messages": [message for subject in group for message in _exchange(subject)]})
    return records


def preferences(subjects: Sequence[Subject], phrasings: int) -> list[dict[str, Any]]:
    """Pairs in OpenAI's format with ``chosen`` and ``rejected``; ``phrasings`` pairs per subject."""
    return [
        {"messages": [_user(question)], "chosen": _assistant(subject.answer), "rejected": _assistant(wrong)}
        for subject, (wrong,) in zip(subjects, wrong_answers(subjects, 1), strict=True)
        for question in subject.phrasings(phrasings)
    ]


def multiple_choice(subjects: Sequence[Subject], rng: random.Random, choices: int) -> list[dict[str, Any]]:
    """Questions with ``choices`` answers in random order; ``gold`` is the index of the right one."""
    records = []
    for subject, wrong in zip(subjects, wrong_answers(subjects, choices - 1), strict=True):
        answers = rng.sample([subject.answer, *wrong], choices)
        records.append({"context": subject.phrasings()[0], "choices": answers, "gold": answers.index(subject.answer)})
    return records


def wrong_answers(subjects: Sequence[Subject], count: int) -> list[list[str]]:
    """For each subject, ``count`` different answers of other subjects, the closest ones in length.

    Subjects with the same last name (`dict.update`, `set.update`) are passed over: their answers may be right for both.
    """
    order = sorted(range(len(subjects)), key=lambda i: (len(subjects[i].answer), subjects[i].name))
    wrong: list[list[str]] = [[] for _ in subjects]
    for position, i in enumerate(order):
        candidates = (subjects[order[near]] for near in _outward(position, len(order)))
        answers = (other.answer for other in candidates if _last(other.name) != _last(subjects[i].name))
        different = dict.fromkeys([subjects[i].answer])
        while len(different) <= count:
            different[next(answers)] = None
        wrong[i] = list(different)[1:]
    return wrong


def _outward(position: int, length: int) -> Iterator[int]:
    """The other positions of a list by their distance."""
    around = (position + side * distance for distance in range(1, length) for side in (1, -1))
    return (near for near in around if 0 <= near < length)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _exchange(subject: Subject) -> list[Message]:
    return [_user(subject.phrasings()[0]), _assistant(subject.answer)]


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


# -- answers -----------------------------------------------------------------------------------------------------------


def first_sentence(text: str) -> str:
    """The first sentence of a docstring, or "" if it is not clean prose."""
    paragraph = " ".join(text.split("\n\n")[0].split())
    end = SENTENCE_END.search(paragraph)
    sentence = paragraph[: end.end()] if end else paragraph
    if len(sentence.split()) < MIN_WORDS or len(sentence) > MAX_CHARACTERS or not STARTS_WITH_A_WORD.match(sentence):
        return ""
    if NOT_PROSE.search(sentence) or not sentence.isprintable() or not _is_balanced(sentence):
        return ""
    return sentence if end else _with_full_stop(sentence)


def _with_full_stop(sentence: str) -> str:
    """The sentence with a full stop; "" if it continues with a list or a formula."""
    return f"{sentence}." if sentence[-1].isalnum() or sentence[-1] in "`'\")" else ""


def _is_balanced(sentence: str) -> bool:
    brackets = all(sentence.count(opening) == sentence.count(closing) for opening, closing in ("()", "[]"))
    return brackets and sentence.count('"') % 2 == 0 and sentence.count("`") % 2 == 0
