"""TrialProcess: the process of a trial, which another sweep process can find, wait for and stop after a kill.

A shell runs the command and writes its exit code to a file, so that the result of a trial that outlives its sweep is not lost.
Shell and command inherit a descriptor with a lock (flock) on a file in the trial's folder: as long as one of them lives, the
lock is held. No process id has to be trusted for that.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from bumblebee.sweep.trials.file_lock import FileLock
from bumblebee.training.folder_lock import NAME as RUN_LOCK

OUTPUT = "output.txt"
_PROCESS, _EXIT_CODE, _ALIVE = ".sweep_process", ".sweep_exit_code", ".sweep_alive"
_ERROR = re.compile(r"(?:\[rank\d+\]: ?)?([\w.]+(?:Error|Exception)(?:: .*)?)$")  # the last line of a traceback
# A trapped signal ends the command, not the shell, which waits for the command to end.
_SCRIPT = 'trap : TERM INT; echo $$ > "$1"; out="$2"; shift 2; "$@"; echo $? > "$out.partial"; mv "$out.partial" "$out"'


class TrialProcess:
    """The process of the trial in a folder.

    Args:
        folder: output folder of the trial; it exists.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._child: subprocess.Popen[bytes] | None = None
        self._stopping = False

    def start(self, command: Sequence[str], environment: dict[str, str]) -> None:
        """Start a command; its output is appended to output.txt.

        Raises:
            OSError: it cannot be started.
        """
        self._file(_EXIT_CODE).unlink(missing_ok=True)
        lock = FileLock.acquire(self._file(_ALIVE), wait=True)
        assert lock is not None
        words = ["/bin/sh", "-c", _SCRIPT, "sh", str(self._file(_PROCESS)), str(self._file(_EXIT_CODE)), *command]
        with lock, self.output.open("ab") as output:
            self._child = subprocess.Popen(
                words, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True, pass_fds=(lock.descriptor,),
            )  # fmt: skip

    @property
    def output(self) -> Path:
        """What the process printed."""
        return self.folder / OUTPUT

    def is_alive(self) -> bool:
        """Whether the process, started by whomever, is running."""
        if self._child is not None:
            self._child.poll()  # reap it
        # A process of its own that outlives the command does not count.
        if self._file(_EXIT_CODE).exists() or not self._file(_ALIVE).exists():
            return False
        lock = FileLock.acquire(self._file(_ALIVE))
        if lock is not None:
            lock.release()
        return lock is None

    def exit_code(self) -> int | None:
        """Exit code of the last process, negative for a signal; None if it was killed together with its shell, or never ran."""
        try:
            code = int(self._file(_EXIT_CODE).read_text())
        except (FileNotFoundError, ValueError):
            return None
        return 128 - code if code > 128 else code

    def stop(self) -> None:
        """Let the run finish its step, save and end. A second call does nothing: for ``fit`` a second signal means at once."""
        if self._stopping:
            return
        self._stopping = True
        # Of several ranks one is enough: they agree on stopping. A launcher would end them without waiting for a checkpoint.
        try:
            os.kill(self._rank(), signal.SIGTERM)
        except (OSError, ValueError, IndexError):  # not set up yet
            self._signal_group(signal.SIGTERM)

    def kill(self) -> None:
        """End the process at once."""
        self._signal_group(signal.SIGKILL)

    def _rank(self) -> int:
        """Process id of rank 0, from its lock on the folder.

        Raises:
            OSError: it has not locked the folder.
            ValueError: the lock is that of an earlier process, which was killed.
        """
        lock = self.folder / RUN_LOCK
        if lock.stat().st_mtime_ns < self._file(_PROCESS).stat().st_mtime_ns:
            raise ValueError("the lock is older than the process")
        return int(lock.read_text().split()[1])

    def _signal_group(self, number: int) -> None:
        with suppress(OSError, ValueError):
            if self.is_alive():
                os.killpg(int(self._file(_PROCESS).read_text()), number)

    def _file(self, name: str) -> Path:
        return self.folder / name


def error_message(output: Path) -> str:
    """The error that a run ended with: its own line if it wrote one, else that of its traceback, else its last line."""
    try:
        with output.open("rb") as stream:
            stream.seek(max(0, output.stat().st_size - 20_000))
            text = stream.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    own = [line.removeprefix("bumblebee: ") for line in lines if line.startswith("bumblebee: ")]
    errors = [match[1] for line in lines if (match := _ERROR.match(line)) and "ChildFailedError" not in line]
    return (own or errors or lines or [""])[-1]
