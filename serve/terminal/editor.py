"""Editor: the keyboard of a person at a terminal; the line editor is prompt_toolkit's.

Enter sends. Alt-Enter, or Enter behind a backslash, begins a new line. The arrow keys find earlier inputs, also those of
other days: they are kept in the user's folder for such state (XDG base directories), readable by nobody else.
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


class Editor:
    """Inputs that are typed.

    Args:
        words: what Tab completes: commands, each with the words that may follow it.
        of_files: commands behind which Tab completes the name of a file.
    """

    interactive = True

    def __init__(self, words: Mapping[str, Sequence[str]], of_files: Sequence[str]) -> None:
        self._session: PromptSession[str] = PromptSession(
            "> ",
            prompt_continuation="  ",
            multiline=True,
            history=FileHistory(str(history_file())),
            completer=CommandCompleter(words, of_files),
            complete_while_typing=False,
            key_bindings=_keys(),
        )

    def read(self) -> str:
        """What is typed next; see Keyboard."""
        return self._session.prompt()


def history_file() -> Path:
    """The file of earlier inputs; made where it is missing."""
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    path = state / "bumblebee" / "chat_history"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch(mode=0o600)
    return path


class CommandCompleter(Completer):
    """Completes commands and what follows them; see Editor."""

    def __init__(self, words: Mapping[str, Sequence[str]], of_files: Sequence[str]) -> None:
        self.words, self.of_files = words, of_files
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        """The ways to go on with what stands before the cursor."""
        command, space, rest = document.text_before_cursor.partition(" ")
        if space and command in self.of_files:
            yield from self._paths.get_completions(Document(rest), complete_event)
            return
        known, typed = (self.words.get(command, ()), rest) if space else (tuple(self.words), command)
        for word in known:
            if typed and word.startswith(typed) or space and not typed:
                yield Completion(word, start_position=-len(typed))


def _keys() -> KeyBindings:
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
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    def _drop(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    return keys
