"""Prompts from a file: each line of a .txt file, or each record of the other formats with "prompt" or "messages".

{"prompt": "The bee"}                                        a text to continue, or with --chat a question
{"messages": [{"role": "user", "content": "Why?"}], ...}     a chat up to what is to be answered, in any of its formats
"""

from __future__ import annotations

from collections.abc import Iterator

from bumblebee.inference.batch import PromptRecord
from datamodules import record_files
from datamodules.chat_formats import FORMATS
from datamodules.conversations import question
from datamodules.record_files import Record, RecordError


def read_prompts(path: str) -> Iterator[PromptRecord]:
    """The prompts of a file, in order. Blank lines are none.

    Raises:
        RecordError: a record that asks nothing, or damage; the message names file and line.
        ValueError: a file of an unsupported kind.
    """
    for record in record_files.read(path):
        if path.lower().removesuffix(".gz").endswith(".txt"):
            yield from _lines(record)
        else:
            yield _prompt(record)


def _lines(document: Record) -> Iterator[PromptRecord]:
    for number, line in enumerate(document.value["text"].split("\n"), start=1):
        if line.strip():
            yield PromptRecord(f"{document.file}:{number}", {"prompt": line}, line)


def _prompt(record: Record) -> PromptRecord:
    found, place = [key for key in ("prompt", *FORMATS) if key in record.value], f"{record.file}:{record.line}"
    if len(found) != 1:
        keys = ", ".join(map(repr, record.value)) or "none"
        raise RecordError(record.file, record.line, f"one of 'prompt' and 'messages' is expected; the record's keys: {keys}")
    if found != ["prompt"]:
        return PromptRecord(place, record.value, *question(record))
    text = record.value["prompt"]
    if not isinstance(text, str) or not text:
        what = "is empty" if text == "" else f"must be a string, not {record_files.kind(text)}"
        raise RecordError(record.file, record.line, f"'prompt' {what}")
    return PromptRecord(place, record.value, text)
