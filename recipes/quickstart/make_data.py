"""Write the quickstart's training data: the documentation of the running Python, as text, questions and preference pairs.

    python recipes/quickstart/make_data.py --output runs/quickstart/data

Nothing is downloaded. The text comes from `help()` and the docstrings of the standard library (stdlib_docs.py); a question asks
what a function or class does, and the first sentence of its documentation is the answer (questions.py). Every file is JSON
Lines in a format that docs/data.md describes, so this script is also an example of how to prepare data of your own:

    documents.jsonl               pretraining: {"text": ...}
    documents_validation.jsonl    5% of the documents, held out
    conversations.jsonl           SFT: {"messages": [...]}; 600 questions, each asked 20 times, one to eight per conversation
    questions.jsonl               evaluation: the same 600 questions, each once, in new conversations
    preferences.jsonl             DPO: {"messages": [...], "chosen": {...}, "rejected": {...}}
    preferences_validation.jsonl  10% of the pairs, held out
    multiple_choice.jsonl         evaluation: {"context": ..., "choices": [...], "gold": ...}

The content depends only on the Python build and on --seed. Files are replaced atomically, so a rerun never leaves half a file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import questions
import stdlib_docs

Record = Mapping[str, Any]  # one line of a JSON Lines file

SUBJECTS = 600  # as many functions and classes as a model of 5 M parameters can memorize
REPEATS = 20  # a fact that appears in one context only is known in that context only, so each is asked in 20
MAX_QUESTIONS = 8  # per conversation; the model then handles follow-up questions
PHRASINGS = 4  # wordings of each question in the preference pairs; conversations use the first
CHOICES = 4
HELD_OUT_DOCUMENTS, HELD_OUT_PAIRS = 0.05, 0.1


def make_files(entries: list[stdlib_docs.Entry], seed: int) -> dict[str, list[Record]]:
    """The records of each file, by file name.

    Each file has a random generator of its own, so changing one of them does not change the others.
    """
    subjects = questions.select(questions.askable(entries), SUBJECTS)
    documents = [{"text": entry.document} for entry in entries]
    pairs = questions.preferences(subjects, PHRASINGS)
    train, held_out = split(documents, HELD_OUT_DOCUMENTS, random.Random(f"documents {seed}"))
    train_pairs, held_out_pairs = split(pairs, HELD_OUT_PAIRS, random.Random(f"preferences {seed}"))
    return {
        "documents.jsonl": train,
        "documents_validation.jsonl": held_out,
        "conversations.jsonl": questions.conversations(
            subjects, random.Random(f"conversations {seed}"), repeats=REPEATS, max_questions=MAX_QUESTIONS
        ),
        "questions.jsonl": questions.conversations(
            subjects, random.Random(f"questions {seed}"), repeats=1, max_questions=MAX_QUESTIONS
        ),
        "preferences.jsonl": train_pairs,
        "preferences_validation.jsonl": held_out_pairs,
        "multiple_choice.jsonl": questions.multiple_choice(subjects, random.Random(f"choices {seed}"), CHOICES),
    }


def split(records: list[Record], held_out: float, rng: random.Random) -> tuple[list[Record], list[Record]]:
    """(train, held out), both in the original order.

    Args:
        records: all different, so that nothing is on both sides.
        held_out: share of the records.
        rng: chooses them.
    """
    chosen = set(rng.sample(range(len(records)), round(held_out * len(records))))
    train = [record for number, record in enumerate(records) if number not in chosen]
    return train, [records[number] for number in sorted(chosen)]


def write_jsonl(path: Path, records: Iterable[Record]) -> int:
    """Write one JSON object per line, atomically. Returns the file's size in bytes."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path.stat().st_size


class OneLineParser(argparse.ArgumentParser):
    """Reports a bad argument in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main() -> None:
    parser = OneLineParser(description="Write the quickstart's training data as JSON Lines.", allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart/data"), help="folder of the files")
    parser.add_argument("--seed", type=int, default=42, help="of the order of questions and the held-out records")
    options = parser.parse_args()
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        for name, records in make_files(stdlib_docs.entries(), options.seed).items():
            size = write_jsonl(options.output / name, records)
            print(f"{options.output / name}: {len(records)} records, {size / 1e6:.1f} MB", flush=True)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
