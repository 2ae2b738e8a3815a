"""Scorers of generated answers: from the answer and the expected one to a number."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence

Scorer = Callable[[str, str], float]


def exact_match(answer: str, expected: str) -> float:
    """1 if both are the same text, ignoring surrounding whitespace."""
    return float(answer.strip() == expected.strip())


def contains(answer: str, expected: str) -> float:
    """1 if the expected text occurs in the answer."""
    return float(expected.strip() in answer)


def regex(answer: str, expected: str) -> float:
    """1 if the expected regular expression matches somewhere in the answer."""
    return float(re.search(expected, answer) is not None)


SCORERS: dict[str, Scorer] = {"exact_match": exact_match, "contains": contains, "regex": regex}


def named_scorers(names: Sequence[str]) -> dict[str, Scorer]:
    """The scorers of a task by name; a function of a class path has its last part as its name.

    Raises:
        ValueError: there is no such scorer, or a function cannot be imported.
    """
    if not names:
        raise ValueError(f"scorers must not be empty: choose from {', '.join(SCORERS)}, or name a Python function")
    return {name.rpartition(".")[2]: SCORERS[name] if name in SCORERS else _import(name) for name in names}


def _import(path: str) -> Scorer:
    module, _, name = path.rpartition(".")
    if not module:
        raise ValueError(
            f"scorers: unknown scorer {path!r}; choose from {', '.join(SCORERS)}, or name a function as module.name"
        )
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"scorers: cannot import {path!r}: {error}") from None
    if not callable(function):
        raise ValueError(f"scorers: {path!r} is not a function")
    scorer: Scorer = function
    return scorer
