"""``LineEditor``: keyboard input at a terminal, on prompt_toolkit.

Enter sends. Alt-Enter, or Enter after a backslash, inserts a new line. The arrow keys recall earlier inputs, also of previous
sessions: the history is kept in the user's state directory (XDG base directories), readable by the user alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent


class LineEditor:
    """An ``InputReader`` with editing, history and completion.

    Args:
        completions: the commands that Tab completes, each with the words that may follow it.
        file_commands: commands after which Tab completes a file name.
    """

    interactive = True

    def __init__(self, completions: Mapping[str, Sequence[str]], file_commands: Sequence[str]) -> None:
        self._session: PromptSession[str] = PromptSession(
            "> ",
            prompt_continuation="  ",
            multiline=True,
            history=FileHistory(str(history_file())),
            completer=CommandCompleter(completions, file_commands),
            complete_while_typing=False,
            key_bindings=_key_bindings(),
        )

    def read(self) -> str:
        """Return the next input; see ``InputReader``."""
        return self._session.prompt()


def history_file() -> Path:
    """The file of earlier inputs, created if missing."""
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    path = state / "bumblebee" / "chat_history"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    return path


class CommandCompleter(Completer):
    """Completes commands and their arguments; see ``LineEditor``."""

    def __init__(self, completions: Mapping[str, Sequence[str]], file_commands: Sequence[str]) -> None:
        self.completions, self.file_commands = completions, file_commands
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        """Yield the completions of the text before the cursor."""
        command, space, argument = document.text_before_cursor.partition(" ")
        if space and command in self.file_commands:
            yield from self._paths.get_completions(Document(argument), complete_event)
            return
        words, typed = (self.completions.get(command, ()), argument) if space else (tuple(self.completions), command)
        for word in words:
            if typed and word.startswith(typed) or space and not typed:
                yield Completion(word, start_position=-len(typed))


def _key_bindings() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter")
    def _send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _insert_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    def _clear(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    return keys
