"""Partner: whom the chat talks to, a model in this process or one behind a server."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Message = dict[str, str]  # OpenAI's: {"role": "user", "content": "..."}


class Refusal(Exception):
    """No answer, or no more of it: why, in one line. The chat goes on."""


@dataclass
class Piece:
    """Some of an answer.

    Args:
        text: new text, may be empty.
        new_tokens: tokens of the whole answer so far; None where it is not known (yet).
        finish_reason: "stop", "length" and so on; with the last piece.
    """

    text: str
    new_tokens: int | None = None
    finish_reason: str | None = None


Pieces = Generator[Piece, None, None]


class Partner(Protocol):
    """Answers."""

    raw: bool  # continues plain text: the last message's alone

    def describe(self) -> str:
        """Who it is, in one line."""
        ...

    def reply(self, messages: Sequence[Message], sampling: dict[str, Any]) -> Pieces:
        """The answer to a conversation, piece by piece. Closing the iterator ends the work for it.

        Called where Ctrl-C is only noted (``interrupts.noted``), and looked for behind each piece.

        Args:
            messages: the last is the user's.
            sampling: fields of SamplingParams; what is not in it is the model's default.

        Raises:
            Refusal: no answer, or no more of it.
            KeyboardInterrupt: Ctrl-C while there was something to wait for.
        """
        ...
