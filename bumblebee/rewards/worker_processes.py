"""The worker processes of a reward, as the training process sees them.

A worker is a new interpreter, as in ``datamodules/worker_pool.py``: a fork would copy a parent with threads and a GPU context,
and ``multiprocessing``'s spawn imports the main module. Each worker leads a process group of its own, so that child processes
of a reward are killed with it. ``group_reaper`` kills the groups if the training process is killed.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path

from bumblebee.rewards import group_reaper
from bumblebee.rewards.reward import RewardError
from bumblebee.rewards.worker_main import ENTRY_POINT, Reply

START_LIMIT = 300.0  # seconds to import the reward's module
_ROOT = Path(__file__).parents[2]


class WorkerProcesses:
    """Processes that score completions. They start with the first completions, and stay until the object is deleted.

    Args:
        reward: pickled; or another job, with the items that it takes instead of completions.
        processes: how many.
        timeout: seconds for one completion.
    """

    def __init__(self, reward: bytes, processes: int, timeout: float) -> None:
        self._reward, self._processes, self._timeout = reward, processes, timeout
        self._workers: list[_Worker] = []
        self._reaper: _Reaper | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_workers": [], "_reaper": None}  # a copy starts its own

    def replies(self, inputs: Sequence[object]) -> Iterator[tuple[int, Reply]]:
        """Yield (index, reply) of each completion, in the order in which they are done.

        If the caller stops before the end, the workers are killed.

        Raises:
            RewardError: a worker cannot start.
        """
        complete = False
        try:
            yield from self._run(deque(enumerate(inputs)))
            complete = True
        finally:
            if not complete:
                _kill(self._workers, os.getpid())

    def _run(self, waiting: deque[tuple[int, object]]) -> Iterator[tuple[int, Reply]]:
        unfinished = len(waiting)
        while unfinished:
            while len(self._workers) < min(self._processes, unfinished):
                self._workers.append(_Worker(self._reward, self._started_reaper()))
            for worker in self._workers:
                if waiting and worker.idle:
                    worker.start(*waiting.popleft(), self._timeout)
            busy = [worker for worker in self._workers if not worker.idle]
            wait([worker.connection for worker in busy], max(0.0, min(worker.deadline for worker in busy) - time.monotonic()))
            for worker in busy:
                index = worker.index
                reply = worker.reply()
                if not worker.alive:
                    self._workers.remove(worker)
                if reply is not None and index is not None:
                    unfinished -= 1
                    yield index, reply

    def _started_reaper(self) -> _Reaper:
        if self._reaper is None:
            self._reaper = _Reaper()
            weakref.finalize(self, _kill, self._workers, os.getpid(), self._reaper)
        return self._reaper


def pickled(job: object, function: object, subject: str, otherwise: str = "") -> bytes:
    """A job for worker processes, which import the module of its function.

    Args:
        job: the function, or an object that holds it.
        function: of the user.
        subject: of the error: the option and the function's name.
        otherwise: what a user can do instead.

    Raises:
        ValueError: it cannot be sent to another process.
    """
    if getattr(function, "__module__", type(function).__module__) == "__main__":
        raise ValueError(
            f"{subject} is defined in the script that runs, which worker processes do not import; move it to a module"
            f"{f', or {otherwise}' if otherwise else ''}"
        )
    try:
        return pickle.dumps(job)
    except Exception as error:  # of the object's own __reduce__ or __getstate__, too
        raise ValueError(
            f"{subject} cannot be sent to worker processes: {error}{f'; {otherwise}' if otherwise else ''}"
        ) from error


def _kill(workers: list[_Worker], owner: int, reaper: _Reaper | None = None) -> None:
    if os.getpid() != owner:  # a fork of the training process, which has copies of these objects
        return
    for worker in workers:
        worker.kill()
    workers.clear()
    if reaper is not None:
        reaper.close()


class _Reaper:
    """The process that kills the workers if this process is killed."""

    def __init__(self) -> None:
        program = [sys.executable, "-I", "-S", group_reaper.__file__]
        self._process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)

    def follow(self, group: int, alive: bool) -> None:
        """Report a process group that has started, or has been killed."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # somebody has killed it
            self._process.stdin.write(f"{'+' if alive else '-'}{group}\n".encode())
            self._process.stdin.flush()

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()


class _Worker:
    """A process, which starts, scores the completion ``index``, or is idle."""

    def __init__(self, reward: bytes, reaper: _Reaper) -> None:
        self.connection, theirs = Pipe()
        path = os.pathsep.join(dict.fromkeys([str(_ROOT), *filter(None, sys.path)]))
        self._process = subprocess.Popen(
            [sys.executable, "-c", ENTRY_POINT, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=2,
            env={**os.environ, "PYTHONPATH": path},
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
        )
        theirs.close()
        self._reaper = reaper
        reaper.follow(self._process.pid, True)
        self.index: int | None = None
        self.alive, self._starting = True, True
        self._limit, self.deadline = START_LIMIT, time.monotonic() + START_LIMIT
        with suppress(BrokenPipeError, ConnectionResetError):  # it has died, which reply reports
            self.connection.send_bytes(reward)

    @property
    def idle(self) -> bool:
        """Whether it can take a completion."""
        return not self._starting and self.index is None

    def start(self, index: int, each: object, timeout: float) -> None:
        """Send a completion."""
        self.index, self._limit, self.deadline = index, timeout, time.monotonic() + timeout
        with suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send(each)

    def reply(self) -> Reply | None:
        """What became of the completion; None while nothing has. A process that dies or takes too long is killed.

        Raises:
            RewardError: it could not start.
        """
        reply = self._receive()
        if reply is None:
            return None
        if self._starting and reply.value is None:
            raise RewardError(f"{reply.what}{f': {reply.detail}' if reply.detail else ''}")
        self._starting, self.index = False, None
        return reply

    def _receive(self) -> Reply | None:
        doing = "while starting" if self._starting else "on"
        try:
            if self.connection.poll():
                reply: Reply = self.connection.recv()
                return reply
        except (EOFError, ConnectionResetError):
            with suppress(subprocess.TimeoutExpired):  # it may have closed the connection only
                self._process.wait(timeout=1)
            self.kill()
            return Reply(what=f"ended its worker process {doing}", detail=_how_it_ended(self._process.returncode))
        if time.monotonic() < self.deadline:
            return None
        self.kill()
        return Reply(what=f"timed out after {self._limit:g} s {doing}", timed_out=True)

    def kill(self) -> None:
        """Kill it and its child processes."""
        self.alive = False
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reaper.follow(self._process.pid, False)
        self.connection.close()


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    return f"signal {-code}, {signal.strsignal(-code)}{'; a common reason is too little memory' * (-code == signal.SIGKILL)}"
