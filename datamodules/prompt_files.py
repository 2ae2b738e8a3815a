"""Prompts from a file: each line of a text file, or each record of another format with "prompt" or "messages".

{"prompt": "The bee"}                                        a text to continue, or with --chat a question
{"messages": [{"role": "user", "content": "Why?"}], ...}     a chat that ends with a question, in any chat format
"""

from __future__ import annotations

from collections.abc import Iterator

from bumblebee.inference.batch import PromptRecord
from datamodules import record_files
from datamodules.chat_formats import FORMATS
from datamodules.conversations import parse_prompt
from datamodules.file_type import file_type
from datamodules.readers import READERS
from datamodules.records import Record, RecordError, json_type, keys_of


def read_prompts(path: str) -> Iterator[PromptRecord]:
    """Iterate over the prompts of a file. Blank lines of a text file are skipped.

    Raises:
        RecordError: a record without a prompt, or damage; the message names file and line.
        ValueError: the file type is not supported.
    """
    is_text = file_type(path, READERS) == ".txt"
    for record in record_files.read(path):
        if is_text:
            yield from _lines_of(record)
        else:
            yield _prompt_of(record)


def _lines_of(document: Record) -> Iterator[PromptRecord]:
    for number, line in enumerate(str(document.value["text"]).split("\n"), start=1):
        if line.strip():
            yield PromptRecord(f"{document.file}:{number}", {"prompt": line}, line)


def _prompt_of(record: Record) -> PromptRecord:
    present, source = [key for key in FORMATS if key in record.value], f"{record.file}:{record.line}"
    if len(present) != 1:
        reason = f"expected one of 'prompt' and 'messages'; the record's keys: {keys_of(record.value)}"
        raise RecordError(record.file, record.line, reason)
    if present != ["prompt"] or isinstance(record.value["prompt"], list):
        return PromptRecord(source, record.value, *parse_prompt(record))
    text = record.value["prompt"]
    if not isinstance(text, str) or not text:
        reason = "is empty" if text == "" else f"must be a string, not {json_type(text)}"
        raise RecordError(record.file, record.line, f"'prompt' {reason}")
    return PromptRecord(source, record.value, text)
