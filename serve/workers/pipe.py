"""The server's end of the pipe to a worker. Nothing here blocks the event loop, and nothing polls.

One thread reads and passes messages to the event loop, another one writes, so that a worker in the middle of a long step
cannot block the server. The worker's end is open in the worker process alone: however that process ends, the reader notices at
once. A new worker gets a new pipe, because a killed one may have left an incomplete message.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import queue
import threading
from collections.abc import Callable

from serve.workers.messages import FromWorker, ToWorker


class WorkerPipe:
    """Messages to and from one worker process.

    Args:
        on_message: called in the event loop with each message.
        on_exit: called in the event loop when the worker process has ended.
    """

    def __init__(self, on_message: Callable[[FromWorker], None], on_exit: Callable[[], None]) -> None:
        self._pipe, self.worker_end = multiprocessing.Pipe()
        self._on_message, self._on_exit = on_message, on_exit
        self._outbox: queue.SimpleQueue[ToWorker] = queue.SimpleQueue()

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start reading and writing, after the worker has been started with its end."""
        self.worker_end.close()
        self._loop = loop
        for target in (self._read, self._write):
            threading.Thread(target=target, name=f"worker-pipe{target.__name__}", daemon=True).start()

    def send(self, message: ToWorker) -> None:
        """Queue a message for the worker."""
        self._outbox.put(message)

    def close(self) -> None:
        """Ask the worker to exit."""
        self.send(None)

    def _read(self) -> None:
        try:
            while True:
                message = self._pipe.recv()
                self._call_in_loop(self._on_message, message)
        except (EOFError, OSError):  # OSError: killed in the middle of a message
            self._outbox.put(None)  # wakes up the writer
            self._call_in_loop(self._on_exit)

    def _write(self) -> None:
        try:
            while (message := self._outbox.get()) is not None:
                self._pipe.send(message)
            self._pipe.send(None)
        except OSError:  # the worker has ended; the reader reports it
            pass

    def _call_in_loop(self, callback: Callable[..., None], *args: FromWorker) -> None:
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:  # the event loop is closed
            pass
