"""Logging of the command line: plain lines on stderr, from rank 0, at the level of ``--log_level``.

Library code logs to children of the ``bumblebee`` logger and never configures it, so that a program that imports Bumblebee
keeps control of its own output.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from bumblebee.cli.errors.reporting import fail
from bumblebee.distributed import process_group

LEVELS = ("debug", "info", "warning", "error")


class ConsoleHandler(logging.Handler):
    """Writes records to the current ``sys.stderr``, above a progress bar if there is one.

    Messages below ERROR are written by rank 0 only; what a rank reports as an error is never hidden.
    """

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        if not process_group.is_main() and record.levelno < logging.ERROR:
            return
        try:
            write_line(self.format(record))
        except Exception:
            self.handleError(record)


class LevelPrefix(logging.Formatter):
    """Info messages stand alone; all others begin with their level."""

    def format(self, record: logging.LogRecord) -> str:
        """The message, as ``warning: ...`` for a warning."""
        text = super().format(record)
        return text if record.levelno == logging.INFO else f"{record.levelname.lower()}: {text}"


def configure(level: str = "info") -> None:
    """Attach the console handler to the ``bumblebee`` logger, once, and set its level."""
    logger = logging.getLogger("bumblebee")
    logger.setLevel(level.upper())
    if not any(isinstance(handler, ConsoleHandler) for handler in logger.handlers):
        handler = ConsoleHandler()
        handler.setFormatter(LevelPrefix())
        logger.addHandler(handler)


def write_line(text: str) -> None:
    """Write a line to stderr without tearing a progress bar. tqdm is not imported only for that."""
    tqdm = sys.modules.get("tqdm")
    if tqdm is None:
        print(text, file=sys.stderr, flush=True)
    else:
        tqdm.tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()


def pop_log_level(words: Sequence[str]) -> tuple[str, list[str]]:
    """Return the value of ``--log_level``, which may stand anywhere and defaults to "info", and the remaining words.

    ``serve`` also has an option of this name, the level of uvicorn's log: it keeps the words.
    """
    level, rest, own = "info", [], []
    remaining = iter(words)
    for word in remaining:
        name, equals, value = word.partition("=")
        if name == "--log_level":
            level = value if equals else next(remaining, "")
            own = ["--log_level", level]
        else:
            rest.append(word)
    if level not in LEVELS:
        got = repr(level) if level else "nothing"
        fail(f"--log_level: expected {', '.join(LEVELS[:-1])} or {LEVELS[-1]}, got {got}")
    return level, rest + own if rest[:1] == ["serve"] else rest
