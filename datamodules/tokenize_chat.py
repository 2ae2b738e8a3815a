"""Encoders of chats: conversations with their targets, and prompts with two answers. Torch is not imported here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import compress
from typing import Any, Literal

from bumblebee.tokenizer.tokenizer import Tokenizer
from datamodules.conversations import Message, conversation, preference, with_system
from datamodules.record_files import Record, RecordError
from datamodules.token_cache import text_digest
from datamodules.tokenize import Encoder, Sample


class ChatEncoder(Encoder):
    """What both kinds share.

    Args:
        folder: of the tokenizer.
        tokenizer: with its chat template.
        system: system prompt of conversations that bring none, or None.
    """

    def __init__(self, folder: str, tokenizer: Tokenizer, system: str | None) -> None:
        super().__init__(folder, tokenizer)
        self.system = system

    def identity(self) -> list[Any]:
        """See the base class. A folder without a usable template is found out here, before any record is read."""
        return [*super().identity(), self.system, self.tokenizer.chat_template.sources]

    def samples(self, records: Sequence[Record]) -> list[Sample | RecordError]:
        """See the base class."""
        return [self._sample_or_error(record) for record in records]

    def _sample_or_error(self, record: Record) -> Sample | RecordError:
        try:
            return self.sample(record)
        except RecordError as error:
            return error
        except ValueError as error:  # of the chat template
            return RecordError(record.file, record.line, str(error))

    def sample(self, record: Record) -> Sample:
        """A record's sample.

        Raises:
            ValueError: there is none; why.
        """
        raise NotImplementedError

    def _encode(self, messages: Sequence[Message], tools: Any, train_on: str) -> tuple[list[int], list[bool]]:
        chat = self.tokenizer.chat_template.encode(with_system(messages, self.system), tools, train_on)
        return chat.ids, chat.target_mask


class ConversationEncoder(ChatEncoder):
    """A conversation -> one sequence; the assistant's turns are its targets.

    Args:
        folder: of the tokenizer.
        tokenizer: with its chat template.
        system: system prompt of conversations that bring none, or None.
        train_on: "all" turns of the assistant, or the "last".
    """

    def __init__(self, folder: str, tokenizer: Tokenizer, system: str | None, train_on: Literal["all", "last"]) -> None:
        super().__init__(folder, tokenizer, system)
        self.train_on = train_on

    def identity(self) -> list[Any]:
        """See the base class."""
        return [*super().identity(), self.train_on]

    def sample(self, record: Record) -> Sample:
        """See the base class."""
        chat = conversation(record)
        ids, trained = self._encode(chat.messages, chat.tools, self.train_on)
        return Sample([ids], [trained], chat_digest([chat.messages, chat.tools]))


class PreferenceEncoder(ChatEncoder):
    """A preference -> two sequences, prompt and chosen answer, prompt and rejected answer; they end with the answers."""

    sequences = 2

    def sample(self, record: Record) -> Sample:
        """See the base class."""
        pair = preference(record)
        rows = [self._encode([*pair.prompt, answer], pair.tools, "last") for answer in (pair.chosen, pair.rejected)]
        prompts, answers = zip(*(_parted(ids, trained) for ids, trained in rows), strict=True)
        if prompts[0] != prompts[1]:
            raise ValueError(
                "the chat template writes the prompt in another way before the rejected answer than before the chosen"
            )
        trained = [[False] * len(prompts[0]) + [True] * len(answer) for answer in answers]
        return Sample(
            [prompts[0] + answer for answer in answers],
            trained,
            chat_digest([pair.prompt, pair.chosen, pair.rejected, pair.tools]),
        )


def _parted(ids: list[int], trained: list[bool]) -> tuple[list[int], list[int]]:
    """(prompt, answer); what a template writes behind the answer is of no use to it."""
    prompt, answer = ids[: trained.index(True)], list(compress(ids, trained))
    assert ids[len(prompt) : len(prompt) + len(answer)] == answer, "an answer in several parts"
    return prompt, answer


def chat_digest(chat: Any) -> int:
    """``text_digest`` of all that is said in a chat, by whom, and of its tools."""
    return text_digest("\0".join(_strings(chat)))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)
    else:
        yield " ".join(str(value).split())
