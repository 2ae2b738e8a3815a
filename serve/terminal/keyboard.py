"""Keyboard: where the user's inputs come from; here, a pipe. ``editor.py`` has the one for a person.

An input is one line, or several: a backslash at the end of a line says that the next belongs to it.
"""

from __future__ import annotations

import sys
from typing import Protocol


class Keyboard(Protocol):
    """Gives the user's inputs."""

    interactive: bool  # a person sits there

    def read(self) -> str:
        """The next input.

        Raises:
            EOFError: there is none.
            KeyboardInterrupt: Ctrl-C where nothing had been typed.
        """
        ...


class Lines:
    """Inputs from a pipe or a file."""

    interactive = False

    def read(self) -> str:
        """The next line, with those behind it that belong to it."""
        lines: list[str] = []
        while line := sys.stdin.readline():
            lines.append(line.removesuffix("\n"))
            if not lines[-1].endswith("\\"):
                break
            lines[-1] = lines[-1][:-1]
        if not lines:
            raise EOFError
        return "\n".join(lines)
