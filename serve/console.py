"""What a server says to its operator."""

from __future__ import annotations

import contextlib
import sys
from typing import TextIO


def say(text: str, file: TextIO | None = None) -> None:
    """Write a line, at once; to stdout, if no other file is given. Nobody has to read it: a closed pipe ends no server."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=file or sys.stdout, flush=True)
