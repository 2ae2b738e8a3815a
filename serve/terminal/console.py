"""Console input and output of the chat: piped input, the screen, and Ctrl-C. ``line_editor.py`` reads from a keyboard.

Answers go to stdout and everything around them to stderr, so a pipe receives the answers alone.

Ctrl-C during an answer is deferred to the next delta. By default Python raises KeyboardInterrupt at any bytecode: inside an
engine step, whose cache blocks would leak, or inside a destructor or a callback that swallows it.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from bumblebee.utils.signals import handle_signals

# Characters that move the cursor, change colours or ring the bell; a model's answer must not. Tab and newline are allowed.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class InputReader(Protocol):
    """Reads the user's inputs."""

    interactive: bool  # a person types at a terminal

    def read(self) -> str:
        """Return the next input.

        Raises:
            EOFError: end of input.
            KeyboardInterrupt: Ctrl-C on an empty line.
        """
        ...


class StdinReader:
    """Reads inputs from a pipe or a file; a backslash at the end of a line joins it with the next one."""

    interactive = False

    def read(self) -> str:
        """Return the next line and its continuation lines."""
        lines: list[str] = []
        while line := sys.stdin.readline():
            lines.append(line.removesuffix("\n"))
            if not lines[-1].endswith("\\"):
                break
            lines[-1] = lines[-1][:-1]
        if not lines:
            raise EOFError
        return "\n".join(lines)


class Screen:
    """Writes answers, notes and errors. On a terminal notes are dim, unless NO_COLOR is set (no-color.org)."""

    def __init__(self) -> None:
        self.terminal = sys.stdout.isatty()
        colours = sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self._dim, self._reset = ("\x1b[2m", "\x1b[0m") if colours else ("", "")

    def write(self, text: str) -> None:
        """Write a part of an answer. Control characters are replaced on a terminal; files and pipes get them as they are."""
        try:
            print(_CONTROL.sub("\N{REPLACEMENT CHARACTER}", text) if self.terminal else text, end="", flush=True)
        except BrokenPipeError:  # the reader has closed the pipe, as ``head`` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(1) from None

    def note(self, text: str) -> None:
        """Write a message of the program."""
        print(f"{self._dim}{text}{self._reset}", file=sys.stderr, flush=True)

    def error(self, text: str) -> None:
        """Write an error in one line."""
        print("bumblebee: " + " ".join(_CONTROL.sub(" ", text).split()), file=sys.stderr, flush=True)


@contextmanager
def defer_interrupt() -> Iterator[Callable[[], bool]]:
    """Record Ctrl-C instead of raising KeyboardInterrupt; yields a function that returns whether it was pressed."""
    pressed: list[int] = []
    with handle_signals(lambda number, frame: pressed.append(number), signal.SIGINT):
        yield lambda: bool(pressed)


@contextmanager
def raise_interrupt() -> Iterator[None]:
    """Within ``defer_interrupt``: Ctrl-C also raises KeyboardInterrupt, which ends a blocking wait."""
    deferring = signal.getsignal(signal.SIGINT)

    def record_and_raise(number: int, frame: object) -> None:
        if callable(deferring):
            deferring(number, None)
        raise KeyboardInterrupt

    with handle_signals(record_and_raise, signal.SIGINT):
        yield
