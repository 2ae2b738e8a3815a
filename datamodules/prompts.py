"""Prompts: questions for reinforcement learning, with whatever else their records hold for the rewards.

Records are in any chat format, up to the user's turn (see conversations.py): {"prompt": "2 + 2?", "answer": "4"}. A batch has a
row for each prompt, rendered with the chat template up to where the answer begins, and no targets.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from bumblebee.datamodule import Batch, DataModule
from bumblebee.nn import IGNORE_INDEX
from bumblebee.tokenizer.assistant_mask import Message
from bumblebee.tokenizer.chat_template import Tool
from bumblebee.tokenizer.tokenizer import Tokenizer
from bumblebee.utils.formatting import number, plural
from datamodules import record_files
from datamodules.conversations import parse_prompt, with_system
from datamodules.pass_rates import PassRates
from datamodules.records import Record, RecordError
from datamodules.token_datamodule import check_options, load_tokenizer

NO_PROMPT = -1  # index of a row that only fills up a rank's share


@dataclass(frozen=True)
class PromptSample:
    """A question.

    Args:
        index: in the data files, over training and held-out prompts.
        ids: its tokens, up to where the answer begins.
        question: text of the last message.
        record: all keys of its record.
        place: FILE:LINE.
        messages: the conversation up to the question, with the system prompt.
        tools: that it may use.
    """

    index: int
    ids: list[int]
    question: str
    record: dict[str, object]
    place: str
    messages: Sequence[Message] = ()
    tools: Sequence[Tool] | None = None


class Prompts(DataModule[PromptSample]):
    """Questions that a model answers in training.

    Args:
        files: a path or glob of .json, .jsonl and .parquet files, or a list of them.
        tokenizer: folder with tokenizer.json, and optionally a chat template; the default is ChatML.
        max_length: tokens of a prompt.
        system: system prompt for prompts that do not have one; null adds none.
        too_long: "drop" prompts that are longer, or "stop".
        validation_files: held-out files.
        validation_ratio: share of the prompts to hold out if there are no such files.
        chat_template: path of a Jinja file, or "chatml", to use instead of the folder's template; saved with the model.
        pass_rate_key: key of the records with the share of completions that solve them, from 0 to 1, as written by
            ``bumblebee rollouts --pass_rates``; records without it are kept.
        min_pass_rate: leave out training prompts that are solved more rarely.
        max_pass_rate: leave out training prompts that are solved more often.
        order: of the training prompts in each epoch: shuffled, or easy_first, by falling pass rate; prompts with equal rates
            are shuffled, and those without a rate come last.

    Raises:
        ValueError: a number is out of range, the folder has no tokenizer, or pass rates are limited or ordered without a key.
    """

    has_targets = False
    train: list[PromptSample]
    validation: list[PromptSample] | None = None
    tokenizer: Tokenizer

    def __init__(
        self,
        files: str | list[str],
        tokenizer: str,
        max_length: int = 512,
        system: str | None = None,
        too_long: Literal["drop", "stop"] = "drop",
        validation_files: str | list[str] | None = None,
        validation_ratio: float = 0.0,
        chat_template: str | None = None,
        pass_rate_key: str | None = None,
        min_pass_rate: float = 0.0,
        max_pass_rate: float = 1.0,
        order: Literal["shuffled", "easy_first"] = "shuffled",
    ) -> None:
        check_options(max_length, validation_files, validation_ratio)
        self.pass_rates = PassRates(pass_rate_key, min_pass_rate, max_pass_rate)
        if order == "easy_first" and pass_rate_key is None:
            raise ValueError("order: easy_first needs pass_rate_key, the key of the pass rate in the records")
        self.order = order
        self.files, self.tokenizer_folder, self.max_length = files, tokenizer, max_length
        self.system, self.too_long, self.chat_template = system, too_long, chat_template
        self.validation_files, self.validation_ratio = validation_files, validation_ratio
        self.dropped = 0

    def setup(self, seed: int) -> None:
        """Read, render and hold out."""
        self.tokenizer = load_tokenizer(self.tokenizer_folder, self.chat_template)
        self.stop_ids = self.tokenizer.chat_template.end_of_turn_ids
        self.dropped = 0
        samples = list(self._read(self.files, 0))
        if not samples:
            reason = f"; longer than max_length {self.max_length}: {self.dropped} dropped" if self.dropped else ""
            raise ValueError(f"files: there is no prompt in {self.files}{reason}")
        read = len(samples) + self.dropped
        held_out: list[PromptSample] = []
        if self.validation_files is not None:
            held_out = list(self._read(self.validation_files, read))
        elif self.validation_ratio:
            samples, held_out = _held_out(samples, self.validation_ratio)
        self.train, self.validation = self.pass_rates.select(samples), held_out or None
        self.lengths = np.array([len(sample.ids) for sample in self.train])

    def _read(self, files: str | list[str], first: int) -> Iterator[PromptSample]:
        records = (record for file in record_files.expand(files) for record in record_files.read(file))
        for index, record in enumerate(records, start=first):
            sample = self._sample(index, record)
            if len(sample.ids) <= self.max_length:
                yield sample
            elif self.too_long == "stop":
                reason = f"the prompt has {len(sample.ids)} tokens; data.max_length is {self.max_length}"
                raise RecordError(record.file, record.line, reason)
            else:
                self.dropped += 1

    def _sample(self, index: int, record: Record) -> PromptSample:
        messages, tools = parse_prompt(record)
        messages = with_system(messages, self.system)
        try:
            ids = self.tokenizer.chat_template.apply(messages, tools, True)
        except ValueError as error:
            raise RecordError(record.file, record.line, str(error)) from None
        question = messages[-1]["content"]
        place = f"{record.file}:{record.line}"
        return PromptSample(index, ids, str(question), record.value, place, messages, tools)

    def collate(self, samples: list[PromptSample]) -> Batch:
        """Prompts -> ``input_ids``, ``labels`` (no targets), ``position_ids``, each (prompts, T) int64.

        ``lengths`` and ``index`` of the prompts are (prompts,) int64. T is the length of the longest one.
        """
        lengths = torch.tensor([len(sample.ids) for sample in samples])
        shape = len(samples), int(lengths.max())
        input_ids = torch.zeros(shape, dtype=torch.int64)
        for row, sample in enumerate(samples):
            input_ids[row, : len(sample.ids)] = torch.tensor(sample.ids)
        return {
            "input_ids": input_ids,
            "labels": torch.full(shape, IGNORE_INDEX),
            "position_ids": torch.arange(shape[1]).repeat(len(samples), 1),
            "lengths": lengths,
            "index": torch.tensor([sample.index for sample in samples]),
        }

    def without_targets(self, batch: Batch) -> Batch:
        """See the base class."""
        return {**batch, "index": torch.full_like(batch["index"], NO_PROMPT)}

    def ordered(self, order: np.ndarray) -> np.ndarray:
        """See the base class."""
        if self.order == "shuffled":
            return order
        rates = self.pass_rates.rates([self.train[int(index)] for index in order])
        return order[np.argsort(-rates, kind="stable")]

    def origin(self, index: int) -> str:
        """FILE:LINE of a training prompt."""
        return self.train[index].place

    def fingerprint(self) -> dict[str, str]:
        """Digest of the training prompts, their records and their order."""
        digest = hashlib.sha256()
        for sample in self.train:
            digest.update(json.dumps([sample.ids, sample.record], sort_keys=True, default=str).encode())
        if self.order != "shuffled":
            digest.update(self.order.encode())
        return {"records": digest.hexdigest()}

    def summary(self) -> dict[str, object]:
        """Prompts, their tokens, omitted ones."""
        files = record_files.expand(self.files)
        lines: dict[str, object] = {"files": ", ".join(files), "prompts": len(self.train)}
        lines["tokens"] = f"at most {number(max(len(sample.ids) for sample in self.train))} in a prompt"
        if self.dropped:
            lines[f"longer than max_length {self.max_length}"] = f"{number(self.dropped)} dropped"
        lines.update(self.pass_rates.summary())
        if self.order == "easy_first":
            lines["order"] = "by falling pass rate"
        if self.validation is not None:
            lines["held out"] = plural(len(self.validation), "prompt")
        return lines


def _held_out(samples: list[PromptSample], ratio: float) -> tuple[list[PromptSample], list[PromptSample]]:
    """Split by content, so that equal prompts are on the same side and the split does not depend on the order of files."""
    digests = [hashlib.sha256(json.dumps(sample.ids).encode()).digest() for sample in samples]
    border = sorted(digests)[max(1, round(ratio * len(samples))) - 1]
    kept = [sample for sample, digest in zip(samples, digests, strict=True) if digest > border]
    held_out = [sample for sample, digest in zip(samples, digests, strict=True) if digest <= border]
    if not kept:
        raise ValueError(f"validation_ratio holds out all {len(samples)} prompts")
    return kept, held_out
