"""Heartbeats of a worker process, by which the server tells a busy worker from one that hangs.

A thread sends them, because a long step must not silence a worker: torch's operators and the loading of libraries leave the
interpreter to other threads. Each heartbeat says for how long the loop has been in its current step, so that a step that never
ends is noticed as well. The thread counts its own intervals and reads no clock: a process that was suspended, with its whole
terminal or machine, does not count that time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from types import TracebackType

from serve.workers.messages import FromWorker, Heartbeat


class Heartbeats:
    """Sends heartbeats while its context is entered, and other messages in between.

    Args:
        pipe: to the server process.
        interval: seconds between two heartbeats.
    """

    def __init__(self, pipe: Connection, interval: float) -> None:
        self._pipe, self._interval = pipe, interval
        self._sending = threading.Lock()  # a message is written in several parts
        self._end = threading.Event()
        self._computing, self._intervals = False, 0

    def __enter__(self) -> Heartbeats:
        self._thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end.set()
        self._thread.join()

    def send(self, message: FromWorker) -> None:
        """Send a message of the loop."""
        with self._sending:
            self._pipe.send(message)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Measure a step of the loop."""
        self._intervals, self._computing = 0, True
        try:
            yield
        finally:
            self._computing = False

    def _run(self) -> None:
        with suppress(OSError):  # the server process has ended
            while not self._end.wait(self._interval):
                self._intervals += 1
                self.send(Heartbeat(self._intervals * self._interval if self._computing else 0.0))
