"""The server's end of the pipe to one worker: nothing here waits in the event loop, and nothing polls.

A thread reads and hands messages to the event loop, another writes, so that a worker in the middle of a long step cannot hold
up the server. The worker's end lives in the worker alone: when that process ends in any way, the reader notices at once.
A new worker gets a new channel, since a killed one may have left half a message behind.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import queue
import threading
from collections.abc import Callable
from typing import Any


class Channel:
    """Messages to and from one worker process.

    Args:
        receive: called in the event loop with each message.
        ended: called in the event loop when the worker has gone.
    """

    def __init__(self, receive: Callable[[Any], None], ended: Callable[[], None]) -> None:
        self._pipe, self.workers_end = multiprocessing.Pipe()
        self._receive, self._ended = receive, ended
        self._outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin, once the worker has been started and has its end."""
        self.workers_end.close()
        self._loop = loop
        for target in (self._read, self._write):
            threading.Thread(target=target, name=f"channel{target.__name__}", daemon=True).start()

    def send(self, message: Any) -> None:
        """Put a message on its way."""
        self._outbox.put(message)

    def close(self) -> None:
        """Tell the worker that nothing more comes: it ends itself."""
        self.send(None)

    def _read(self) -> None:
        try:
            while True:
                self._call(self._receive, self._pipe.recv())
        except (EOFError, OSError):  # OSError: it was killed in the middle of a message
            self._outbox.put(None)  # the writer may be waiting
            self._call(self._ended)

    def _write(self) -> None:
        try:
            while (message := self._outbox.get()) is not None:
                self._pipe.send(message)
            self._pipe.send(None)
        except OSError:  # the worker has gone; the reader tells
            pass

    def _call(self, function: Callable[..., None], *args: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the event loop is closed: nobody is left to tell
            pass
