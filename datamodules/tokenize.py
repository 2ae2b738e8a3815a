"""Record tokenizers: from records to ids and target masks.

They are sent to worker processes, so they are small to pickle, and torch is not imported here.
"""

from __future__ import annotations

import inspect
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain, compress
from typing import Literal

import numpy as np

from bumblebee.tokenizer.chat_template import EncodedChat, Message, Tool
from bumblebee.tokenizer.tokenizer import Tokenizer
from bumblebee.utils.json_files import JSON
from datamodules import record_files
from datamodules.conversations import parse_conversation, parse_labelled, parse_preference, with_system
from datamodules.records import Record, RecordError

WHITESPACE = re.compile(r"\s")
DIGESTED = 1 << 16  # characters of a text that are digested at once


@dataclass(frozen=True)
class TokenizedSample:
    """A tokenized record.

    Args:
        sequences: ids of each sequence; as many as ``sequences_per_sample`` says.
        target_masks: for each sequence whether each token is a target; None if all are.
        digest: see :func:`text_digest`.
        values: a number for each sequence, where the tokenizer is ``valued``.
    """

    sequences: Sequence[Sequence[int] | np.ndarray]
    target_masks: list[list[bool]] | None
    digest: int
    values: Sequence[float] = ()


@dataclass(frozen=True)
class TokenizedBatch:
    """Many samples, flattened, as they are sent between processes and written to the cache.

    Args:
        tokens: ids of all sequences, concatenated.
        target_mask: bool, of the shape of ``tokens``; None if all tokens are targets.
        lengths: tokens of each sequence.
        counts: sequences of each sample.
        digests: uint64 of each sample.
        errors: the records that could not be tokenized, by index in the batch of records.
        values: float64 of each sequence; None if the tokenizer is not ``valued``.
    """

    tokens: np.ndarray
    target_mask: np.ndarray | None
    lengths: np.ndarray
    counts: np.ndarray
    digests: np.ndarray
    errors: dict[int, RecordError]
    values: np.ndarray | None = None


class RecordTokenizer(ABC):
    """Tokenizes records.

    Args:
        folder: the tokenizer's folder, read again in each worker process.
        tokenizer: the tokenizer in this process.
    """

    sequences_per_sample: int | None = 1  # None if it varies
    masked = True  # whether some tokens are not targets
    valued = False  # whether each sequence has a number, such as a label
    multithreaded = False  # whether it uses all cores without worker processes

    def __init__(self, folder: str, tokenizer: Tokenizer) -> None:
        self.folder, self.tokenizer = folder, tokenizer

    def __getstate__(self) -> dict[str, object]:
        # Reading the folder again is faster than sending the vocabulary, but data.chat_template is not in the folder.
        template = self.tokenizer.settings.get("chat_template")
        return {name: value for name, value in self.__dict__.items() if name != "tokenizer"} | {"template": template}

    def __setstate__(self, state: dict[str, object]) -> None:
        template = state.pop("template")
        self.__dict__.update(state, tokenizer=Tokenizer.from_pretrained(str(state["folder"])))
        self.tokenizer.settings["chat_template"] = template

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """The smallest dtype that holds all ids."""
        return np.uint16 if self.tokenizer.vocab_size <= 2**16 else np.uint32

    def key_parts(self) -> list[JSON]:
        """What determines the ids besides tokenizer and files, for the key of the cache.

        For a class that is defined elsewhere, this includes its source.
        """
        cls = type(self)
        source = None if cls.__module__ == __name__ else inspect.getsource(cls)
        return [cls.__qualname__, source, *(["valued"] if self.valued else [])]

    @abstractmethod
    def tokenize(self, records: Sequence[Record]) -> list[TokenizedSample | RecordError]:
        """For each record its sample, or the reason why there is none."""

    def tokenize_batch(self, items: Sequence[Record | RecordError]) -> TokenizedBatch:
        """:meth:`tokenize`, flattened. Errors from reading are passed through."""
        tokenized = iter(self.tokenize([item for item in items if isinstance(item, Record)]))
        results = [next(tokenized) if isinstance(item, Record) else item for item in items]
        samples = [result for result in results if isinstance(result, TokenizedSample)]
        sequences = [ids for sample in samples for ids in sample.sequences]
        masks = chain.from_iterable(mask for sample in samples for mask in sample.target_masks or ())
        return TokenizedBatch(
            _concatenate(sequences, self.dtype),
            np.fromiter(masks, bool) if self.masked else None,
            np.array([len(ids) for ids in sequences], np.int64),
            np.array([len(sample.sequences) for sample in samples], np.int64),
            np.array([sample.digest for sample in samples], np.uint64),
            {index: result for index, result in enumerate(results) if isinstance(result, RecordError)},
            np.array([value for sample in samples for value in sample.values], np.float64) if self.valued else None,
        )


