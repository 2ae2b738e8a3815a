"""Questions about Python with their answers from its documentation: ``python_docs`` for chats instead of plain text.

    conversations   a question about a function or class -> the first sentence of its documentation, or all of it; or several
                    such questions, one after the other
    preferences     the same question, its right answer preferred to that of another one, of about the same length

What is asked about is whatever has a first sentence that can stand alone. Everything follows from the interpreter's own
documentation (``python_docs.py``), in an order that is always the same.

    python -c "from datamodules import python_docs_pairs as p; print(*list(p.conversations())[:3], sep='\\n')"
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from itertools import cycle, islice
from typing import Any, Literal

from datamodules import python_docs
from datamodules.python_docs import Entry

FORMAT = 1  # raise it whenever the same documentation would give other pairs: caches are keyed by it

Answer = Literal["first_sentence", "whole"]
Asked = tuple[dict[str, str], dict[str, str]]  # a question and its answer, each a message

MIN_WORDS, MAX_CHARACTERS = 4, 300  # of a first sentence
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
PHRASINGS = len(QUESTIONS["function"])

PRIVATE = re.compile(r"(^|\.)_")  # nobody asks about these; special methods are not what one calls
# A sentence ends in front of a capital, but not behind an abbreviation or an initial.
SENTENCE_END = re.compile(r"(?<!\be\.g)(?<!\bi\.e)(?<!\bvs)(?<!\bcf)(?<!\betc)(?<!\b[A-Za-z])[.!?](?=\s+[A-Z`'\"(]|$)")
BEGINS_WELL = re.compile(r"[A-Z][a-z']*,? ")  # a word, not a call or a name
# What makes documentation for the eye: prompts, arrows, tables, markup, cross references.
NO_PROSE = re.compile(r">>>|->|--|==|\.\.|::|[|{}<>\\^~]|:\w+:|__\w+__\(|\w+\(.*\(|\s[*#]\s")


def conversations(
    answer: Answer = "first_sentence", phrasings: int = 1, things: int | None = None, turns: int = 1, times: int = 1
) -> Iterator[dict[str, Any]]:
    """Records in OpenAI's format.

    Args:
        answer: the first sentence, or the whole text.
        phrasings: how many questions are asked about each thing, differently worded.
        things: how many functions and classes are asked about, chosen by a hash of their names; None for all.
        turns: the most questions that a conversation has: the first has one, the next two, and behind that of so many it
            begins with one again. Which questions meet is a matter of chance, their order that of a hash.
        times: how often each question is asked, where there are several turns among other questions each time.

    Raises:
        ValueError: an unknown answer, or a number of phrasings, things, turns or times that there are not.
    """
    check(answer, phrasings, things, turns, times)
    asked = [
        (_user(question), _assistant(_answered(entry, sentence, answer)))
        for number, (entry, sentence) in enumerate(askable(things))
        for question in questions(entry, number, phrasings)
    ]
    sizes = cycle(range(1, turns + 1))
    for time in range(times):
        left = iter(asked if turns == 1 else _shuffled(asked, time))
        while pairs := list(islice(left, next(sizes))):
            yield {"messages": [message for pair in pairs for message in pair]}


def _shuffled(asked: list[Asked], time: int) -> list[Asked]:
    return sorted(asked, key=lambda pair: _digest(f"{time} {pair[0]['content']}"))


def preferences(answer: Answer = "first_sentence", phrasings: int = 1, things: int | None = None) -> Iterator[dict[str, Any]]:
    """Records in OpenAI's format with ``chosen`` and ``rejected``. Arguments and errors: ``conversations``."""
    check(answer, phrasings, things)
    entries = askable(things)
    texts = [_answered(entry, sentence, answer) for entry, sentence in entries]
    wrong = _others([entry.name for entry, _ in entries], texts)
    for number, (entry, _) in enumerate(entries):
        chosen, rejected = _assistant(texts[number]), _assistant(texts[wrong[number]])
        for question in questions(entry, number, phrasings):
            yield {"messages": [_user(question)], "chosen": chosen, "rejected": rejected}


