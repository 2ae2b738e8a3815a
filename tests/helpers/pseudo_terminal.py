"""Runs a command at a pseudo terminal, types keys and reads the output."""

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
        words: command-line arguments.
        state: the user's state directory.
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
        self.raw = ""  # the output so far
        self._seen = 0  # length of the text that ``expect`` has consumed

    @property
    def text(self) -> str:
        """The output without cursor movements."""
        return _MOVES.sub("", self.raw)

    def type(self, *keys: str) -> None:
        """Type text, or keys by their names in KEYS."""
        for key in keys:
            os.write(self.master, KEYS.get(key, key).encode())
            time.sleep(0.05)  # typing speed; otherwise Alt-Enter is read together with the next key

    def expect(self, expected: str, seconds: float = 20) -> str:
        """Wait for text after the last match. Returns the output up to its end."""
        until = time.monotonic() + seconds
        while (at := self.text.find(expected, self._seen)) < 0:
            if time.monotonic() > until or not self._read(until - time.monotonic()):
                raise AssertionError(f"{expected!r} was not printed; the output was:\n{self.text[self._seen :]}")
        output, self._seen = self.text[self._seen : at + len(expected)], at + len(expected)
        return output

    def more(self, seconds: float) -> None:
        """Read output for some seconds."""
        until = time.monotonic() + seconds
        while self._read(until - time.monotonic()):
            pass

    def end(self) -> int:
        """Wait for the process; returns its exit code."""
        while self._read(30):
            pass
        return self.process.wait(30)

    def close(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.process.wait()
        os.close(self.master)

    def _read(self, seconds: float) -> bool:
        if not select.select([self.master], [], [], max(seconds, 0))[0]:
            return False
        try:
            piece = os.read(self.master, 65536)
        except OSError:  # the process has exited
            return False
        self.raw += piece.decode(errors="replace")
        return bool(piece)


def _take_terminal() -> None:
    """Make the terminal the controlling terminal, so that Ctrl-C reaches the process."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