def _concatenate(sequences: Sequence[Sequence[int] | np.ndarray], dtype: type[np.unsignedinteger]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *(np.asarray(ids, dtype) for ids in sequences)])


class TextTokenizer(RecordTokenizer):
    """``{"text": ...}`` -> its ids and the end-of-text id, all of them targets."""

    masked = False
    multithreaded = True  # encode_batch runs without the GIL

    def tokenize(self, records: Sequence[Record]) -> list[TokenizedSample | RecordError]:
        """See the base class."""
        eos = self.tokenizer.eos_token_id
        assert eos is not None
        texts = [_text_or_error(record) for record in records]
        ids = iter(self.tokenizer.encode_batch([text for text in texts if isinstance(text, str)]))
        return [
            TokenizedSample([np.append(next(ids), np.uint32(eos))], None, text_digest(text)) if isinstance(text, str) else text
            for text in texts
        ]


def _text_or_error(record: Record) -> str | RecordError:
    try:
        return record_files.text_of(record)
    except RecordError as error:
        return error


class ChatTokenizer(RecordTokenizer):
    """Base class for records that are rendered with the chat template.

    Args:
        folder: the tokenizer's folder.
        tokenizer: the tokenizer, with its chat template.
        system: system prompt for conversations that do not have one, or None.
    """

    def __init__(self, folder: str, tokenizer: Tokenizer, system: str | None) -> None:
        super().__init__(folder, tokenizer)
        self.system = system

    def key_parts(self) -> list[JSON]:
        """See the base class. Raises ValueError for a folder without a usable template before any record is read."""
        sources: dict[str, JSON] = dict(self.tokenizer.chat_template.sources)
        return [*super().key_parts(), self.system, sources]

    def tokenize(self, records: Sequence[Record]) -> list[TokenizedSample | RecordError]:
        """See the base class."""
        return [self._sample_or_error(record) for record in records]

    def _sample_or_error(self, record: Record) -> TokenizedSample | RecordError:
        try:
            return self.tokenize_record(record)
        except RecordError as error:
            return error
        except ValueError as error:  # from the chat template
            return RecordError(record.file, record.line, str(error))

    @abstractmethod
    def tokenize_record(self, record: Record) -> TokenizedSample:
        """Tokenize one record.

        Raises:
            ValueError: the record cannot be used.
        """

    def _encode(self, messages: Sequence[Message], tools: list[Tool] | None, train_on: str) -> list[EncodedChat]:
        return self.tokenizer.chat_template.encode_turns(with_system(messages, self.system), tools, train_on)