def check(answer: Any, phrasings: Any, things: Any = None, turns: Any = 1, times: Any = 1) -> None:
    """Refuse options that mean nothing.

    Raises:
        ValueError: see ``conversations``.
    """
    if answer not in ("first_sentence", "whole"):
        raise ValueError(f"files: the answer of 'python_docs' must be first_sentence or whole, got {answer!r}")
    if not _whole(phrasings, 1) or phrasings > PHRASINGS:
        raise ValueError(f"files: the phrasings of 'python_docs' must be a number from 1 to {PHRASINGS}, got {phrasings!r}")
    if things is not None and not _whole(things, 2):
        raise ValueError(f"files: the things of 'python_docs' must be 2 or more, got {things!r}; leave them out for all")
    for name, count in {"turns": turns, "times": times}.items():
        if not _whole(count, 1):
            raise ValueError(f"files: the {name} of 'python_docs' must be a number from 1, got {count!r}")


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def askable(things: int | None = None) -> list[tuple[Entry, str]]:
    """Public functions, methods and classes with the first sentence of their documentation, where that can stand alone.

    Args:
        things: how many of them, chosen by a hash of their names; None for all.
    """
    public = [entry for entry in python_docs.entries() if entry.kind in QUESTIONS and not PRIVATE.search(entry.name)]
    found = [(entry, first_sentence(entry.text)) for entry in public]
    clean = [(entry, sentence) for entry, sentence in found if sentence]
    if things is None:
        return clean
    chosen = {entry.name for entry, _ in sorted(clean, key=lambda pair: _digest(pair[0].name))[:things]}
    return [(entry, sentence) for entry, sentence in clean if entry.name in chosen]


def _digest(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=8).digest()


def questions(entry: Entry, number: int, phrasings: int) -> list[str]:
    """So many questions about an entry; which wording comes first goes round with its number."""
    asked = QUESTIONS[entry.kind]
    return [asked[(number + turn) % PHRASINGS].format(name=entry.name) for turn in range(phrasings)]


def first_sentence(text: str) -> str:
    """The first sentence of a docstring, or "" where it is no clean prose."""
    paragraph = " ".join(text.split("\n\n")[0].split())
    end = SENTENCE_END.search(paragraph)
    sentence = paragraph[: end.end()] if end else paragraph
    if len(sentence.split()) < MIN_WORDS or len(sentence) > MAX_CHARACTERS or not BEGINS_WELL.match(sentence):
        return ""
    if NO_PROSE.search(sentence) or not sentence.isprintable() or not _balanced(sentence):
        return ""
    return sentence if end else _ended(sentence)


def _ended(sentence: str) -> str:
    """With its full stop; "" where it goes on in another way, with a list or a formula."""
    return f"{sentence}." if sentence[-1].isalnum() or sentence[-1] in "`'\")" else ""


def _balanced(sentence: str) -> bool:
    pairs = all(sentence.count(opening) == sentence.count(closing) for opening, closing in ("()", "[]"))
    return pairs and sentence.count('"') % 2 == 0 and sentence.count("`") % 2 == 0


def _others(names: list[str], texts: list[str]) -> list[int]:
    """For each entry another one: the nearest in length that says something else about something of another name."""
    order = sorted(range(len(texts)), key=lambda number: (len(texts[number]), names[number]))
    chosen = [0] * len(texts)
    for place, number in enumerate(order):
        around = (place + side * step for step in range(1, len(order)) for side in (1, -1))
        nearby = (order[other] for other in around if 0 <= other < len(order))
        chosen[number] = next(other for other in nearby if _differ(number, other, names, texts))
    return chosen


def _differ(one: int, other: int, names: list[str], texts: list[str]) -> bool:
    last = [names[number].rpartition(".")[2] for number in (one, other)]
    return texts[one] != texts[other] and last[0] != last[1]


def _answered(entry: Entry, sentence: str, answer: Answer) -> str:
    return sentence if answer == "first_sentence" else entry.text


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def _assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}
