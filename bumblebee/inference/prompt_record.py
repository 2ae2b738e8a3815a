"""A prompt as a file has it: plain data. Torch is not imported; ``datamodules.prompts`` reads the files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PromptRecord:
    """What a record of a file asks.

    Args:
        place: file and line, for messages about it.
        record: all its keys.
        content: a text, or the messages of a chat, the last of which is to be answered.
        tools: that the chat's answer may call, as the template takes them.
    """

    place: str
    record: dict[str, Any]
    content: str | list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None

    @classmethod
    def of(cls, text: str) -> PromptRecord:
        """A text that was given on the command line."""
        return cls("prompt", {"prompt": text}, text)