class ConversationTokenizer(ChatTokenizer):
    """A conversation -> one sequence, with the assistant turns as targets.

    It becomes several sequences if the chat template renders earlier turns differently when others follow.

    Args:
        folder: the tokenizer's folder.
        tokenizer: the tokenizer, with its chat template.
        system: system prompt for conversations that do not have one, or None.
        train_on: "all" assistant turns, or only the "last".
    """

    sequences_per_sample = None

    def __init__(self, folder: str, tokenizer: Tokenizer, system: str | None, train_on: Literal["all", "last"]) -> None:
        super().__init__(folder, tokenizer, system)
        self.train_on = train_on

    def key_parts(self) -> list[JSON]:
        """See the base class."""
        return [*super().key_parts(), self.train_on]

    def tokenize_record(self, record: Record) -> TokenizedSample:
        """See the base class."""
        chat = parse_conversation(record)
        encoded = self._encode(chat.messages, chat.tools, self.train_on)
        ids, masks = [chat.ids for chat in encoded], [chat.target_mask for chat in encoded]
        return TokenizedSample(ids, masks, chat_digest([chat.messages, chat.tools]))


class PreferenceTokenizer(ChatTokenizer):
    """A preference pair -> two sequences, prompt + chosen answer and prompt + rejected answer, each ending with the answer.

    The value of both is the pair's margin; NaN without one.
    """

    sequences_per_sample = 2
    valued = True

    def tokenize_record(self, record: Record) -> TokenizedSample:
        """See the base class."""
        pair = parse_preference(record)
        both = [[*pair.prompt, answer] for answer in (pair.chosen, pair.rejected)]
        encoded = [chat for messages in both for chat in self._encode(messages, pair.tools, "last")]
        prompts, answers = zip(*(_split_prompt(chat.ids, chat.target_mask) for chat in encoded), strict=True)
        if prompts[0] != prompts[1]:
            raise ValueError("the chat template renders the prompt differently before the rejected and the chosen answer")
        return TokenizedSample(
            [prompts[0] + answer for answer in answers],
            [[False] * len(prompts[0]) + [True] * len(answer) for answer in answers],
            chat_digest([pair.prompt, pair.chosen, pair.rejected, pair.tools, *([] if pair.margin is None else [pair.margin])]),
            [math.nan if pair.margin is None else pair.margin] * 2,
        )


class LabelledTokenizer(ChatTokenizer):
    """An answer with a label -> one sequence, prompt + answer, whose value is 1 for a good answer and 0 for a bad one.

    A preference pair becomes two sequences.
    """

    sequences_per_sample = None
    valued = True

    def tokenize_record(self, record: Record) -> TokenizedSample:
        """See the base class."""
        examples = parse_labelled(record)
        encoded = [self._encode([*each.prompt, each.answer], each.tools, "last")[-1] for each in examples]
        split = [_split_prompt(chat.ids, chat.target_mask) for chat in encoded]
        return TokenizedSample(
            [prompt + answer for prompt, answer in split],
            [[False] * len(prompt) + [True] * len(answer) for prompt, answer in split],
            chat_digest([[each.prompt, each.answer, each.label, each.tools] for each in examples]),
            [float(each.label) for each in examples],
        )


def _split_prompt(ids: list[int], mask: list[bool]) -> tuple[list[int], list[int]]:
    """(prompt, answer); what the template writes after the answer is dropped."""
    prompt, answer = ids[: mask.index(True)], list(compress(ids, mask))
    assert ids[len(prompt) : len(prompt) + len(answer)] == answer, "an answer in several parts"
    return prompt, answer


# -- digests: samples with the same digest are duplicates, and are never split between training and validation -----------


def text_digest(text: str) -> int:
    """A 64-bit hash of a text, equal for texts that differ in whitespace only."""
    digest, separator = blake2b(digest_size=8), ""
    for part in _parts(text):
        if words := part.split():
            digest.update((separator + " ".join(words)).encode())
            separator = " "
    return int.from_bytes(digest.digest(), "little")


def _parts(text: str) -> Iterator[str]:
    """Parts of a text that end before whitespace; to split all of it into words takes many times its size."""
    begin = 0
    while found := WHITESPACE.search(text, begin + DIGESTED):
        yield text[begin : found.start()]
        begin = found.start()
    yield text[begin:] if begin else text


def chat_digest(chat: object) -> int:
    """:func:`text_digest` of all roles, contents, calls and tools of a chat."""
    return text_digest("\0".join(_strings(chat)))


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
    else:
        yield " ".join(str(value).split())
