"""Conversation: the system prompt and the turns, and their files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from serve.terminal.partner import Message


class Conversation:
    """Questions and their answers.

    Args:
        system: the system prompt, or None.
        remembers: a new question is asked with the earlier turns before it.
    """

    def __init__(self, system: str | None = None, remembers: bool = True) -> None:
        self.system = system
        self.remembers = remembers
        self.turns: list[tuple[str, str]] = []
        self._written: set[Path] = set()

    def asked(self, question: str) -> list[Message]:
        """The messages that ask a question."""
        return [*_messages(self.system, self.turns if self.remembers else []), {"role": "user", "content": question}]

    def save(self, name: str) -> Path:
        """Write it: Markdown to a ``.md`` file; to a ``.json`` file ``{"messages": [...]}``, which training reads as well.

        Raises:
            ValueError: another extension, or a file that this conversation has not written itself.
        """
        path = Path(name).expanduser()
        if path.suffix not in (".json", ".md"):
            raise ValueError(f"{name}: expected a file name that ends in .json or .md")
        if path.exists() and path.resolve() not in self._written:
            raise ValueError(f"{name} is there already: take another name")
        messages = _messages(self.system, self.turns)
        text = (
            json.dumps({"messages": messages}, ensure_ascii=False, indent=2) if path.suffix == ".json" else _markdown(messages)
        )
        path.write_text(text.rstrip() + "\n", encoding="utf-8")
        self._written.add(path.resolve())
        return path

    def load(self, name: str) -> None:
        """Go on with what ``save`` has written to a ``.json`` file.

        Raises:
            ValueError: it cannot be read, or holds anything but a system prompt and questions with answers.
        """
        try:
            self.system, self.turns = _turns(json.loads(Path(name).expanduser().read_text(encoding="utf-8")))
        except ValueError as error:  # no UTF-8, no JSON, no conversation
            raise ValueError(f"{name} holds no conversation: {error}") from None


def _messages(system: str | None, turns: Iterable[tuple[str, str]]) -> list[Message]:
    found = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in turns:
        found += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return found


def _turns(record: Any) -> tuple[str | None, list[tuple[str, str]]]:
    """What ``_messages`` has made of system prompt and turns -> these."""
    messages = record.get("messages") if isinstance(record, dict) else record
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        raise ValueError('expected {"messages": [...]}')
    if not all(isinstance(one.get("content"), str) for one in messages):
        raise ValueError("each message needs a content, a text")
    system = messages[0]["content"] if messages and messages[0].get("role") == "system" else None
    texts = [one["content"] for one in messages[system is not None :]]
    turns = list(zip(texts[::2], texts[1::2], strict=False))
    if messages != _messages(system, turns):
        raise ValueError("expected a system prompt or none, then user and assistant by turns, with role and content alone")
    return system, turns


def _markdown(messages: Iterable[Message]) -> str:
    return "\n\n".join(f"## {message['role']}\n\n{message['content'].strip()}" for message in messages)
