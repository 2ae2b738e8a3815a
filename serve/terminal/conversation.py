"""``Conversation``: the system prompt and the turns of a chat, and the files they are saved to."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from serve.terminal.backends import Message

Turn = tuple[str, str]  # question, answer


class Conversation:
    """Questions and their answers.

    Args:
        system: the system prompt, or None.
        keep_history: send the earlier turns with each new question.
    """

    def __init__(self, system: str | None = None, keep_history: bool = True) -> None:
        self.system = system
        self.keep_history = keep_history
        self.turns: list[Turn] = []
        self._saved: set[Path] = set()

    def messages_with(self, question: str) -> list[Message]:
        """The messages to send for a new question."""
        return [*_messages(self.system, self.turns if self.keep_history else []), {"role": "user", "content": question}]

    def save(self, name: str) -> Path:
        """Write Markdown to a ``.md`` file, or ``{"messages": [...]}`` to a ``.json`` file, which can also be trained on.

        Raises:
            ValueError: another extension, or an existing file that this conversation did not write.
        """
        path = Path(name).expanduser()
        if path.suffix not in (".json", ".md"):
            raise ValueError(f"{name}: expected a file name that ends in .json or .md")
        if path.exists() and path.resolve() not in self._saved:
            raise ValueError(f"{name} already exists; choose another name")
        messages = _messages(self.system, self.turns)
        text = (
            json.dumps({"messages": messages}, ensure_ascii=False, indent=2) if path.suffix == ".json" else _markdown(messages)
        )
        path.write_text(text.rstrip() + "\n", encoding="utf-8")
        self._saved.add(path.resolve())
        return path

    def load(self, name: str) -> None:
        """Continue the conversation of a ``.json`` file: one that ``save`` wrote, or another with OpenAI's messages.

        Raises:
            ValueError: a Markdown file, or one that is not JSON or holds anything but a system prompt and complete turns.
        """
        if Path(name).suffix == ".md":
            raise ValueError(f"{name}: Markdown cannot be loaded; save the conversation to a .json file too")
        try:
            self.system, self.turns = _turns(json.loads(Path(name).expanduser().read_text(encoding="utf-8")))
        except ValueError as error:  # not UTF-8, not JSON, not a conversation
            raise ValueError(f"{name} is not a saved conversation: {error}") from None


def _messages(system: str | None, turns: Iterable[Turn]) -> list[Message]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def _turns(record: object) -> tuple[str | None, list[Turn]]:
    """The inverse of ``_messages``."""
    messages = record.get("messages") if isinstance(record, dict) else record
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError('expected {"messages": [...]}')
    messages = [{**message, "content": _text(message.get("content"))} for message in messages]
    system = messages[0]["content"] if messages and messages[0].get("role") == "system" else None
    texts = [message["content"] for message in messages[system is not None :]]
    turns = list(zip(texts[::2], texts[1::2], strict=False))
    if messages != _messages(system, turns):
        raise ValueError("expected an optional system prompt, then alternating user and assistant messages")
    return system, turns


def _text(content: object) -> str:
    """The text of a message: a string, or OpenAI's list of text parts."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    texts = [part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str)]
    if len(texts) < len(parts):
        raise ValueError("the content of each message must be a string or a list of text parts")
    return "".join(texts)


def _markdown(messages: Iterable[Message]) -> str:
    return "\n\n".join(f"## {message['role']}\n\n{message['content'].strip()}" for message in messages)
