"""Screen: answers go to stdout, all that is said around them to stderr, so that a pipe holds answers alone."""

from __future__ import annotations

import os
import re
import sys

# What would move the cursor, change colours or ring; a model's answer has no say in that. Tab and newline stay.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Screen:
    """Writes. On a terminal what is not the model's is dim, unless NO_COLOR is set (no-color.org)."""

    def __init__(self) -> None:
        self.terminal = sys.stdout.isatty()
        colours = sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self._dim, self._plain = ("\x1b[2m", "\x1b[0m") if colours else ("", "")

    def piece(self, text: str) -> None:
        """Some of an answer. To a file or a pipe it goes as it is."""
        try:
            print(_CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text) if self.terminal else text, end="", flush=True)
        except BrokenPipeError:  # whoever read has seen enough, as ``head`` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise SystemExit(1) from None

    def note(self, text: str) -> None:
        """What the program says, not the model."""
        print(f"{self._dim}{text}{self._plain}", file=sys.stderr, flush=True)

    def error(self, text: str) -> None:
        """What went wrong, in one line."""
        print("bumblebee: " + " ".join(_CONTROLS.sub(" ", text).split()), file=sys.stderr, flush=True)
