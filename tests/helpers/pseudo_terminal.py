"""A program at a pseudo terminal: type, and see what comes."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

from helpers.processes import ROOT

KEYS = {"enter": "\r", "alt-enter": "\x1b\r", "ctrl-c": "\x03", "ctrl-d": "\x04", "up": "\x1b[A", "tab": "\t"}
_MOVES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[()=>][A-Z0-9]?|\r|\x08")


class PseudoTerminal:
    """``bumblebee WORDS`` at a terminal of 100 by 30 characters.

    Args:
        words: of the command line.
        state: the user's folder for state.
    """

    def __init__(self, *words: str, state: Path, **environment: str) -> None:
        self.master, slave = pty.openpty()
        env = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(state), "TERM": "xterm", "COLUMNS": "100",
               "LINES": "30", "PROMPT_TOOLKIT_NO_CPR": "1", **environment}  # fmt: skip
        command = [sys.executable, "-m", "bumblebee", *words]
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=env, start_new_session=True, preexec_fn=_take_terminal
        )
        os.close(slave)
        self.raw = ""  # all that came
        self._seen = 0  # of what is told by ``expect``

    @property
    def text(self) -> str:
        """What came, without the moves of the cursor."""
        return _MOVES.sub("", self.raw)

    def type(self, *keys: str) -> None:
        """Text, or the names of KEYS."""
        for key in keys:
            os.write(self.master, KEYS.get(key, key).encode())
            time.sleep(0.05)  # a person's fingers; Alt-Enter would otherwise be read with what follows

    def expect(self, wanted: str, seconds: float = 20) -> str:
        """Wait until a text comes that was not told before. Returns what came up to its end."""
        until = time.monotonic() + seconds
        while (at := self.text.find(wanted, self._seen)) < 0:
            if time.monotonic() > until or not self._read(until - time.monotonic()):
                raise AssertionError(f"{wanted!r} did not come; this did:\n{self.text[self._seen :]}")
        told, self._seen = self.text[self._seen : at + len(wanted)], at + len(wanted)
        return told

    def more(self, seconds: float) -> None:
        """Whatever comes in this time."""
        until = time.monotonic() + seconds
        while self._read(until - time.monotonic()):
            pass

    def end(self) -> int:
        """Wait for its end; its exit code."""
        while self._read(30):
            pass
        return self.process.wait(30)

    def close(self) -> None:
        """End it, whatever it does."""
        self.process.kill()
        self.process.wait()
        os.close(self.master)

    def _read(self, seconds: float) -> bool:
        if not select.select([self.master], [], [], max(seconds, 0))[0]:
            return False
        try:
            piece = os.read(self.master, 65536)
        except OSError:  # the other side is closed
            return False
        self.raw += piece.decode(errors="replace")
        return bool(piece)


def _take_terminal() -> None:
    """Make the terminal the process's own, so that Ctrl-C reaches it."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
